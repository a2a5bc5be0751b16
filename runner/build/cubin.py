"""Cubins as ELF files: whether one is whole, which kernels it holds, and their machine code."""

from __future__ import annotations

import struct

_HEADER_BYTES = 64
_NOBITS = 8


class NotACubinError(Exception):
    """The bytes are no whole ELF64 file; the text says why."""


def sections(cubin: bytes) -> dict[str, bytes]:
    """Content of each section by name.

    Raises:
        NotACubinError: not ELF64, cut short, or garbled.
    """
    try:
        return _sections(cubin)
    except (ValueError, IndexError, struct.error):
        raise NotACubinError("garbled") from None


def _sections(cubin: bytes) -> dict[str, bytes]:
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise NotACubinError("not an ELF64 file" if cubin else "empty")
    if len(cubin) < _HEADER_BYTES:
        raise NotACubinError(f"cut short: {len(cubin)} bytes")
    programs, offset = struct.unpack_from("<QQ", cubin, 0x20)
    program_size, program_count, size, count, names = struct.unpack_from("<HHHHH", cubin, 0x36)
    ends = (offset + size * count, programs + program_size * program_count)
    if max(ends) > len(cubin):
        raise NotACubinError(f"cut short: {len(cubin)} bytes, its tables end later")
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    for _, kind, _, _, start, length in headers:
        if kind != _NOBITS and start + length > len(cubin):
            raise NotACubinError(f"cut short: {len(cubin)} bytes, a section ends later")
    table = headers[names][4]
    return {
        _name(cubin, table + header[0]): cubin[header[4] : header[4] + header[5]]
        for header in headers
        if header[1] != _NOBITS
    }


def kernels_in(cubin: bytes) -> dict[str, bytes]:
    """Machine code by kernel name."""
    prefix = ".text."
    return {
        name.removeprefix(prefix): code
        for name, code in sections(cubin).items()
        if name.startswith(prefix)
    }


def _name(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
