"""Deterministic weights in torch: a value depends only on seed, layer, name and global index."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from runner.backend.tensor import Fp8Weight
from runner.backend.weights import Shard, WeightRequest
from runner.deep_gemm_wrapper.quantise import quantise_blocks

_MASK32 = 0xFFFFFFFF
_CHUNK = 1 << 24
"""Elements made at a time; this limits the size of the int64 temporaries."""


class TorchWeights:
    """Makes weights on a device.

    Args:
        seed: any integer; each seed gives a different model.
        device: where the weights are stored.
        share: use one buffer for all weights of the same kind and shape. A warm-up of a full-size
            model needs only the shapes, not different values in every layer.
    """

    def __init__(self, seed: int, device: torch.device, *, share: bool = False) -> None:
        self._seed, self._device, self._share = seed, device, share
        self._shared: dict[tuple[str, tuple[int, ...], int], Tensor] = {}
        self._shared_fp8: dict[tuple[int, ...], Fp8Weight] = {}

    def make(self, request: WeightRequest) -> Tensor:
        """The local part of a bf16, fp32 or int64 weight."""
        key = (request.kind, request.view, request.high)
        made = self._shared.get(key)
        if made is None:
            made = self._ids(request) if request.kind == "ids" else self._values(request)
        if self._share:
            self._shared[key] = made
        return made

    def make_fp8(self, request: WeightRequest) -> Fp8Weight:
        """The local part of an FP8 weight; one with groups is quantised slab by slab.

        The fp32 values of all experts would not fit in memory at once.
        """
        made = self._shared_fp8.get(request.view)
        if made is None:
            slabs = self._slabs(request)
            if len(request.view) == 2:
                made = Fp8Weight(*quantise_blocks(torch.cat(list(slabs)).view(request.view)))
            else:
                parts = (quantise_blocks(slab.view(-1, *request.view[1:])) for slab in slabs)
                made = Fp8Weight(*map(torch.cat, zip(*parts, strict=True)))
        if self._share:
            self._shared_fp8[request.view] = made
        return made

    def _values(self, request: WeightRequest) -> Tensor:
        dtype = _DTYPES[request.kind]
        slabs = [slab.to(dtype) for slab in self._slabs(request)]
        return torch.cat(slabs).view(request.view)

    def _slabs(self, request: WeightRequest) -> Iterator[Tensor]:
        """Values in fp32, cut along the first dimension into about ``_CHUNK`` elements each."""
        first, *others = request.dims
        step = max(1, _CHUNK // max(1, prod(dim.width for dim in others)))
        salt = self._salt(request)
        for start in range(first.start, first.stop, step):
            part = Shard(first.size, start, min(start + step, first.stop))
            index = _global_index((part, *others), self._device)
            uniform = _hash(index, salt).to(torch.float32) * (2.0 / 2**32) - 1.0
            yield uniform.mul_(request.scale * 3**0.5).add_(request.mean)

    def _ids(self, request: WeightRequest) -> Tensor:
        rows, choices = request.view
        first = _hash(torch.arange(rows, device=self._device), self._salt(request)) % request.high
        return (first.unsqueeze(1) + torch.arange(choices, device=self._device)) % request.high

    def _salt(self, request: WeightRequest) -> int:
        return zlib.crc32(f"{self._seed}/{request.layer}/{request.name}".encode())


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _global_index(dims: Sequence[Shard], device: torch.device) -> Tensor:
    """Index of each element in the global array, row-major."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for axis, dim in reversed(list(enumerate(dims))):
        positions = torch.arange(dim.start, dim.stop, dtype=torch.int64, device=device) * stride
        index = index + positions.view(-1, *(1,) * (len(dims) - 1 - axis))
        stride *= dim.size
    return index


def _hash(index: Tensor, salt: int) -> Tensor:
    """Hash 64-bit indices with murmur3's 32-bit finaliser; returns int64 in [0, 2**32)."""
    x = (index ^ (index >> 32) * 0x9E3779B1 ^ salt) & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
