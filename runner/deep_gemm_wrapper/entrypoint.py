"""Entry points on the real library, named as in SGLang; see ``EntryPoints`` for their contracts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.utils.dlpack

from runner.backend.entry_points import Fp8
from runner.backend.scale_check import (
    check_entry_scales,
    check_gemm_scales,
    check_page_scales,
    rows_in_use,
)


class DeepGemmWrapper:
    """Implements :class:`runner.backend.entry_points.EntryPoints` with ``deep_gemm``.

    FP8 activations come with row-major scales; the library brings them into the layout that its
    kernels read, with a transpose kernel of its own.

    Args:
        deep_gemm: the library.
        sanity_check: look at every scale of an FP8 operand before it is used; slow, see
            :mod:`runner.backend.scale_check`.
    """

    def __init__(self, deep_gemm: ModuleType, *, sanity_check: bool = False) -> None:
        self._lib, self._sanity_check = deep_gemm, sanity_check

    @property
    def library(self) -> ModuleType:
        """The library behind the entry points."""
        return self._lib

    def gemm_nt_f8f8bf16(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("gemm_nt_f8f8bf16", lhs, rhs)
        self._lib.fp8_gemm_nt(lhs, rhs, out)

    def grouped_gemm_nt_f8f8bf16_contig(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, m_indices: torch.Tensor
    ) -> None:
        """See the protocol."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_contig", lhs, rhs, m_indices >= 0)
        self._lib.m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)

    def grouped_gemm_nt_f8f8bf16_masked(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int
    ) -> None:
        """See the protocol."""
        rows = lhs[0].shape[1]
        if rows == 0 or expected_m == 0:
            return
        if self._sanity_check:
            used = rows_in_use(masked_m, rows)
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_masked", lhs, rhs, used)
        masked = getattr(self._lib, "m_grouped_fp8_gemm_nt_masked", None)
        masked = masked or self._lib.fp8_m_grouped_gemm_nt_masked
        masked(lhs, rhs, out, masked_m, expected_m)

    def gemm_nt_bf16bf16f32(self, lhs: torch.Tensor, rhs: torch.Tensor, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs.shape[0] == 0:
            return
        self._lib.bf16_gemm_nt(lhs, rhs, out)

    def gemm_nt_bf16bf16bf16(self, lhs: torch.Tensor, rhs: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` [m, n] bf16 = ``lhs`` [m, k] bf16 @ ``rhs`` [n, k].T bf16."""
        if lhs.shape[0] == 0:
            return
        self._lib.bf16_gemm_nt(lhs, rhs, out)

    def grouped_gemm_nt_bf16_contig(
        self, lhs: torch.Tensor, rhs: torch.Tensor, out: torch.Tensor, m_indices: torch.Tensor
    ) -> None:
        """As ``grouped_gemm_nt_f8f8bf16_contig`` with bf16 operands and no scales."""
        if lhs.shape[0] == 0:
            return
        self._lib.m_grouped_bf16_gemm_nt_contiguous(lhs, rhs, out, m_indices)

    def grouped_gemm_nt_bf16_masked(
        self,
        lhs: torch.Tensor,
        rhs: torch.Tensor,
        out: torch.Tensor,
        masked_m: torch.Tensor,
        expected_m: int,
    ) -> None:
        """As ``grouped_gemm_nt_f8f8bf16_masked`` with bf16 operands and no scales."""
        if lhs.shape[1] == 0 or expected_m == 0:
            return
        self._lib.m_grouped_bf16_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)

    def tf32_hc_prenorm_gemm(
        self,
        x: torch.Tensor,
        fn: torch.Tensor,
        out: torch.Tensor,
        sqrsum: torch.Tensor,
        n_splits: int,
    ) -> None:
        """See the protocol."""
        if x.shape[0] == 0:
            return
        self._lib.tf32_hc_prenorm_gemm(x, fn, out, sqrsum, num_splits=n_splits)

    def fp8_einsum_bhr_hdr_bhd(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """See the protocol."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("fp8_einsum_bhr_hdr_bhd", lhs, rhs)
        self._lib.fp8_einsum("bhr,hdr->bhd", lhs, rhs, out)

    def get_paged_mqa_logits_metadata(
        self, context_lens: torch.Tensor, block_kv: int, num_sms: int
    ) -> torch.Tensor:
        """See the protocol."""
        rows = context_lens.shape[0]
        if rows == 0:
            return context_lens.new_zeros((num_sms + 1, 2), dtype=torch.int32)
        made = self._lib.get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms)
        return _owned(made, context_lens)

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
        rest = (kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
        if hasattr(self._lib, "fp8_paged_mqa_logits"):
            made = self._lib.fp8_paged_mqa_logits(q, *rest)
        else:
            made = self._lib.fp8_fp4_paged_mqa_logits((q, None), *rest)
        return _owned(made, q)

    def fp8_mqa_logits(
        self,
        q: torch.Tensor,
        kv: Fp8,
        weights: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        """See the protocol."""
        if q.shape[0] == 0:
            return weights.new_empty((0, max_seqlen_k), dtype=torch.float32)
        if self._sanity_check:
            check_entry_scales("fp8_mqa_logits", kv, ks, ke)
        if hasattr(self._lib, "fp8_mqa_logits"):
            made = self._lib.fp8_mqa_logits(
                q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=max_seqlen_k
            )
        else:
            made = self._lib.fp8_fp4_mqa_logits((q, None), kv, weights, ks, ke, max_seqlen_k)
        return _owned(made, q)

    @contextmanager
    def configure_deep_gemm_num_sms(self, num_sms: int | None) -> Iterator[None]:
        """Limit the SMs that GEMMs inside the block use; None changes nothing."""
        if num_sms is None:
            yield
            return
        before = self._lib.get_num_sms()
        self._lib.set_num_sms(num_sms)
        try:
            yield
        finally:
            self._lib.set_num_sms(before)


def _owned(made: object, like: torch.Tensor) -> torch.Tensor:
    """The library's result as a torch tensor; some builds hand back DLPack objects."""
    if isinstance(made, torch.Tensor):
        return made
    return torch.utils.dlpack.from_dlpack(made).to(like.device)
