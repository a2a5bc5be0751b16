"""A forward's tensors and groups of tensors: real ones with torch, only shapes in a recording.

The forward is written and type-checked for ``torch.Tensor``. A recording runs the same code without
torch: :class:`TensorSpec` stands in for a tensor and has the attributes that steps use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
    Cut = slice[int | None, int | None, None]
else:
    Tensor = object

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4, "int32": 4, "int64": 8}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's shape and element type (a key of :data:`DTYPE_BYTES`)."""

    shape: tuple[int, ...]
    dtype: str = "bf16"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __getitem__(self, index: Cut | tuple[Cut, ...]) -> TensorSpec:
        slices = index if isinstance(index, tuple) else (index,)
        cut = [len(range(size)[part]) for size, part in zip(self.shape, slices, strict=False)]
        return TensorSpec((*cut, *self.shape[len(cut) :]), self.dtype)

    def reshape(self, *shape: int) -> TensorSpec:
        return TensorSpec(shape, self.dtype)

    def contiguous(self) -> TensorSpec:
        return self

    def bfloat16(self) -> TensorSpec:
        return TensorSpec(self.shape)


def spec(*shape: int, dtype: str = "bf16") -> Tensor:
    """A tensor without data, of the given shape and element type."""
    return cast("Tensor", TensorSpec(shape, dtype))


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """A tensor without data, of the given shape and the element type of ``x``."""
    return cast("Tensor", TensorSpec(shape, cast(str, x.dtype)))


def split_columns(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """[T, N] -> [T, first] and [T, N - first]."""
    return x[:, :first].contiguous(), x[:, first:].contiguous()


def bf16_bytes(x: Tensor) -> int:
    """Bytes of ``x`` in bf16, which is what a GPU moves; a CPU may keep wider partial sums."""
    return 2 * prod(x.shape)


@dataclass(frozen=True)
class Fp8Weight:
    """``data`` [n, k] or [groups, n, k] e4m3; ``scales`` one fp32 per 128 x 128 block."""

    data: Tensor
    scales: Tensor

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
        return self.data.shape[0] if len(self.data.shape) == 3 else 1

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(data, scales), as the entry points take them."""
        return self.data, self.scales


class PoolWeights(NamedTuple):
    """Weights that pool a compressor's projections: ``ape`` [ratio, width] fp32, ``norm`` [D]."""

    ape: Tensor
    norm: Tensor


class MixWeights(NamedTuple):
    """Weights that mix the copies of the residual stream [M * H], all fp32: GEMM, then affine."""

    fn: Tensor
    base: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Result of expert selection: ``weights`` [T, k] fp32 and expert ``ids`` [T, k] int64."""

    weights: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Tokens laid out for a grouped GEMM, and where each one went.

    Attributes:
        x: [rows, H], or [E, rows, H] in the masked layout.
        groups: expert of each row, -1 for padding [rows] int32; masked: rows in use [E] int32.
        slots: flat row of each (token, choice), -1 if the expert is not local: [T * k] int64.
        expected_m: M from which the library chooses the GEMM's configuration.
    """

    x: Tensor
    groups: Tensor
    slots: Tensor
    expected_m: int
