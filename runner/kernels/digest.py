"""The 128-bit digests of text that name cache entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

_MASK = 2**64 - 1
_FNV_PRIME = 0x100000001B3


@dataclass(frozen=True, slots=True)
class Digest:
    """DeepGEMM's first digest (csrc/utils/hash.hpp): two FNV-1a runs with different seeds.

    An update returns a new value, so many digests can share one prefix.
    """

    states: tuple[int, int] = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)
    second_factor: ClassVar[int] = _FNV_PRIME

    def update(self, text: str | bytes) -> Self:
        first, second = self.states
        factor = self.second_factor
        for byte in self._framed(text.encode() if isinstance(text, str) else text):
            first = ((first ^ byte) * _FNV_PRIME) & _MASK
            second = ((second ^ byte) * factor) & _MASK
        return type(self)((first, second))

    def _framed(self, data: bytes) -> bytes:
        return data

    @property
    def hex(self) -> str:
        """32 hex digits: the two states, each passed through SplitMix64's finaliser."""
        return "".join(f"{_split_mix(state):016x}" for state in self.states)


@dataclass(frozen=True, slots=True)
class DeepJitDigest(Digest):
    """DeepJIT's digest (deep_jit/utils/hash.hpp): every update starts with the data's length."""

    states: tuple[int, int] = (0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD)
    second_factor: ClassVar[int] = 0x9E3779B97F4A7C15

    def _framed(self, data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data


def hex_digest(text: str | bytes) -> str:
    """32 hex digits for a text, computed as in the first JIT generation."""
    return Digest().update(text).hex


def _split_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
