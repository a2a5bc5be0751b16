"""The check behind ``SGLANG_DEEPGEMM_SANITY_CHECK``: are the scales of FP8 operands usable?

SGLang checks scales on SM100, where they must be powers of two (UE8M0). On SM90 they are plain
fp32. There the check finds element types and layouts that kernels would misread, and scales that
are not positive numbers, after an overflow before quantisation or from memory never written.

A check reads scales back from the device, so it slows a run down and cannot be captured in a CUDA
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runner.config.model import FP8_BLOCK
from runner.deep_gemm_wrapper.reference import Fp8
from runner.kernels.heuristics_sm90 import ceil_div


class ScaleError(ValueError):
    """Scales that quantising finite numbers cannot produce."""


def check_scales(
    entry_point: str,
    operand: str,
    scales: Tensor,
    shape: tuple[int, ...],
    used: Tensor | None = None,
) -> None:
    """Raise unless the scales are fp32, of the right shape, finite and above 0.

    Args:
        entry_point: name of the function called.
        operand: the function's operand that has these scales.
        scales: the scales, with any number of dimensions.
        shape: the shape that the scales must have.
        used: bool over the leading dimensions of ``scales``; where False, scales may be anything.

    Raises:
        ScaleError: names the entry point, the operand, and the index of the first bad scale.
    """
    whose = f"{entry_point}: the scales of {operand}"
    if scales.dtype != torch.float32:
        raise ScaleError(f"{whose} are {scales.dtype}, must be {torch.float32}")
    if tuple(scales.shape) != shape:
        raise ScaleError(f"{whose} have shape {list(scales.shape)}, must have {list(shape)}")
    bad = ~(scales.isfinite() & (scales > 0))
    if used is not None:
        bad &= used.view(*used.shape, *(1,) * (scales.dim() - used.dim()))
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ScaleError(
            f"{whose} must be finite and above 0: the one at {list(at)} is {scales[at].item()}"
        )


def check_gemm_scales(entry_point: str, lhs: Fp8, rhs: Fp8, used: Tensor | None = None) -> None:
    """:func:`check_scales` of a GEMM's operands; of ``lhs``, only of rows that are ``used``."""
    *rows, k = lhs[0].shape
    check_scales(entry_point, "lhs", lhs[1], (*rows, ceil_div(k, FP8_BLOCK)), used)
    *groups, n, k = rhs[0].shape
    blocks = (ceil_div(n, FP8_BLOCK), ceil_div(k, FP8_BLOCK))
    check_scales(entry_point, "rhs", rhs[1], (*groups, *blocks))


def check_entry_scales(entry_point: str, kv: Fp8, starts: Tensor, ends: Tensor) -> None:
    """:func:`check_scales` of index keys; row r reads entries ``starts[r]`` to ``ends[r]`` - 1."""
    entries = torch.arange(kv[0].shape[0], device=starts.device)
    read = (entries >= starts.unsqueeze(1)) & (entries < ends.unsqueeze(1))
    check_scales(entry_point, "kv", kv[1], tuple(entries.shape), read.any(0))


def check_page_scales(
    entry_point: str, kv_cache: Tensor, context_lens: Tensor, block_table: Tensor
) -> None:
    """:func:`check_scales` of index keys in pages; only of the entries that each row reads.

    An error's index is [row, entry of that row]. The table may have any values past a row's length.
    """
    pages, block_kv = kv_cache.shape[:2]
    tails = kv_cache.reshape(pages, -1)[:, -4 * block_kv :].contiguous().view(torch.float32)
    scales = tails[block_table.long().clamp(0, pages - 1)].flatten(1)
    used = torch.arange(scales.shape[1], device=scales.device) < context_lens
    check_scales(entry_point, "kv_cache", scales, tuple(scales.shape), used)
