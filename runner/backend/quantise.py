"""FP8 block scaling in torch: e4m3 values with fp32 scales, as the GEMMs take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.config.model import FP8_BLOCK

E4M3_MAX = 448.0
_MIN_AMAX = 1e-4
"""Smallest magnitude a scale is made for, as in DeepGEMM's own casts."""


@dataclass(frozen=True)
class Fp8Weight:
    """``data`` [n, k] or [groups, n, k] e4m3; ``scales`` one fp32 per 128 x 128 block."""

    data: torch.Tensor
    scales: torch.Tensor

    @property
    def n(self) -> int:
        """Output features."""
        return self.data.shape[-2]

    @property
    def k(self) -> int:
        """Input features."""
        return self.data.shape[-1]

    @property
    def groups(self) -> int:
        """Number of groups, 1 for a dense weight."""
        return self.data.shape[0] if self.data.dim() == 3 else 1

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, scales) as the entry points take them."""
        return self.data, self.scales


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the element type of intermediate math: fp64 on a CPU, fp32 on a GPU.

    In fp64 the order of a sum no longer shows after rounding to bf16, so a CPU gives the same
    numbers for every split of a model over ranks. In fp32 it would show now and then, and FP8
    rounding would make much of it.
    """
    return x.double() if x.device.type == "cpu" else x.float()


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> e4m3 [..., K] and row-major fp32 scales [..., K / 128]."""
    parts = [_quantise_rows(rows) for rows in in_slabs(x.reshape(-1, x.shape[-1]))]
    values = torch.cat([part[0].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    scales = torch.cat([part[1] for part in parts])
    return values.view(x.shape), scales.view(*x.shape[:-1], x.shape[-1] // FP8_BLOCK)


def in_slabs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of [R, N] in pieces, so that wide temporaries of a large tensor stay small."""
    slabs: tuple[torch.Tensor, ...] = x.split(max(1, _SLAB_ELEMENTS // x.shape[1]))
    return slabs


_SLAB_ELEMENTS = 1 << 26


def _quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().unflatten(-1, (-1, FP8_BLOCK))
    scales = groups.abs().amax(-1).clamp_min(_MIN_AMAX) / E4M3_MAX
    values = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
    return values, scales


def quantise_blocks(w: torch.Tensor) -> Fp8Weight:
    """[..., N, K] -> e4m3 with one scale per 128 x 128 block; N may end in a partial block."""
    n = w.shape[-2]
    padded = torch.nn.functional.pad(w.float(), (0, 0, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scales = blocks.abs().amax((-3, -1)).clamp_min(_MIN_AMAX) / E4M3_MAX
    scaled = blocks / scales.unsqueeze(-2).unsqueeze(-1)
    values = scaled.flatten(-4, -3).flatten(-2)[..., :n, :]
    return Fp8Weight(values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous())


def dequantise_tokens(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`quantise_tokens`, fp32."""
    groups: torch.Tensor = values.float().unflatten(-1, (-1, FP8_BLOCK)) * scales.unsqueeze(-1)
    return groups.flatten(-2)


def dequantise_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`quantise_blocks`, fp32."""
    n, k = values.shape[-2:]
    rows = scales.repeat_interleave(FP8_BLOCK, -2)[..., :n, :]
    dequantised: torch.Tensor = values.float() * rows.repeat_interleave(FP8_BLOCK, -1)[..., :k]
    return dequantised
