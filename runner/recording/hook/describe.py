"""Describe a call's arguments: by a key that is quick to make, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

_PLAIN = (bool, int, float, str, type(None))


def key_of(value: Any) -> Hashable:
    """A key that is equal for arguments that look alike; tensors differ by all but their values."""
    if hasattr(value, "stride"):
        return value.dtype, value.shape, value.stride(), value.device.type
    if isinstance(value, (tuple, list)):
        return tuple([key_of(item) for item in value])
    return value if isinstance(value, _PLAIN) else _word(value)


def has_tensor(value: Any) -> bool:
    """Whether there is a tensor in it, at any depth."""
    if isinstance(value, (tuple, list)):
        return any(map(has_tensor, value))
    return hasattr(value, "stride")


def describe(value: Any) -> object:
    """An argument as JSON data.

    A tensor is ``{"dtype", "shape"}``, with ``"stride"`` if it is not contiguous and ``"device"``
    if that is not CUDA; a sequence is a list; what JSON does not have is ``{"object": text}``.
    """
    if hasattr(value, "stride"):
        found = {"dtype": _word(value.dtype), "shape": list(value.shape)}
        if not value.is_contiguous():
            found["stride"] = list(value.stride())
        if value.device.type != "cuda":
            found["device"] = value.device.type
        return found
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    plain = isinstance(value, _PLAIN) and (not isinstance(value, float) or math.isfinite(value))
    return value if plain else {"object": _word(value)}


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")[:80]
