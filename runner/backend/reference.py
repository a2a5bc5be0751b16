"""The entry points in plain torch: same rounding of the inputs, accumulation as wide as can be.

What the CPU runs, and what the GPU kernels are held against.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from runner.backend.entry_points import Fp8
from runner.backend.quantise import dequantise_blocks, dequantise_tokens, widen
from runner.backend.scale_check import (
    check_entry_scales,
    check_gemm_scales,
    check_page_scales,
    rows_in_use,
)

PAGE = 64
"""Entries of one page of the index cache."""


class ReferenceEntryPoints:
    """Implements :class:`runner.backend.entry_points.EntryPoints` on any device.

    Args:
        sanity_check: look at every scale of an FP8 operand first; see
            :mod:`runner.backend.scale_check`.
    """

    def __init__(self, *, sanity_check: bool = False) -> None:
        self._sanity_check = sanity_check

    def configure_deep_gemm_num_sms(self, num_sms: int | None) -> AbstractContextManager[None]:
        """Nothing here has SMs."""
        return nullcontext()

    def gemm_nt_f8f8bf16(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("gemm_nt_f8f8bf16", lhs, rhs)
        out.copy_(_activations(*lhs) @ _weights(*rhs).mT)

    def grouped_gemm_nt_f8f8bf16_contig(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, m_indices: torch.Tensor
    ) -> None:
        """See the protocol; padding rows are left alone."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_contig", lhs, rhs, m_indices >= 0)
        for group in torch.unique(m_indices[m_indices >= 0]).tolist():
            rows = m_indices == group
            x = _activations(lhs[0][rows], lhs[1][rows])
            weight = _weights(rhs[0][group], rhs[1][group])
            out[rows] = (x @ weight.mT).to(out.dtype)

    def grouped_gemm_nt_f8f8bf16_masked(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int
    ) -> None:
        """See the protocol; rows out of use are left alone."""
        if lhs[0].shape[1] == 0 or expected_m == 0:
            return
        if self._sanity_check:
            used = rows_in_use(masked_m, lhs[0].shape[1])
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_masked", lhs, rhs, used)
        for group, rows in enumerate(masked_m.tolist()):
            x = _activations(lhs[0][group, :rows], lhs[1][group, :rows])
            weight = _weights(rhs[0][group], rhs[1][group])
            out[group, :rows] = (x @ weight.mT).to(out.dtype)

    def gemm_nt_bf16bf16f32(self, lhs: torch.Tensor, rhs: torch.Tensor, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs.shape[0] == 0:
            return
        out.copy_(widen(lhs) @ widen(rhs).mT)

    def tf32_hc_prenorm_gemm(
        self,
        x: torch.Tensor,
        fn: torch.Tensor,
        out: torch.Tensor,
        sqrsum: torch.Tensor,
        n_splits: int,
    ) -> None:
        """See the protocol; the whole sum is in the first split."""
        if x.shape[0] == 0:
            return
        out.zero_()
        sqrsum.zero_()
        out[0] = widen(x) @ widen(fn).mT
        sqrsum[0] = widen(x).square().sum(-1)

    def fp8_einsum_bhr_hdr_bhd(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("fp8_einsum_bhr_hdr_bhd", lhs, rhs)
        x, weight = _activations(*lhs), _weights(*rhs)
        out.copy_(torch.einsum("bhr,hdr->bhd", x, weight))

    def get_paged_mqa_logits_metadata(
        self, context_lens: torch.Tensor, block_kv: int, num_sms: int
    ) -> torch.Tensor:
        """See the protocol; the reference needs no work split."""
        return torch.zeros((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)

    def fp8_paged_mqa_logits(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        schedule_meta: torch.Tensor,
        max_context_len: int,
    ) -> torch.Tensor:
        """See the protocol."""
        if q.shape[0] == 0:
            return weights.new_empty((0, max_context_len), dtype=torch.float32)
        if self._sanity_check:
            check_page_scales("fp8_paged_mqa_logits", kv_cache, context_lens, block_table)
        pages = widen(unpack_pages(kv_cache))[block_table.long()]
        entries = pages.flatten(1, 2)[:, :max_context_len]
        dots = torch.einsum("rhd,red->rhe", widen(q.squeeze(1).float()), entries).relu()
        return torch.einsum("rh,rhe->re", widen(weights), dots).float()

    def fp8_mqa_logits(
        self,
        q: torch.Tensor,
        kv: Fp8,
        weights: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        """See the protocol; every row starts at entry 0 here."""
        if q.shape[0] == 0:
            return weights.new_empty((0, max_seqlen_k), dtype=torch.float32)
        if self._sanity_check:
            check_entry_scales("fp8_mqa_logits", kv, ks, ke)
        entries = widen(kv[0].float() * kv[1].unsqueeze(-1))
        dots = torch.einsum("rhd,ed->rhe", widen(q.float()), entries).relu()
        logits = torch.einsum("rh,rhe->re", widen(weights), dots).float()
        return torch.nn.functional.pad(logits, (0, max_seqlen_k - logits.shape[1]))


def _activations(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return widen(dequantise_tokens(values, scales))


def _weights(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return widen(dequantise_blocks(values, scales))


def pack_pages(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Index cache pages from e4m3 [entries, dim] and fp32 [entries]; entries fill whole pages.

    Returns:
        [pages, 64, 1, dim + 4] uint8: each page holds its values, then its scales.
    """
    dim = values.shape[-1]
    data = values.view(torch.uint8).reshape(-1, PAGE * dim)
    tail = scales.contiguous().view(torch.uint8).reshape(-1, PAGE * 4)
    return torch.cat([data, tail], 1).view(-1, PAGE, 1, dim + 4)


def unpack_pages(pages: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_pages`, dequantised: fp32 [pages, 64, dim]."""
    dim = pages.shape[-1] - 4
    flat = pages.reshape(-1, PAGE * (dim + 4))
    values = flat[:, : PAGE * dim].contiguous().view(torch.float8_e4m3fn).view(-1, PAGE, dim)
    scales = flat[:, PAGE * dim :].contiguous().view(torch.float32)
    return values.float() * scales.unsqueeze(-1)
