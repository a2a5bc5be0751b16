"""Deterministic weights in torch: each number depends on (seed, layer, name, global index) only."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch

from runner.backend.quantise import Fp8Weight, quantise_blocks
from runner.backend.weights import WeightRequest

_MASK32 = 0xFFFFFFFF
_CHUNK = 1 << 24
"""Elements made at a time: bounds the int64 temporaries."""


class TorchWeights:
    """Makes weights on a device.

    Args:
        seed: any integer; another seed, another model.
        device: where the weights live.
        share: give every request of one kind and shape the same buffer. A warm-up of a full-size
            model needs shapes, not a hundred layers of different numbers.
    """

    def __init__(self, seed: int, device: torch.device, *, share: bool = False) -> None:
        self._seed, self._device, self._share = seed, device, share
        self._shared: dict[tuple[Any, ...], Any] = {}

    def make(self, request: WeightRequest) -> Any:
        """The local part: :class:`Fp8Weight`, or a bf16, fp32 or int64 tensor."""
        key = (request.kind, request.view, request.high)
        if self._share and key in self._shared:
            return self._shared[key]
        made = self._make(request)
        if self._share:
            self._shared[key] = made
        return made

    def _make(self, request: WeightRequest) -> Any:
        salt = _salt(self._seed, request.layer, request.name)
        if request.kind == "ids":
            return self._ids(request, salt)
        slabs = (self._slab(request, salt, first, last) for first, last in _slabs(request.slices))
        if request.kind != "fp8":
            return torch.cat([w.to(_DTYPES[request.kind]) for w in slabs]).view(request.view)
        if len(request.view) == 2 or len(_slabs(request.slices)) == 1:
            return quantise_blocks(torch.cat(list(slabs)).view(request.view))
        return _quantise_groups(slabs, request.view)

    def _slab(self, request: WeightRequest, salt: int, first: int, last: int) -> torch.Tensor:
        slices = ((first, last), *request.slices[1:])
        index = _global_index(request.shape, slices, self._device)
        uniform = _hash(index, salt).to(torch.float32) * (2.0 / 2**32) - 1.0
        return uniform.mul_(request.scale * 3**0.5).add_(request.mean)

    def _ids(self, request: WeightRequest, salt: int) -> torch.Tensor:
        rows, choices = request.view
        first = _hash(torch.arange(rows, device=self._device), salt) % request.high
        return (first.unsqueeze(1) + torch.arange(choices, device=self._device)) % request.high


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _quantise_groups(slabs: Iterable[torch.Tensor], view: tuple[int, ...]) -> Fp8Weight:
    """Quantise slab by slab, as they are made: fp32 values of all experts at once do not fit."""
    parts = [quantise_blocks(slab.view(-1, *view[1:])) for slab in slabs]
    return Fp8Weight(
        torch.cat([part.data for part in parts]), torch.cat([part.scales for part in parts])
    )


def _slabs(slices: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Cut the first dimension into pieces of at most about ``_CHUNK`` elements."""
    first, last = slices[0]
    inner = 1
    for start, stop in slices[1:]:
        inner *= stop - start
    step = max(1, _CHUNK // max(1, inner))
    return [(at, min(at + step, last)) for at in range(first, last, step)]


def _global_index(
    shape: tuple[int, ...], slices: tuple[tuple[int, int], ...], device: torch.device
) -> torch.Tensor:
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):
        positions = torch.arange(*slices[axis], dtype=torch.int64, device=device) * stride
        index = index + positions.view(-1, *(1,) * (len(shape) - 1 - axis))
        stride *= shape[axis]
    return index


def _hash(index: torch.Tensor, salt: int) -> torch.Tensor:
    """A 32-bit mix (murmur3's finaliser) of 64-bit indices, as int64 in [0, 2**32)."""
    x = (index ^ (index >> 32) * 0x9E3779B1 ^ salt) & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def _salt(seed: int, layer: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{layer}/{name}".encode())
