"""Cache entries: their names and files, and their cubins read as ELF files."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.compiler import NvccCompiler
from runner.kernels.entry import FORMATS, NotACubinError, format_of, kernel_name, kernels_in
from runner.kernels.rules import transpose_fp32
from tests.unit.elf import tiny_cubin

HEADER = SECTION = 64
SEGMENT = 56
PROGBITS, STRTAB, NOBITS = 1, 3, 8
TABLE_AT, COUNT_AT, NAMES_AT, ENTRY_SIZE_AT = 0x28, 0x3C, 0x3E, 0x3A


def elf(content: dict[str, bytes], *, nobits: int = 0, segments: int = 0) -> bytes:
    """An ELF64 file laid out as nvcc lays it out: contents, section table, program headers."""
    named = {"": b"", ".shstrtab": b"", **content, **({".bss": b""} if nobits else {})}
    names, starts = b"", {}
    for name in named:
        starts[name] = len(names)
        names += name.encode() + b"\0"
    named[".shstrtab"] = names
    body, table = b"", b""
    for name, data in named.items():
        kind = {".shstrtab": STRTAB, "": 0, ".bss": NOBITS}.get(name, PROGBITS)
        at, size = HEADER + len(body), nobits if kind == NOBITS else len(data)
        table += struct.pack("<IIQQQQIIQQ", starts[name], kind, 0, 0, at, size, 0, 0, 1, 0)
        body += data
    ends = HEADER + len(body)
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQ", 2, 190, 1, 0, ends + len(table), ends)
        + struct.pack("<IHHHHHH", 0, HEADER, SEGMENT, segments, SECTION, len(named), 1)
    )
    return header + body + table + bytes(SEGMENT * segments)


def words(data: bytes) -> str:
    with pytest.raises(NotACubinError) as caught:
        kernels_in(data)
    return str(caught.value)


def changed(data: bytes, at: int, kind: str, value: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(kind, copy, at, value)
    return bytes(copy)


def contents() -> st.SearchStrategy[dict[str, bytes]]:
    names = st.from_regex(r"\.(text\.|nv\.info\.)[a-z]\w{0,8}", fullmatch=True)
    return st.dictionaries(names, st.binary(max_size=20), max_size=4)


@given(content=contents())
def test_kernels_in_returns_the_content_of_text_sections(content: dict[str, bytes]) -> None:
    assert kernels_in(elf(content, nobits=1 << 40)) == {
        name.removeprefix(".text."): data
        for name, data in content.items()
        if name.startswith(".text.")
    }


def test_kernels_in_ignores_other_sections() -> None:
    assert kernels_in(
        elf({".text.one": b"1", ".nv.info.one": b"i", ".text.two": b"22", ".text": b"x"})
    ) == {"one": b"1", "two": b"22"}
    assert kernels_in(elf({".nv.info.one": b"i"})) == {}
    assert kernels_in(tiny_cubin(b"code", "gemm")) == {"gemm": b"code"}


@given(content=contents(), data=st.data())
def test_truncated_cubin_is_refused(content: dict[str, bytes], data: st.DataObject) -> None:
    whole = elf(content)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(NotACubinError):
        kernels_in(whole[:cut])


def test_cubin_truncated_in_its_program_headers_is_refused() -> None:
    whole = elf({".text.one": b"1"}, segments=5)
    for cut in range(len(whole) - 5 * SEGMENT, len(whole)):
        with pytest.raises(NotACubinError):
            kernels_in(whole[:cut])


def test_invalid_cubin_error_says_what_is_wrong() -> None:
    whole = elf({".text.one": b"1"})
    assert words(b"") == "empty"
    for other in (b"\x7f", b"#!/bin/sh\n" * 20, b"\x7fELF\x01\x01" + whole[6:]):
        assert words(other) == "not an ELF64 file"
    assert words(b"\x7fELF\x02\x02" + whole[6:]) == "not an ELF64 file"  # big-endian
    for cut in (63, 64, 70, len(whole) - 1):
        assert words(whole[:cut]) == f"cut short: {cut} bytes"
    text_size_at = len(whole) - SECTION + 0x20
    too_long = changed(whole, text_size_at, "<Q", len(whole))
    assert words(too_long) == f"cut short: {len(whole)} bytes"


@pytest.mark.parametrize(
    ("at", "kind", "value"),
    [
        pytest.param(COUNT_AT, "<H", 0, id="no sections"),
        pytest.param(NAMES_AT, "<H", 99, id="names in a section that is not there"),
    ],
)
def test_cubin_with_garbled_header_is_refused(at: int, kind: str, value: int) -> None:
    assert words(changed(elf({".text.one": b"1"}), at, kind, value)) == "garbled"


@pytest.mark.parametrize("name", [1 << 31, 30], ids=["past the end", "not text"])
def test_cubin_with_garbled_section_name_is_refused(name: int) -> None:
    whole = elf({".text.one": b"\xff" * 40})
    assert words(changed(whole, len(whole) - SECTION, "<I", name)) == "garbled"


def regions(cubin: bytes) -> list[int]:
    """Ends of the header, each section and the section table, each also minus one byte."""
    (table,) = struct.unpack_from("<Q", cubin, TABLE_AT)
    size, count = struct.unpack_from("<HH", cubin, ENTRY_SIZE_AT)
    ends = {HEADER, table, table + size * count - 1}
    for number in range(count):
        kind, start, length = struct.unpack_from("<4xI16xQQ", cubin, table + number * size)
        ends |= {start, start + length} if kind != NOBITS else set()
    return sorted({max(0, end - step) for end in ends for step in (0, 1)})


@pytest.mark.nvcc
def test_real_cubin_yields_its_kernel_and_is_refused_if_truncated(
    tmp_path: Path, nvcc_compiler: NvccCompiler
) -> None:
    cubin = nvcc_compiler.compile(nvcc_compiler.keys.source(transpose_fp32(1024)), tmp_path)
    ((name, code),) = kernels_in(cubin).items()
    assert name.startswith("_ZN9deep_gemm14transpose_fp32ILj512ELj64ELj8E")
    assert len(code) > 1000 and code in cubin
    assert len(regions(cubin)) > 10
    for end in regions(cubin):
        with pytest.raises(NotACubinError):
            kernels_in(cubin[:end])


# Names and files

HEX = "0123456789abcdef" * 2
FIRST, SECOND = FORMATS


@pytest.mark.parametrize(
    ("key", "generation", "name"),
    [
        (f"kernel.sm90_fp8_gemm_1d2d.{HEX}", 1, "sm90_fp8_gemm_1d2d"),
        (f"sm90_fp8_gemm_1d2d.{HEX}", 2, "sm90_fp8_gemm_1d2d"),
        (f"kernel.{HEX}", 2, "kernel"),
        (f"kernel.kernel.{HEX}", 1, "kernel"),
        (f"{HEX}.{HEX}", 2, HEX),
    ],
)
def test_kernel_name_and_generation_come_from_entry_name(
    key: str, generation: int, name: str
) -> None:
    form = format_of(key)
    assert form is not None and form.generation == generation
    assert kernel_name(key) == name


@pytest.mark.parametrize(
    "key",
    [
        "",
        "kernel",
        "notes.txt",
        f"kernel..{HEX}",
        f".{HEX}",
        f"kernel.gemm.{HEX[:-1]}",
        f"kernel.gemm.{HEX}0",
        f"gemm.{HEX.upper()}",
        f"a.gemm.{HEX}",
        f"kernel.a-b.{HEX}",
        f"kernel.gemm.{HEX}\n",
        f"cache/gemm.{HEX}",
        f"kernel.gemm.x.{HEX}",
    ],
)
def test_format_of_rejects_names_that_are_not_entries(key: str) -> None:
    assert format_of(key) is None
    assert kernel_name(key) == key
