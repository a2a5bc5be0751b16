"""The two forms of a cache entry: its name, and what makes it whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

SOURCE, CUBIN = "kernel.cu", "kernel.cubin"


@dataclass(frozen=True)
class EntryFormat:
    """How one JIT generation lays an entry out.

    Attributes:
        generation: of the JIT.
        pattern: of an entry's folder name; its group is the kernel's name.
        files: what a whole entry holds, in the order in which they are packed.
        on_damage: what the library does where one of them is missing.
    """

    generation: int
    pattern: re.Pattern[str]
    files: tuple[str, ...]
    on_damage: str


FORMATS = (
    EntryFormat(
        1,
        re.compile(r"kernel\.(\w+)\.[0-9a-f]{32}"),
        (SOURCE, CUBIN),
        "the library aborts on this entry",
    ),
    EntryFormat(
        2,
        re.compile(r"(\w+)\.[0-9a-f]{32}"),
        (SOURCE, CUBIN, "meta.json", ".committed"),
        "the library compiles it again, or fails on it",
    ),
)


def format_of(key: str) -> EntryFormat | None:
    """The format that an entry of this name has; None where it is no entry's name."""
    return next((form for form in FORMATS if form.pattern.fullmatch(key)), None)


def kernel_name(key: str) -> str:
    """The kernel's name in an entry's name; the name itself where it is no entry's."""
    form = format_of(key)
    match = form.pattern.fullmatch(key) if form else None
    return match[1] if match else key
