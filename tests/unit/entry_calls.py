"""CPU arguments for one call of each DeepGEMM entry point, for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runner.deep_gemm_wrapper.quantise import PAGE, pack_pages, quantise_blocks, quantise_tokens

GROUPS, N, K = 3, 256, 512
HEADS, DIM, ENTRIES = 4, 128, 2 * PAGE
SPLITS = 2


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def _out(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def dense(m: int) -> tuple[Any, ...]:
    return quantise_tokens(_bf16(m, K)), quantise_blocks(_bf16(N, K)), _out(m, N)


def contiguous(m: int) -> tuple[Any, ...]:
    """Rows alternate between the groups; every third row is padding."""
    indices = torch.tensor([-1 if row % 3 == 2 else row % GROUPS for row in range(m)])
    return (
        quantise_tokens(_bf16(m, K)),
        quantise_blocks(_bf16(GROUPS, N, K)),
        _out(m, N),
        indices.to(torch.int32),
    )


def masked(m: int) -> tuple[Any, ...]:
    """Group 0 uses all rows, group 1 none, group 2 the first half."""
    used = torch.tensor([m, 0, m // 2], dtype=torch.int32)
    return (
        quantise_tokens(_bf16(GROUPS, m, K)),
        quantise_blocks(_bf16(GROUPS, N, K)),
        _out(GROUPS, m, N),
        used,
        m,
    )


def bf16_to_fp32(m: int) -> tuple[Any, ...]:
    return _bf16(m, K), _bf16(N, K), torch.empty(m, N)


def hc(m: int) -> tuple[Any, ...]:
    return (
        _bf16(m, K),
        torch.randn(24, K),
        torch.empty(SPLITS, m, 24),
        torch.empty(SPLITS, m),
        SPLITS,
    )


def einsum(m: int) -> tuple[Any, ...]:
    return (
        quantise_tokens(_bf16(m, GROUPS, K)),
        quantise_blocks(_bf16(GROUPS, N, K)),
        _out(m, GROUPS, N),
    )


def metadata(m: int) -> tuple[Any, ...]:
    return torch.ones((m, 1), dtype=torch.int32), PAGE, 132


def paged(m: int) -> tuple[Any, ...]:
    """Row r reads the first r % PAGE + 1 entries, all in the first of two pages."""
    values, scales = quantise_tokens(_bf16(ENTRIES, DIM))
    lens = (torch.arange(m, dtype=torch.int32) % PAGE + 1).unsqueeze(1)
    table = torch.tensor([[0, 1]] * m, dtype=torch.int32).view(m, 2)
    return (
        quantise_tokens(_bf16(m, 1, HEADS, DIM))[0],
        pack_pages(values, scales.squeeze(-1)),
        torch.rand(m, HEADS),
        lens,
        table,
        torch.zeros((133, 2), dtype=torch.int32),
        PAGE,
    )


def unpaged(m: int) -> tuple[Any, ...]:
    """Row r reads the first r % ENTRIES + 1 entries."""
    values, scales = quantise_tokens(_bf16(ENTRIES, DIM))
    ends = torch.arange(m, dtype=torch.int32) % ENTRIES + 1
    return (
        quantise_tokens(_bf16(m, HEADS, DIM))[0],
        (values, scales.squeeze(-1)),
        torch.rand(m, HEADS),
        torch.zeros(m, dtype=torch.int32),
        ends,
        ENTRIES,
    )


CALLS: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "gemm_nt_f8f8bf16": dense,
    "grouped_gemm_nt_f8f8bf16_contig": contiguous,
    "grouped_gemm_nt_f8f8bf16_masked": masked,
    "gemm_nt_bf16bf16f32": bf16_to_fp32,
    "tf32_hc_prenorm_gemm": hc,
    "fp8_einsum_bhr_hdr_bhd": einsum,
    "get_paged_mqa_logits_metadata": metadata,
    "fp8_paged_mqa_logits": paged,
    "fp8_mqa_logits": unpaged,
}
"""Functions from a number of rows to arguments, by entry point."""
