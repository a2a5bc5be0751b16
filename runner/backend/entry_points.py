"""The DeepGEMM wrapper's entry points, as both the CUDA wrapper and the reference offer them.

FP8 operands are pairs (e4m3 values, fp32 scales): activations have one scale per row and 128
columns, weights one per 128 x 128 block. ``out`` is written in place. A call without rows (M = 0)
returns at once: nothing is checked, compiled or launched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

Fp8 = tuple[torch.Tensor, torch.Tensor]


class EntryPoints(Protocol):
    """Names and arguments as in SGLang's ``deep_gemm_wrapper``."""

    def configure_deep_gemm_num_sms(self, num_sms: int | None) -> AbstractContextManager[None]:
        """Limit the SMs that GEMMs inside the block use; None changes nothing."""

    def gemm_nt_f8f8bf16(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """out [m, n] bf16 = lhs [m, k] @ rhs [n, k].T."""

    def grouped_gemm_nt_f8f8bf16_contig(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, m_indices: torch.Tensor
    ) -> None:
        """out [m, n] bf16 by each row's group ``m_indices`` [m] int32; -1 rows are undefined."""

    def grouped_gemm_nt_f8f8bf16_masked(
        self, lhs: Fp8, rhs: Fp8, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int
    ) -> None:
        """out [g, m, n] bf16; of group i the first ``masked_m[i]`` rows are defined.

        ``expected_m`` is the M that a kernel is chosen for; 0 says that no group has a row.
        """

    def gemm_nt_bf16bf16f32(self, lhs: torch.Tensor, rhs: torch.Tensor, out: torch.Tensor) -> None:
        """out [m, n] fp32 = lhs [m, k] bf16 @ rhs [n, k] bf16 .T."""

    def tf32_hc_prenorm_gemm(
        self,
        x: torch.Tensor,
        fn: torch.Tensor,
        out: torch.Tensor,
        sqrsum: torch.Tensor,
        n_splits: int,
    ) -> None:
        """out [splits, m, n] fp32 sums to x [m, k] bf16 @ fn [n, k] fp32 .T; sqrsum likewise."""

    def fp8_einsum_bhr_hdr_bhd(self, lhs: Fp8, rhs: Fp8, out: torch.Tensor) -> None:
        """out [b, h, d] bf16 from lhs [b, h, r] and rhs [h, d, r]."""

    def get_paged_mqa_logits_metadata(
        self, context_lens: torch.Tensor, block_kv: int, num_sms: int
    ) -> torch.Tensor:
        """[num_sms + 1, 2] int32 from lengths [rows, 1] int32."""

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
        """Scores [rows, max_context_len] fp32; columns past a row's length are undefined.

        q [rows, 1, heads, dim] e4m3; kv_cache [pages, block_kv, 1, dim + 4] uint8, each page its
        values and then its fp32 scales; weights [rows, heads] fp32; block_table [rows, pages].
        """

    def fp8_mqa_logits(
        self,
        q: torch.Tensor,
        kv: Fp8,
        weights: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        """Scores [rows, max_seqlen_k] fp32 of q [rows, heads, dim] against kv [ks, ke)."""
