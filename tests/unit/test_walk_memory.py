"""Memory of a walk: the bytes of the buffers that its calls work on."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.gemm_walks import HOOKED_TYPES
from runner.backend.walk_memory import walk_bytes
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

Buffer = tuple[int, tuple[int, ...]]
"""Bytes of an element, and the shape."""


def blocks(size: int) -> int:
    return -(-size // 128)


def buffers(kind: T, m: int, n: int, k: int, groups: int) -> list[Buffer]:
    """What the warm-up of that type allocates, buffer by buffer."""
    padded = -(-m // 4) * 4
    scales = (blocks(n), blocks(k))
    rows: list[Buffer] = [(1, (m, k)), (4, (m, blocks(k))), (4, (padded, blocks(k)))]
    experts: list[Buffer] = [(1, (groups, n, k)), (4, (groups, *scales))]
    splits = max(groups, 1)
    found: dict[T, list[Buffer]] = {
        T.GEMM_NT_F8F8BF16: [*rows, (1, (n, k)), (4, scales), (2, (m, n))],
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: [*rows, *experts, (4, (m,)), (2, (m, n))],
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED: [
            *((each, (groups, *shape)) for each, shape in rows),
            *experts,
            (4, (groups,)),
            (2, (groups, m, n)),
        ],
        T.GEMM_NT_BF16BF16F32: [(2, (m, k)), (2, (n, k)), (4, (m, n))],
        T.GROUPED_GEMM_NT_BF16_CONTIG: [(2, (m, k)), (2, (groups, n, k)), (4, (m,)), (2, (m, n))],
        T.GROUPED_GEMM_NT_BF16_MASKED: [
            (2, (groups, m, k)),
            (2, (groups, n, k)),
            (4, (groups,)),
            (2, (groups, m, n)),
        ],
        T.TF32_HC_PRENORM_GEMM: [
            (2, (m, k)),
            (4, (n, k)),
            (4, (splits, m, n)),
            (4, (splits, m)),
        ],
    }
    return found[kind]


size = st.integers(1, 20000)


@pytest.mark.parametrize("kind", sorted(HOOKED_TYPES))
@given(m=size, n=size, k=size, groups=st.integers(0, 300))
def test_the_sum_of_the_buffers(kind: T, m: int, n: int, k: int, groups: int) -> None:
    expected = sum(each * prod(shape) for each, shape in buffers(kind, m, n, k, groups))
    assert walk_bytes(GemmShape(kind, n, k, groups, 132), m) == expected


def test_a_number_worked_out_by_hand() -> None:
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 2048, 1, 132)
    rows, weights, out = 1001 * 2048, 4096 * 2048, 2 * 1001 * 4096
    assert walk_bytes(shape, 1001) == rows + weights + out + 4 * 16 * (1001 + 1004) + 4 * 32 * 16


@pytest.mark.parametrize("kind", sorted(set(T) - HOOKED_TYPES))
def test_types_that_no_warm_up_walks(kind: T) -> None:
    with pytest.raises(KeyError):
        walk_bytes(GemmShape(kind, 64, 128, 1, 132), 8)
