"""verify(): every problem that a cache entry can have."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.cache.verify import Expectation, Finding, verify
from runner.kernels.installed import Library
from tests.unit.elf import tiny_cubin
from tests.unit.kept_cache import expected, first_of, remove
from tests.unit.small_cache import fill, second_keys_for, second_library, small_library

ANYTHING = Expectation((), None, None, None, None)


def test_intact_cache_has_no_findings(made: tuple[KernelCache, Manifest], here: Library) -> None:
    cache, manifest = made
    assert len(manifest.entries) == 4
    assert verify(cache, expected(manifest, here)) == []
    assert verify(cache, ANYTHING) == []
    assert verify(KernelCache(cache.root / "nowhere"), ANYTHING) == []


def test_removed_entry_is_missing(made: tuple[KernelCache, Manifest], here: Library) -> None:
    key, path = first_of(made)
    remove(path)
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding("missing", key, "is not in the cache")]


@pytest.mark.parametrize("name", ["notes.txt", "kernel.gemm.12", "kernel..".ljust(41, "0"), "a/b"])
def test_file_without_an_entry_name_is_foreign(
    made: tuple[KernelCache, Manifest], name: str
) -> None:
    path = made[0].entry(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    finding = Finding("foreign", name.removesuffix("/b"), "is not a kernel's folder")
    assert verify(made[0], expected(made[1])) == [finding]
    assert verify(made[0], ANYTHING) == [finding]


def test_plain_file_with_an_entry_name_is_foreign(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    remove(path)
    path.write_text("")
    found = verify(made[0], expected(made[1]))
    assert found == [Finding("foreign", key, "is not a kernel's folder")]


def test_entry_outside_manifest_and_plan_is_foreign(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    cache, manifest = made
    key, _ = first_of(made)
    rest = manifest.without({key})
    found = verify(cache, expected(rest, here))
    assert found == [Finding("foreign", key, "is not in the manifest or the plan")]
    assert verify(cache, expected(rest, here, known=None)) == []
    assert verify(cache, expected(rest, here, known=set(manifest.entries))) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shortened_cubin_is_truncated(data: st.DataObject) -> None:
    whole = tiny_cubin(b"machine code")
    length = data.draw(st.integers(0, len(whole) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache" / f"kernel.gemm.{'0' * 32}"
        folder.mkdir(parents=True)
        (folder / "kernel.cu").write_text("")
        (folder / "kernel.cubin").write_bytes(whole)
        assert verify(KernelCache(Path(name)), ANYTHING) == []
        (folder / "kernel.cubin").write_bytes(whole[:length])
        (found,) = verify(KernelCache(Path(name)), ANYTHING)
    assert (found.problem, found.key) == ("truncated", folder.name)
    if length == 0:
        assert found.words == "kernel.cubin is empty"
    elif length < 6:
        assert found.words == "kernel.cubin is not an ELF64 file"
    else:
        assert found.words.startswith(f"kernel.cubin is cut short: {length} bytes")


@pytest.mark.parametrize("file", ["kernel.cu", "kernel.cubin"])
def test_entry_without_source_or_cubin_is_truncated(
    made: tuple[KernelCache, Manifest], here: Library, file: str
) -> None:
    key, path = first_of(made)
    (path / file).unlink()
    words = f"{file} is missing: the library aborts on this entry"
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding("truncated", key, words)]


def test_cubin_without_kernels_is_truncated(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    cubin = (path / "kernel.cubin").read_bytes().replace(b".text.", b".data.")
    (path / "kernel.cubin").write_bytes(cubin)
    words = "kernel.cubin holds 0 kernels instead of one"
    found = verify(made[0], expected(made[1]))
    assert found == [Finding("truncated", key, words)]


@pytest.mark.parametrize(
    "cubin",
    [
        tiny_cubin(b"code")[:6] + bytes(len(tiny_cubin(b"code")) - 6),
        tiny_cubin(b"code").replace(b".text", b"\xfftext"),
        tiny_cubin(b"code")[:0x3E] + b"\xff\xff" + tiny_cubin(b"code")[0x40:],
    ],
    ids=["zeros", "name", "index"],
)
def test_garbled_cubin_is_truncated(made: tuple[KernelCache, Manifest], cubin: bytes) -> None:
    key, path = first_of(made)
    (path / "kernel.cubin").write_bytes(cubin)
    found = verify(made[0], expected(made[1]))
    assert [(each.problem, each.key) for each in found] == [("truncated", key)]


def test_cubin_unlike_the_manifest_is_changed(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    key, path = first_of(made)
    (path / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding("changed", key, "kernel.cubin is not what was built")]
    assert verify(made[0], expected(made[1], here, manifest=None)) == []


def test_edited_source_is_changed_and_has_wrong_key(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    key, path = first_of(made)
    with (path / "kernel.cu").open("a") as file:
        file.write("// more\n")
    assert verify(made[0], expected(made[1], here)) == [
        Finding("wrong key", key, "is not this source's key for this machine"),
        Finding("changed", key, "kernel.cu is not what was built"),
    ]


@pytest.mark.parametrize(
    "values", [{"signature": "NVCC13.1"}, {"flags": "-O3"}], ids=["signature", "flags"]
)
def test_all_keys_are_wrong_for_a_different_machine(
    made: tuple[KernelCache, Manifest], here: Library, values: dict[str, str]
) -> None:
    found = verify(made[0], expected(made[1], keys=replace(made[1], **values).keys(here)))
    assert [(each.problem, each.key) for each in found] == [
        ("wrong key", key) for key in sorted(made[1].entries)
    ]


def test_renamed_entry_has_wrong_key(made: tuple[KernelCache, Manifest]) -> None:
    _, path = first_of(made)
    name = path.name[:-32] + "0" * 32
    path.rename(path.with_name(name))
    words = "is not this source's key for this machine"
    found = verify(made[0], expected(made[1], wanted=(), known=None))
    assert found == [Finding("wrong key", name, words)]


def test_entries_from_different_headers_have_wrong_version(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    words = "was generated from headers of another version"
    other = small_library(tmp_path / "newer", "int b;\n")
    everything = [Finding("wrong version", key, words) for key in sorted(made[1].entries)]
    assert verify(made[0], expected(made[1], other)) == everything
    assert verify(made[0], expected(made[1], Library(tmp_path / "nowhere"))) == everything


def test_source_without_header_hash_line_has_wrong_version(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    key, path = first_of(made)
    text = (path / "kernel.cu").read_text()
    (path / "kernel.cu").write_text(text.partition("\n")[2])
    found = verify(made[0], expected(made[1], here, keys=None, manifest=None))
    words = "was generated from headers of another version"
    assert found == [Finding("wrong version", key, words)]


def test_missing_entries_are_listed_first(made: tuple[KernelCache, Manifest]) -> None:
    cache, manifest = made
    first, last = min(manifest.entries), max(manifest.entries)
    (cache.entry(first) / "kernel.cubin").unlink()
    remove(cache.entry(last))
    found = [(each.problem, each.key) for each in verify(cache, expected(manifest))]
    assert found == [("missing", last), ("truncated", first)]


# Entries of JIT generation 2


@pytest.fixture
def newer(tmp_path: Path) -> Library:
    return second_library(tmp_path / "newer_gemm")


@pytest.fixture
def second(tmp_path: Path, newer: Library) -> tuple[KernelCache, Manifest]:
    return fill(tmp_path / "second", second_keys_for(newer))


def test_intact_generation_2_cache_has_no_findings(
    second: tuple[KernelCache, Manifest], newer: Library
) -> None:
    assert verify(second[0], expected(second[1], newer)) == []
    assert all(not key.startswith("kernel.") for key in second[1].entries)


@pytest.mark.parametrize("file", ["kernel.cu", "kernel.cubin", "meta.json", ".committed"])
def test_generation_2_entry_without_one_of_its_files_is_truncated(
    second: tuple[KernelCache, Manifest], newer: Library, file: str
) -> None:
    key, path = first_of(second)
    (path / file).unlink()
    words = f"{file} is missing: the library compiles it again, or fails on it"
    found = verify(second[0], expected(second[1], newer))
    assert found == [Finding("truncated", key, words)]


def test_generation_2_keys_are_wrong_for_different_headers(
    second: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    words = "is not this source's key for this machine"
    everything = [Finding("wrong key", key, words) for key in sorted(second[1].entries)]
    other = second_library(tmp_path / "other_gemm", "int b;\n")
    assert verify(second[0], expected(second[1], other)) == everything
    gone = second_library(tmp_path / "gone_gemm")
    for header in gone.include_path.rglob("*.cuh"):
        header.unlink()
    assert verify(second[0], expected(second[1], gone)) == everything
