"""DeepGEMM's entry points, named as in SGLang's ``deep_gemm_wrapper``.

FP8 operands are pairs (e4m3 values, fp32 scales): activations have one scale per row and 128
columns, weights one per 128 x 128 block. ``out`` is written in place. A call with M = 0 returns at
once and checks, compiles and launches nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from runner.errors import UserError
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
"""Names of the library's function for each plain GEMM; the first one that exists is used."""


class LibraryFunction(Protocol):
    """One of the library's functions, with arguments of its own."""

    def __call__(self, *args: object, **options: object) -> object: ...


def library_function(library: ModuleType, kind: T) -> LibraryFunction:
    """The function of :data:`LIBRARY_NAMES` that this release of the library has."""
    names = LIBRARY_NAMES[kind]
    name = next((name for name in names if hasattr(library, name)), names[-1])
    found: LibraryFunction = getattr(library, name)
    return found


class DeepGemmWrapper:
    """SGLang's entry points on one library, whose releases name their functions differently.

    Activation scales are row-major; the library brings them into its kernels' layout with its own
    transpose kernel.

    Args:
        library: the imported ``deep_gemm``, or :mod:`runner.deep_gemm_wrapper.reference`.
        sanity_check: check all scales of FP8 operands before each call; slow, see
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
        """out [m, n] bf16; ``m_indices`` [m] int32 is each row's group, or -1: row undefined."""
        if lhs[0].shape[0] == 0:
            return
        if self._sanity_check:
            check_gemm_scales("grouped_gemm_nt_f8f8bf16_contig", lhs, rhs, m_indices >= 0)
        self.library.m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)

    def grouped_gemm_nt_f8f8bf16_masked(
        self, lhs: Fp8, rhs: Fp8, out: Tensor, masked_m: Tensor, expected_m: int
    ) -> None:
        """out [g, m, n] bf16; only the first ``masked_m[i]`` rows of group i are defined.

        The library chooses the kernel for ``expected_m``; 0 means that no group has a row.
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
        """The kernel's work split [num_sms + 1, 2] int32, from lengths [rows, 1] int32."""
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

        q [rows, 1, heads, dim] e4m3; kv_cache [pages, block_kv, 1, dim + 4] uint8, each page with
        values, then fp32 scales; weights [rows, heads] fp32; block_table [rows, pages].
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


# -- importing the library ------------------------------------------------------------------------


def check_capability(capability: tuple[int, int]) -> None:
    """Raise UserError if this GPU is not supported."""
    if capability[0] != 9:
        raise UserError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}: only 9.x (Hopper) "
            "is supported; use --device cpu"
        )


def import_library(root: Path) -> ModuleType:
    """Import the ``deep_gemm`` package in the folder ``root``, which may be vLLM's copy.

    Raises:
        UserError: Python imports another package of that name.
    """
    sys.path.insert(0, str(root.parent))
    try:
        found = importlib.import_module("deep_gemm")
    finally:
        sys.path.remove(str(root.parent))
    if not Path(found.__file__ or "").parent.samefile(root):
        raise UserError(
            f"{root} cannot be imported, because Python imports {found.__file__} instead: the "
            "library's folder must be named deep_gemm"
        )
    return found


def import_deep_gemm(root: Path, *, cache_dirs: str, nvcc: Path, pdl: bool) -> ModuleType:
    """Import the library in ``root``; it caches in ``cache_dirs`` and compiles with ``nvcc``.

    The library reads these settings from its process's environment at its first compile, so this
    sets three variables there and no others.
    """
    os.environ["DG_JIT_CACHE_DIR"] = cache_dirs
    os.environ["DG_JIT_NVCC_COMPILER"] = str(nvcc)
    os.environ["DG_JIT_USE_NVRTC"] = "0"
    deep_gemm = import_library(root)
    if pdl and hasattr(deep_gemm, "set_pdl"):
        deep_gemm.set_pdl(True)
    return deep_gemm
