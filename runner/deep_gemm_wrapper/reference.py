"""The ``deep_gemm`` functions that a forward calls, in plain torch, with the library's names.

Inputs are rounded as in the kernels; sums are as wide as possible. CPU runs use this module, and
tests compare GPU kernels with it. Pass it as the library of a ``DeepGemmWrapper``. FP8 operands
are (e4m3 values, fp32 scales).
"""

from __future__ import annotations

import torch
from torch import Tensor

from runner.deep_gemm_wrapper.quantise import (
    dequantise_blocks,
    dequantise_tokens,
    unpack_pages,
    widen,
)

Fp8 = tuple[Tensor, Tensor]


def get_num_sms() -> int:
    """0: a CPU has no SMs."""
    return 0


def set_num_sms(num_sms: int) -> None:
    """Do nothing: a CPU has no SMs."""


def fp8_gemm_nt(lhs: Fp8, rhs: Fp8, out: Tensor) -> None:
    """out [m, n] = lhs [m, k] @ rhs [n, k].T."""
    out.copy_(_activations(*lhs) @ _weights(*rhs).mT)


def m_grouped_fp8_gemm_nt_contiguous(lhs: Fp8, rhs: Fp8, out: Tensor, m_indices: Tensor) -> None:
    """As :func:`fp8_gemm_nt` with the weight of each row's group; skips rows of group -1."""
    for group in torch.unique(m_indices[m_indices >= 0]).tolist():
        rows = m_indices == group
        x = _activations(lhs[0][rows], lhs[1][rows])
        weight = _weights(rhs[0][group], rhs[1][group])
        out[rows] = (x @ weight.mT).to(out.dtype)


def m_grouped_fp8_gemm_nt_masked(
    lhs: Fp8, rhs: Fp8, out: Tensor, masked_m: Tensor, expected_m: int
) -> None:
    """As :func:`fp8_gemm_nt` for the first ``masked_m[i]`` rows of group i."""
    for group, rows in enumerate(masked_m.tolist()):
        x = _activations(lhs[0][group, :rows], lhs[1][group, :rows])
        weight = _weights(rhs[0][group], rhs[1][group])
        out[group, :rows] = (x @ weight.mT).to(out.dtype)


def bf16_gemm_nt(lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
    """out [m, n] = lhs [m, k] @ rhs [n, k].T."""
    out.copy_(widen(lhs) @ widen(rhs).mT)


def tf32_hc_prenorm_gemm(
    x: Tensor, fn: Tensor, out: Tensor, sqrsum: Tensor, num_splits: int
) -> None:
    """Products [splits, m, n] and sums of squares [splits, m]; all splits but the first are 0."""
    out.zero_()
    sqrsum.zero_()
    out[0] = widen(x) @ widen(fn).mT
    sqrsum[0] = widen(x).square().sum(-1)


def fp8_einsum(equation: str, lhs: Fp8, rhs: Fp8, out: Tensor) -> None:
    """As ``torch.einsum``, on FP8 operands."""
    out.copy_(torch.einsum(equation, _activations(*lhs), _weights(*rhs)))


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_kv: int, num_sms: int) -> Tensor:
    """Zeros: the reference needs no work split."""
    return torch.zeros((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
) -> Tensor:
    """Scores [rows, max_context_len] fp32 against the entries of each row's pages."""
    pages = widen(unpack_pages(kv_cache))[block_table.long()]
    entries = pages.flatten(1, 2)[:, :max_context_len]
    dots = torch.einsum("rhd,red->rhe", widen(q.squeeze(1).float()), entries).relu()
    return torch.einsum("rh,rhe->re", widen(weights), dots).float()


def fp8_mqa_logits(
    q: Tensor,
    kv: Fp8,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    *,
    clean_logits: bool,
    max_seqlen_k: int,
) -> Tensor:
    """Scores [rows, max_seqlen_k] fp32 against all entries; ignores ``ks`` and ``ke``."""
    entries = widen(kv[0].float() * kv[1].unsqueeze(-1))
    dots = torch.einsum("rhd,ed->rhe", widen(q.float()), entries).relu()
    logits = torch.einsum("rh,rhe->re", widen(weights), dots).float()
    return torch.nn.functional.pad(logits, (0, max_seqlen_k - logits.shape[1]))


def _activations(values: Tensor, scales: Tensor) -> Tensor:
    return widen(dequantise_tokens(values, scales))


def _weights(values: Tensor, scales: Tensor) -> Tensor:
    return widen(dequantise_blocks(values, scales))
