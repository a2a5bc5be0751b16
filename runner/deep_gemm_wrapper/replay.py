"""Make a recorded call again, with any M: the same function, and tensors of the same layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from runner.errors import UserError
from runner.kernels.call_template import Template, size_at

Described = Mapping[str, Any]  # type: ignore[explicit-any]  # JSON
Argument = Callable[[int], object]

_NOT_FINITE = ("inf", "-inf", "nan")
"""Numbers that JSON does not have."""


def replay_call(library: ModuleType, template: Template, most: int) -> Callable[[int], object]:
    """A function that makes the call with ``m`` of up to ``most`` rows.

    All values are 0: only layouts matter.

    Raises:
        UserError: the library has no such function, or an argument is no plain value.
    """
    utils = getattr(library, "utils", None)
    places = (library, utils, getattr(utils, "layout", None))
    function = next((f for p in places if (f := getattr(p, template.function, None))), None)
    if function is None:
        raise UserError(f"{library.__name__} has no function {template.function}")
    args = [_argument(item, most) for item in template.args]
    kwargs = {name: _argument(item, most) for name, item in template.kwargs.items()}

    def call(m: int) -> object:
        named = {name: value(m) for name, value in kwargs.items()}
        return function(*(value(m) for value in args), **named)

    return call


def _argument(item: object, most: int) -> Argument:
    """A function that gives the argument at one M; tensors share one buffer over all M."""
    if isinstance(item, list):
        parts = [_argument(each, most) for each in item]
        return lambda m: tuple(part(m) for part in parts)
    if isinstance(item, dict):
        return _tensor(item, most)
    return (lambda m: m) if item == "M" else lambda m: item


def _tensor(described: Described, most: int) -> Argument:
    if "object" in described:
        if described["object"] in _NOT_FINITE:
            value = float(described["object"])
            return lambda m: value
        dtype = getattr(torch, described["object"], None)
        if isinstance(dtype, torch.dtype):
            return lambda m: dtype
        raise UserError(f"the argument {described['object']} is no plain value")
    device = described.get("device", "cuda")
    dtype = getattr(torch, described["dtype"])
    buffer = torch.zeros(_room(described, most), device=device, dtype=torch.uint8).view(dtype)

    def tensor(m: int) -> Tensor:
        shape = [size_at(size, m) for size in described["shape"]]
        return buffer.as_strided(shape, _strides(described, shape, m))

    return tensor


def _room(described: Described, most: int) -> int:
    """Bytes of the largest tensor, rounded up so that any type's values fit."""
    shape = [size_at(size, most) for size in described["shape"]]
    strides = _strides(described, shape, most)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    item = getattr(torch, described["dtype"]).itemsize
    return int(max(last + 1, 1) * item + 15) // 16 * 16


def _strides(described: Described, shape: list[int], m: int) -> list[int]:
    if "stride" in described:
        return [size_at(size, m) for size in described["stride"]]
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
