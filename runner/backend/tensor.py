"""Tensors by shape alone, for forwards without torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4, "int32": 4, "int64": 8}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's shape and element type (a key of :data:`DTYPE_BYTES`)."""

    shape: tuple[int, ...]
    dtype: str = "bf16"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Tensor(Protocol):
    """What the forward may ask of a tensor of any backend."""

    @property
    def shape(self) -> Any:
        """Sizes, outermost first."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
