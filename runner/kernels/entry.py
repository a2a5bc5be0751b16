"""What makes a cache entry complete: its name, its files, and its cubin, which is an ELF file."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

SOURCE, CUBIN = "kernel.cu", "kernel.cubin"

_HEADER_BYTES = 64
_NOBITS = 8
_CODE = ".text."


@dataclass(frozen=True)
class EntryFormat:
    """The layout of a cache entry in one JIT generation.

    Attributes:
        pattern: matches an entry's folder name; its group is the kernel's name.
        files: files of a complete entry, in the order in which they are packed.
        on_damage: what the library does if one of them is missing.
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
    """The format of an entry with this name; None if this is not an entry's name."""
    return next((form for form in FORMATS if form.pattern.fullmatch(key)), None)


def kernel_name(key: str) -> str:
    """The kernel's name, from an entry's name; returns any other name unchanged."""
    form = format_of(key)
    match = form.pattern.fullmatch(key) if form else None
    return match[1] if match else key


def files_of(key: str) -> tuple[str, ...]:
    """Files of a complete entry with this name; none if this is not an entry's name."""
    form = format_of(key)
    return form.files if form else ()


def missing_files(folder: Path) -> list[str]:
    """Files that are missing from the entry in this folder."""
    return [name for name in files_of(folder.name) if not (folder / name).is_file()]


def cubin_damage(cubin: bytes) -> str:
    """What is wrong with an entry's cubin; empty if it has exactly one kernel."""
    try:
        count = len(kernels_in(cubin))
    except NotACubinError as error:
        return f"is {error}"
    return "" if count == 1 else f"holds {count} kernels instead of one"


class NotACubinError(Exception):
    """The bytes are not a complete ELF64 file; the text says why."""


def kernels_in(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel, by mangled name.

    Raises:
        NotACubinError: not ELF64, cut short, or garbled.
    """
    try:
        found = _sections(cubin)
    except (ValueError, IndexError, struct.error):
        raise NotACubinError("garbled") from None
    return {name[len(_CODE) :]: code for name, code in found.items() if name.startswith(_CODE)}


def _sections(cubin: bytes) -> dict[str, bytes]:
    """Content of each section by name."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise NotACubinError("not an ELF64 file" if cubin else "empty")
    cut_short = NotACubinError(f"cut short: {len(cubin)} bytes")
    if len(cubin) < _HEADER_BYTES:
        raise cut_short
    programs, offset = struct.unpack_from("<QQ", cubin, 0x20)
    program_size, program_count, size, count, names = struct.unpack_from("<HHHHH", cubin, 0x36)
    if max(offset + size * count, programs + program_size * program_count) > len(cubin):
        raise cut_short
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    name_table = headers[names][4]
    found = {}
    for name_at, kind, _, _, start, length in headers:
        if kind == _NOBITS:
            continue
        if start + length > len(cubin):
            raise cut_short
        name = cubin[name_table + name_at : cubin.index(b"\0", name_table + name_at)]
        found[name.decode()] = cubin[start : start + length]
    return found
