"""DeepGEMM's entry points, named as in SGLang's ``deep_gemm_wrapper``.

FP8 operands are pairs (e4m3 values, fp32 scales): activations have one scale per row and 128
columns, weights one per 128 x 128 block. ``out`` is written in place. A call without rows (M = 0)
returns at once: nothing is checked, compiled or launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import torch
import torch.utils.dlpack
from torch import Tensor

from runner.deep_gemm_wrapper.reference import Fp8
from runner.deep_gemm_wrapper.scale_check import (
    check_entry_scales,
    check_gemm_scales,
    check_page_scales,
)
from runner.kernels.types import DeepGemmKernelType as T

LIBRARY_NAMES = {
    T.GEMM_NT_F8F8BF16: ("fp8_gemm_nt",),
    T.GEMM_NT_F8F8BF16_BLOCK32: ("fp8_gemm_nt",),
    T.GEMM_NT_F8F4BF16: ("fp8_fp4_gemm_nt",),
    T.GEMM_NT_BF16BF16F32: ("bf16_gemm_nt",),
    T.GEMM_NT_BF16BF16BF16: ("bf16_gemm_nt",),
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: ("m_grouped_fp8_gemm_nt_contiguous",),
    T.GROUPED_GEMM_NT_F8F4BF16_CONTIG: ("m_grouped_fp8_fp4_gemm_nt_contiguous",),
    T.GROUPED_GEMM_NT_BF16_CONTIG: ("m_grouped_bf16_gemm_nt_contiguous",),
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: (
        "m_grouped_fp8_gemm_nt_masked",
        "fp8_m_grouped_gemm_nt_masked",
    ),
    T.GROUPED_GEMM_NT_F8F4BF16_MASKED: (
        "fp8_m_grouped_gemm_nt_masked",
        "m_grouped_fp8_fp4_gemm_nt_masked",
    ),
    T.GROUPED_GEMM_NT_BF16_MASKED: ("m_grouped_bf16_gemm_nt_masked",),
}
"""The library's function for each plain GEMM; of several names the first that it has."""


class LibraryFunction(Protocol):
    """One of the library's functions."""

    def __call__(self, *args: object, **options: object) -> object:
        """Its own arguments."""


def library_function(library: ModuleType, kind: T) -> LibraryFunction:
    """The function of :data:`LIBRARY_NAMES` that this release of the library has."""
    names = LIBRARY_NAMES[kind]
    name = next((name for name in names if hasattr(library, name)), names[-1])
    found: LibraryFunction = getattr(library, name)
    return found


class DeepGemmWrapper:
    """Entry points on one library, whose releases name their functions differently.

    The library brings row-major scales of activations into the layout that its kernels read, with a
    transpose kernel of its own.

    Args:
        library: the imported ``deep_gemm``, or :mod:`runner.deep_gemm_wrapper.reference`.
        sanity_check: check every scale of an FP8 operand before it is used; slow, see
            :mod:`runner.deep_gemm_wrapper.scale_check`.
    """

    def __init__(self, library: ModuleType, *, sanity_check: bool = False) -> None:
        self.library, self._sanity_check = library, sanity_check

    @contextmanager
    def configure_deep_gemm_num_sms(self, num_sms: int | None) -> Iterator[None]:
        """Limit the SMs that GEMMs inside the block use; None changes nothing."""
        if num_sms is None:
            yield
            return
        before = self.library.get_num_sms()
        self.library.set_num_sms(num_sms)
        try:
            yield
        finally:
            self.library.set_num_sms(before)

    # -- FP8 GEMMs --------------------------------------------------------------------------------

    def gemm_nt_f8f8bf16(self, lhs: Fp8, rhs: Fp8, out: Tensor) -> None:
        """out [m, n] bf16 = lhs [m, k] @ rhs [n, k].T."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("gemm_nt_f8f8bf16", lhs, rhs)
        self.library.fp8_gemm_nt(lhs, rhs, out)

    def grouped_gemm_nt_f8f8bf16_contig(
        self, lhs: Fp8, rhs: Fp8, out: Tensor, m_indices: Tensor
    ) -> None:
        """out [m, n] bf16 by each row's group ``m_indices`` [m] int32; -1 rows are undefined."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_contig", lhs, rhs, m_indices >= 0)
        self.library.m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)

    def grouped_gemm_nt_f8f8bf16_masked(
        self, lhs: Fp8, rhs: Fp8, out: Tensor, masked_m: Tensor, expected_m: int
    ) -> None:
        """out [g, m, n] bf16; of group i the first ``masked_m[i]`` rows are defined.

        ``expected_m`` is the M that a kernel is chosen for; 0 says that no group has a row.
        """
        rows = lhs[0].shape[1]
        if rows == 0 or expected_m == 0:
            return
        if self._sanity_check:
            used = torch.arange(rows, device=masked_m.device) < masked_m.unsqueeze(1)
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_masked", lhs, rhs, used)
        masked = library_function(self.library, T.GROUPED_GEMM_NT_F8F8BF16_MASKED)
        masked(lhs, rhs, out, masked_m, expected_m)

    def fp8_einsum_bhr_hdr_bhd(self, lhs: Fp8, rhs: Fp8, out: Tensor) -> None:
        """out [b, h, d] bf16 from lhs [b, h, r] and rhs [h, d, r]."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("fp8_einsum_bhr_hdr_bhd", lhs, rhs)
        self.library.fp8_einsum("bhr,hdr->bhd", lhs, rhs, out)

    # -- bf16 and TF32 GEMMs ----------------------------------------------------------------------

    def gemm_nt_bf16bf16f32(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """out [m, n] fp32 = lhs [m, k] bf16 @ rhs [n, k] bf16 .T."""
        if lhs.shape[0]:
            self.library.bf16_gemm_nt(lhs, rhs, out)

    def tf32_hc_prenorm_gemm(
        self, x: Tensor, fn: Tensor, out: Tensor, sqrsum: Tensor, n_splits: int
    ) -> None:
        """out [splits, m, n] fp32 sums to x [m, k] bf16 @ fn [n, k] fp32 .T; sqrsum likewise."""
        if x.shape[0]:
            self.library.tf32_hc_prenorm_gemm(x, fn, out, sqrsum, num_splits=n_splits)

    # -- logits of the indexer --------------------------------------------------------------------

    def get_paged_mqa_logits_metadata(
        self, context_lens: Tensor, block_kv: int, num_sms: int
    ) -> Tensor:
        """[num_sms + 1, 2] int32 from lengths [rows, 1] int32."""
        if context_lens.shape[0] == 0:
            return context_lens.new_zeros((num_sms + 1, 2), dtype=torch.int32)
        made = self.library.get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms)
        return _as_tensor(made, context_lens)

    def fp8_paged_mqa_logits(
        self,
        q: Tensor,
        kv_cache: Tensor,
        weights: Tensor,
        context_lens: Tensor,
        block_table: Tensor,
        schedule_meta: Tensor,
        max_context_len: int,
    ) -> Tensor:
        """Scores [rows, max_context_len] fp32; columns past a row's length are undefined.

        q [rows, 1, heads, dim] e4m3; kv_cache [pages, block_kv, 1, dim + 4] uint8, each page its
        values and then its fp32 scales; weights [rows, heads] fp32; block_table [rows, pages].
        """
        if q.shape[0] == 0:
            return weights.new_empty((0, max_context_len), dtype=torch.float32)
        if self._sanity_check:
            check_page_scales("fp8_paged_mqa_logits", kv_cache, context_lens, block_table)
        rest = (kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
        if hasattr(self.library, "fp8_paged_mqa_logits"):
            made = self.library.fp8_paged_mqa_logits(q, *rest)
        else:
            made = self.library.fp8_fp4_paged_mqa_logits((q, None), *rest)
        return _as_tensor(made, q)

    def fp8_mqa_logits(
        self, q: Tensor, kv: Fp8, weights: Tensor, ks: Tensor, ke: Tensor, max_seqlen_k: int
    ) -> Tensor:
        """Scores [rows, max_seqlen_k] fp32 of q [rows, heads, dim] against kv [ks, ke)."""
        if q.shape[0] == 0:
            return weights.new_empty((0, max_seqlen_k), dtype=torch.float32)
        if self._sanity_check:
            check_entry_scales("fp8_mqa_logits", kv, ks, ke)
        if hasattr(self.library, "fp8_mqa_logits"):
            made = self.library.fp8_mqa_logits(
                q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=max_seqlen_k
            )
        else:
            made = self.library.fp8_fp4_mqa_logits((q, None), kv, weights, ks, ke, max_seqlen_k)
        return _as_tensor(made, q)


def _as_tensor(made: object, like: Tensor) -> Tensor:
    """The library's result as a torch tensor; some builds return DLPack objects."""
    if isinstance(made, Tensor):
        return made
    return torch.utils.dlpack.from_dlpack(made).to(like.device)
