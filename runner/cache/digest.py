"""The 128-bit digests of text that name cache entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

_MASK = 2**64 - 1
_FNV_PRIME = 0x100000001B3


@dataclass(frozen=True, slots=True)
class Digest:
    """DeepGEMM's first digest (csrc/utils/hash.hpp): two FNV-1a runs with different seeds.

    Updates are immutable values, so that many digests may go on after a common beginning.
    """

    states: tuple[int, int] = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)

    def update(self, text: str | bytes) -> Self:
        """The digest of what came before and ``text``."""
        data = text.encode() if isinstance(text, str) else text
        return type(self)(self._after(data))

    def _after(self, data: bytes) -> tuple[int, int]:
        first, second = self.states
        for byte in data:
            first = ((first ^ byte) * _FNV_PRIME) & _MASK
            second = ((second ^ byte) * _FNV_PRIME) & _MASK
        return first, second

    @property
    def hex(self) -> str:
        """32 hex digits: both runs, each through a split-mix finaliser."""
        return "".join(f"{_split_mix(state):016x}" for state in self.states)


@dataclass(frozen=True, slots=True)
class DeepJitDigest(Digest):
    """DeepJIT's digest (deep_jit/utils/hash.hpp): each update begins with its length."""

    states: tuple[int, int] = (0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD)

    def _after(self, data: bytes) -> tuple[int, int]:
        first, second = self.states
        for byte in len(data).to_bytes(8, "little") + data:
            first = ((first ^ byte) * _FNV_PRIME) & _MASK
            second = ((second ^ byte) * 0x9E3779B97F4A7C15) & _MASK
        return first, second


def hex_digest(text: str | bytes) -> str:
    """32 hex digits of a text, as the first generation makes them."""
    return Digest().update(text).hex


def _split_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
