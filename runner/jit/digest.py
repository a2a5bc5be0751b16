"""DeepGEMM's 128-bit digest of text (csrc/utils/hash.hpp)."""

from __future__ import annotations

_MASK = 2**64 - 1
_FNV_PRIME = 0x100000001B3
_SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)


def hex_digest(text: str | bytes) -> str:
    """32 hex digits: two FNV-1a runs with different seeds, each through a split-mix finaliser."""
    data = text.encode() if isinstance(text, str) else text
    return "".join(f"{_split_mix(_fnv1a(data, seed)):016x}" for seed in _SEEDS)


def _fnv1a(data: bytes, seed: int) -> int:
    value = seed
    for byte in data:
        value = ((value ^ byte) * _FNV_PRIME) & _MASK
    return value


def _split_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
