"""Which functions a shared library offers: its dynamic symbols, read from the ELF file."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from runner.errors import UserError

_DYNSYM = 11
_FUNCTION = 2
_GLOBAL, _WEAK = 1, 2
_SYMBOL = struct.Struct("<IBBHQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")


def exported_functions(path: Path) -> tuple[str, ...]:
    """Names of the functions that a shared library defines for others, sorted.

    The file is mapped, not read: cuBLAS has hundreds of megabytes.

    Raises:
        UserError: not a readable ELF64 library.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                return tuple(sorted(set(_functions(data))))
            finally:
                data.close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, OverflowError, struct.error):
        raise UserError(f"{path} is not a shared library (ELF64)") from None


def _functions(data: mmap.mmap) -> Iterator[str]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not ELF64")
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, offset + i * size) for i in range(count)]
    for _, kind, _, _, start, length, link, *_ in sections:
        if kind != _DYNSYM:
            continue
        names = sections[link][4]
        for at in range(start, start + length, _SYMBOL.size):
            name, info, _, section, _, _ = _SYMBOL.unpack_from(data, at)
            if section and info & 15 == _FUNCTION and info >> 4 in (_GLOBAL, _WEAK):
                yield _text(data, names + name)


def _text(data: mmap.mmap, at: int) -> str:
    end = data.find(b"\0", at)
    if end < 0:
        raise ValueError("a name without an end")
    return data[at:end].decode()
