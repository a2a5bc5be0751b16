"""How DeepGEMM 0.1.4.post1 chooses a configuration on SM90 (``get_best_config<SM90ArchSpec>``).

Source: csrc/jit_kernels/heuristics/{common,config,sm90,utils}.hpp of DeepGEMM 2.6. The arithmetic
follows the C++ code, including its single-precision steps, because ties and rounding decide which
kernel is built.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import product
from math import inf
from typing import NamedTuple

from runner.errors import UserError

SMEM_CAPACITY = 232448
CONTIGUOUS_M_ALIGNMENT = 128
"""Rows to which each expert's tokens are padded in the contiguous grouped layout."""
M_GRANULE = 64
"""Above M = 32 the choice can change only after a multiple of this many rows: the cycle model uses
M only in ``ceil(M / block_m)``, and every candidate's ``block_m`` is a multiple of 64."""

_MAX_STAGES = 16
_WGMMA_M = 64
_INT64_MAX = 2**63 - 1


class GemmType(Enum):
    """DeepGEMM's ``GemmType``; the value is its C++ spelling."""

    NORMAL = "GemmType::Normal"
    CONTIGUOUS = "GemmType::MGroupedContiguous"
    MASKED = "GemmType::MGroupedMasked"
    BATCHED = "GemmType::Batched"


@dataclass(frozen=True, slots=True)
class GemmDesc:
    """The heuristics' description of a GEMM: both operands K-major, no accumulation.

    Attributes:
        is_fp8: FP8 operands with 1D2D block scales; otherwise BF16 operands without scales.
    """

    gemm_type: GemmType
    is_fp8: bool
    n: int
    k: int
    num_groups: int
    num_sms: int
    fp32_output: bool = False

    @property
    def ab_bytes(self) -> int:
        return 1 if self.is_fp8 else 2

    @property
    def cd_bytes(self) -> int:
        return 4 if self.fp32_output else 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Tile sizes, and the shape of a cluster of thread blocks that share loads."""

    block_m: int
    block_n: int
    block_k: int
    cluster_m: int
    cluster_n: int

    @property
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n


def ceil_div(a: int, b: int) -> int:
    """Integer division rounded up."""
    return -(-a // b)


def align(a: int, b: int) -> int:
    """``a`` rounded up to a multiple of ``b``."""
    return ceil_div(a, b) * b


def swizzle_mode(block_size: int, element_bytes: int) -> int:
    """Widest TMA swizzle, in bytes, that divides a row of the block."""
    return next(mode for mode in (128, 64, 32, 16) if block_size * element_bytes % mode == 0)


def best_layout(desc: GemmDesc, m: int) -> Layout:
    """The layout that the library chooses: the first with the fewest modelled cycles.

    Args:
        desc: the GEMM.
        m: rows; for the masked layout, the expected rows per group.

    Raises:
        UserError: no layout fits the GEMM.
    """
    num_sms = desc.num_sms
    candidates = _candidates(desc, 16 if m <= 16 else 32 if m <= 32 else 64)
    # A fast estimate leaves only the closest candidates. The library truncates cycles to integers,
    # divides by the efficiency (at least 1 / num_sms) and rounds to 24 bits, so its result differs
    # from the estimate by less than this bound allows.
    estimates = [
        inf if is_cluster and waves <= 1 else cycles_per_wave * waves
        for block_m, blocks_per_row, is_cluster, cycles_per_wave, _ in candidates
        for waves in (-(-(-(-m // block_m) * blocks_per_row) // num_sms),)
    ]
    bound = min(estimates) * (1 + 1e-6) + 2 * num_sms
    close = [c for c, cycles in zip(candidates, estimates, strict=True) if cycles <= bound]
    if len(close) == 1:
        return close[0].layout
    return min(close, key=lambda candidate: _library_cycles(desc, candidate.layout, m)).layout


class _Candidate(NamedTuple):
    """A legal layout, with the terms to estimate its cycles."""

    block_m: int
    blocks_per_row: int  # of tiles of ``block_m`` rows
    is_cluster: bool
    cycles_per_wave: float  # of one block on every SM
    layout: Layout


@dataclass(frozen=True)
class _Traffic:
    """Bytes per block through L1 and L2, and bytes that all SMs together move per cycle."""

    l1_bytes: int
    l2_bytes: int
    l1_rate: int
    l2_rate: int


def _traffic(desc: GemmDesc, layout: Layout) -> _Traffic:
    block_m, block_n = layout.block_m, layout.block_n
    row_bytes = desc.k * desc.ab_bytes
    output = block_m * block_n * desc.cd_bytes
    tensor_core = row_bytes * (max(_WGMMA_M, block_m) + block_n) + output
    multicast = block_m // layout.cluster_n + block_n // layout.cluster_m
    return _Traffic(
        l1_bytes=row_bytes * (block_m + block_n) + tensor_core + output,
        l2_bytes=row_bytes * multicast + output,
        l1_rate=128 * desc.num_sms,
        l2_rate=int(min(64.0 * desc.num_sms, 8e6 / 1.3e3)),
    )


def _blocks_per_row(desc: GemmDesc, layout: Layout) -> int:
    # In the contiguous layout, the rows of all groups form one sequence of tiles.
    groups = 1 if desc.gemm_type is GemmType.CONTIGUOUS else desc.num_groups
    return ceil_div(desc.n, layout.block_n) * groups


def _library_cycles(desc: GemmDesc, layout: Layout, m: int) -> int:
    """Cycles, computed with the library's own arithmetic."""
    blocks = ceil_div(m, layout.block_m) * _blocks_per_row(desc, layout)
    waves = ceil_div(blocks, desc.num_sms)
    if layout.cluster_size > 1 and waves <= 1:
        return _INT64_MAX
    load = _traffic(desc, layout)
    cycles = max(load.l1_bytes * blocks // load.l1_rate, load.l2_bytes * blocks // load.l2_rate)
    efficiency = _f32(_f32(blocks) / _f32(waves * desc.num_sms))
    return int(_f32(_f32(cycles) / efficiency))


def _f32(value: float) -> float:
    """``value`` rounded to single precision, like a ``float`` in the C++ code."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@lru_cache(maxsize=4096)
def _candidates(desc: GemmDesc, m: int) -> list[_Candidate]:
    """Layouts that may be the best; M matters only because small M makes small tiles legal.

    Candidates with the same number of blocks need the same number of waves. Among these, one that
    is two cycles per block slower than the fastest is always above :func:`best_layout`'s bound, so
    it is left out.
    """
    layouts = legal_layouts(desc, m)
    if not layouts:
        operands = "FP8" if desc.is_fp8 else "BF16"
        raise UserError(
            f"no {operands} kernel of {desc.gemm_type.value} exists for n={desc.n}, k={desc.k}: "
            "its tiles do not fit in shared memory"
        )
    found = []
    least: dict[tuple[int, int, bool], float] = {}
    for layout in layouts:
        load = _traffic(desc, layout)
        cycles = desc.num_sms * max(load.l1_bytes / load.l1_rate, load.l2_bytes / load.l2_rate)
        blocks = (layout.block_m, _blocks_per_row(desc, layout), layout.cluster_size > 1)
        least[blocks] = min(cycles, least.get(blocks, inf))
        found.append((blocks, cycles, layout))
    return [
        _Candidate(*blocks, cycles, layout)
        for blocks, cycles, layout in found
        if cycles <= least[blocks] * (1 + 1e-6) + 2 * desc.num_sms
    ]


def legal_layouts(desc: GemmDesc, m: int) -> list[Layout]:
    """Layouts that the library considers for ``m`` rows, in the library's order."""
    clusters = [(1, 1)] if desc.gemm_type is GemmType.BATCHED else [(1, 1), (1, 2), (2, 1)]
    block_ns = range(16, (192 if desc.is_fp8 else 256) + 1, 16)
    layouts = (
        Layout(block_m, block_n, 128 // desc.ab_bytes, cluster_m, cluster_n)
        for (cluster_m, cluster_n), block_m, block_n in product(
            clusters, _block_ms(desc, m), block_ns
        )
        if desc.num_sms % (cluster_m * cluster_n) == 0
    )
    return [layout for layout in layouts if _is_legal(desc, layout)]


def _block_ms(desc: GemmDesc, m: int) -> list[int]:
    if desc.gemm_type is GemmType.CONTIGUOUS:
        return [CONTIGUOUS_M_ALIGNMENT]
    if desc.gemm_type is GemmType.MASKED:
        return [64, 128]
    small = [16] * (m <= 16) + [32] * (m <= 32)
    return [64, 128, *small, *[256] * (not desc.fp32_output)]


def _is_legal(desc: GemmDesc, layout: Layout) -> bool:
    block_m, block_n, block_k = layout.block_m, layout.block_n, layout.block_k
    excess = block_n - block_k
    if desc.is_fp8 and excess > 0 and block_n % excess and block_k % excess:
        return False
    masked = desc.gemm_type is GemmType.MASKED
    if masked and ceil_div(desc.n, block_n) % layout.cluster_size:
        return False
    if block_m > 128 and block_n > 128:
        return False
    stages = num_stages(desc, layout)
    return stages >= 4 or (stages == 3 and block_m * block_n >= 128 * 192)


def num_stages(desc: GemmDesc, layout: Layout) -> int:
    """Pipeline stages that fit in shared memory."""
    block_m, block_n, block_k = layout.block_m, layout.block_n, layout.block_k
    extra = align(block_m * block_n * desc.cd_bytes, 1024) + _MAX_STAGES * 8 * 2
    per_stage = (block_m + block_n) * block_k * desc.ab_bytes
    if desc.is_fp8:
        scales_per_k_block = 1 if block_k % block_n == 0 else 2
        extra += align(ceil_div(desc.k, block_k) * 4 * scales_per_k_block, 8)
        per_stage += align(block_m * 4, 128)
    return min((SMEM_CAPACITY - extra) // per_stage, _MAX_STAGES)
