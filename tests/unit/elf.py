"""Tiny hand-made cubins: ELF64 files with one kernel that pass every check."""

import struct

_HEADER_BYTES = 64
_SECTION_BYTES = 64
_EM_CUDA = 190
_PROGBITS, _STRTAB = 1, 3


def _section(name: int, kind: int, flags: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, 0, 0, 1, 0)


def tiny_cubin(code: bytes, name: str = "kernel") -> bytes:
    """An ELF64 little-endian file with ``code`` in a section ``.text.<name>``.

    The section table comes last, so any shorter file is truncated. nvcc appends program headers;
    this file has none.
    """
    text = f".text.{name}".encode()
    names = b"\0.shstrtab\0" + text + b"\0"
    table = _HEADER_BYTES + len(names) + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 2, _EM_CUDA, 1, 0, 0, table, 0, _HEADER_BYTES, 0, 0, _SECTION_BYTES, 3, 1
    )
    sections = bytes(_SECTION_BYTES)
    sections += _section(1, _STRTAB, 0, _HEADER_BYTES, len(names))
    sections += _section(names.index(text), _PROGBITS, 6, _HEADER_BYTES + len(names), len(code))
    return header + names + code + sections
