"""FP8 block scaling in torch: e4m3 values with fp32 scales, the form that the GEMMs take."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.config.model import FP8_BLOCK

E4M3_MAX = 448.0
_MIN_AMAX = 1e-4
"""Smallest magnitude for which a scale is computed, as in DeepGEMM's own casts."""

PAGE = 64
"""Entries per page of the index cache."""

_SLAB_ELEMENTS = 1 << 26


def widen(x: Tensor) -> Tensor:
    """``x`` in the element type of intermediate math: fp64 on a CPU, fp32 on a GPU.

    In fp64 the order of a sum makes no difference after rounding to bf16, so a CPU computes the
    same numbers however a model is split over ranks. In fp32 there would be occasional differences,
    and FP8 rounding would amplify them.
    """
    return x.double() if x.device.type == "cpu" else x.float()


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> e4m3 [..., K] and row-major fp32 scales [..., K / 128]."""
    parts = [_quantise_rows(rows) for rows in in_slabs(x.reshape(-1, x.shape[-1]))]
    values = torch.cat([part[0].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    scales = torch.cat([part[1] for part in parts])
    return values.view(x.shape), scales.view(*x.shape[:-1], x.shape[-1] // FP8_BLOCK)


def in_slabs(x: Tensor) -> tuple[Tensor, ...]:
    """Split the rows of [R, N] into pieces, so that wide temporaries stay small."""
    slabs: tuple[Tensor, ...] = x.split(max(1, _SLAB_ELEMENTS // x.shape[1]))
    return slabs


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, FP8_BLOCK))
    scales = groups.abs().amax(-1).clamp_min(_MIN_AMAX) / E4M3_MAX
    values = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
    return values, scales


def quantise_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N, K] -> e4m3 with one scale per 128 x 128 block; N may end in a partial block."""
    n = w.shape[-2]
    padded = torch.nn.functional.pad(w.float(), (0, 0, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scales = blocks.abs().amax((-3, -1)).clamp_min(_MIN_AMAX) / E4M3_MAX
    scaled = blocks / scales.unsqueeze(-2).unsqueeze(-1)
    values = scaled.flatten(-4, -3).flatten(-2)[..., :n, :]
    return values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous()


def dequantise_tokens(values: Tensor, scales: Tensor) -> Tensor:
    """Inverse of :func:`quantise_tokens`, fp32."""
    groups: Tensor = values.float().unflatten(-1, (-1, FP8_BLOCK)) * scales.unsqueeze(-1)
    return groups.flatten(-2)


def dequantise_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """Inverse of :func:`quantise_blocks`, fp32."""
    n, k = values.shape[-2:]
    rows = scales.repeat_interleave(FP8_BLOCK, -2)[..., :n, :]
    dequantised: Tensor = values.float() * rows.repeat_interleave(FP8_BLOCK, -1)[..., :k]
    return dequantised


def pack_pages(values: Tensor, scales: Tensor) -> Tensor:
    """Pack e4m3 [entries, dim] and fp32 [entries] into full pages of the index cache.

    Returns:
        [pages, 64, 1, dim + 4] uint8; each page has values, then scales.
    """
    dim = values.shape[-1]
    data = values.view(torch.uint8).reshape(-1, PAGE * dim)
    tail = scales.contiguous().view(torch.uint8).reshape(-1, PAGE * 4)
    return torch.cat([data, tail], 1).view(-1, PAGE, 1, dim + 4)


def unpack_pages(pages: Tensor) -> Tensor:
    """Inverse of :func:`pack_pages`, dequantised: fp32 [pages, 64, dim]."""
    dim = pages.shape[-1] - 4
    flat = pages.reshape(-1, PAGE * (dim + 4))
    values = flat[:, : PAGE * dim].contiguous().view(torch.float8_e4m3fn).view(-1, PAGE, dim)
    scales = flat[:, PAGE * dim :].contiguous().view(torch.float32)
    return values.float() * scales.unsqueeze(-1)
