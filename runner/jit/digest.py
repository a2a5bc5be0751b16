"""DeepGEMM's 128-bit digest of text (csrc/utils/hash.hpp)."""

from __future__ import annotations

from dataclasses import dataclass

_MASK = 2**64 - 1
_FNV_PRIME = 0x100000001B3
_SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Digest:
    """Two FNV-1a runs with different seeds, which may go on after a common beginning."""

    states: tuple[int, int] = _SEEDS

    def update(self, text: str | bytes) -> Digest:
        """The digest of what came before and ``text``."""
        data = text.encode() if isinstance(text, str) else text
        first, second = self.states
        for byte in data:
            first = ((first ^ byte) * _FNV_PRIME) & _MASK
            second = ((second ^ byte) * _FNV_PRIME) & _MASK
        return Digest((first, second))

    def hex_with(self, text: str | bytes) -> str:
        """32 hex digits of what came before and ``text``."""
        return "".join(f"{_split_mix(state):016x}" for state in self.update(text).states)


def hex_digest(text: str | bytes) -> str:
    """32 hex digits: two FNV-1a runs with different seeds, each through a split-mix finaliser."""
    return Digest().hex_with(text)


def _split_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
