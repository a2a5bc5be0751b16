"""Kept caches: manifest, verify, relocate, archives, prune and plan files."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import UserError
from runner.jit.cache import KernelCache
from runner.jit.describe import config_of
from runner.jit.keys import CacheKeys
from runner.jit.library import Library
from runner.jit.plan_json import plan_to_json
from runner.jit.store.archive import pack, unpack
from runner.jit.store.manifest import (
    Entry,
    Manifest,
    check_target,
    describe_entry,
    locked,
    manifest_text,
    merge_manifest,
    parse_manifest,
    read_manifest,
    sha256,
    write_manifest,
)
from runner.jit.store.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.jit.store.prune import prune, size_of, superfluous
from runner.jit.store.relocate import relocate
from runner.jit.store.verify import Expectation, Finding, Problem, verify
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import (
    ENTRY_BYTES,
    add,
    contents,
    cubin_for,
    fill,
    keys_for,
    manifest_for,
    small_library,
    small_plan,
)

OTHER_ROOT = Path("/opt/other/deep_gemm/include")


@pytest.fixture
def here(tmp_path: Path) -> Library:
    return small_library(tmp_path / "deep_gemm")


@pytest.fixture
def keys(here: Library) -> CacheKeys:
    return keys_for(here)


@pytest.fixture
def made(tmp_path: Path, keys: CacheKeys) -> tuple[KernelCache, Manifest]:
    return fill(tmp_path / "made", keys)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Manifest


def entries() -> st.SearchStrategy[Entry]:
    numbers = {name: st.integers() for name in ("n", "k", "num_groups")}
    pairs = st.lists(st.integers(), min_size=2, max_size=2)
    ranges = st.lists(pairs, min_size=1, max_size=2)
    uses = st.fixed_dictionaries({"type": st.text(), **numbers, "m_ranges": ranges})
    return st.builds(
        Entry, st.text(), st.lists(uses, max_size=2), st.text(), st.text(), st.integers()
    )


def manifests() -> st.SearchStrategy[Manifest]:
    return st.builds(
        Manifest, st.text(), st.text(), st.text(), st.text(), st.text(),
        st.lists(st.text(), max_size=3), st.dictionaries(st.text(), entries(), max_size=4),
    )  # fmt: skip


@given(manifests())
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_manifest(Path(name), manifest)
        assert read_manifest(Path(name)) == manifest
        assert os.listdir(name) == ["manifest.json"]  # noqa: PTH208


@given(manifests(), st.randoms())
def test_equal_manifests_have_equal_text(manifest: Manifest, random: Any) -> None:
    order = list(manifest.entries)
    random.shuffle(order)
    shuffled = replace(manifest, entries={key: manifest.entries[key] for key in order})
    assert shuffled == manifest
    assert manifest_text(shuffled) == manifest_text(manifest)


def entry(name: str, *uses: dict[str, Any]) -> Entry:
    return Entry(name, list(uses), "s", "c", 1)


BASE = Manifest("lib", "sm_90a", "NVCC13.0", "-O3", "NVCC13.0")


def test_merged_takes_the_newer_entry_and_all_uses() -> None:
    older = replace(BASE, plans=["a", "b"], entries={"k1": entry("x", {"n": 1}), "k2": entry("y")})
    newer = replace(
        BASE, plans=["b", "c"], built_with="NVCC13.1",
        entries={"k1": entry("z", {"n": 1}, {"n": 2}), "k3": entry("w")},
    )  # fmt: skip
    assert older.merged(newer) == replace(
        BASE, plans=["a", "b", "c"], built_with="NVCC13.1",
        entries={"k1": entry("z", {"n": 1}, {"n": 2}), "k2": entry("y"), "k3": entry("w")},
    )  # fmt: skip
    assert older.merged(older) == older
    assert list(older.entries) == ["k1", "k2"]


def test_without_forgets_entries() -> None:
    whole = replace(BASE, entries={"k1": entry("x"), "k2": entry("y")})
    assert whole.without({"k1", "k9"}) == replace(BASE, entries={"k2": entry("y")})
    assert whole.without(set()) == whole


@pytest.mark.parametrize(
    ("field", "same"),
    [
        ("library", False), ("arch", False), ("signature", False), ("flags", False),
        ("built_with", True),
    ],
)  # fmt: skip
def test_same_target(field: str, same: bool) -> None:
    assert BASE.same_target(replace(BASE, **{field: "other"})) is same


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None


def broken(**values: Any) -> str:
    data = {"version": 1, **asdict(BASE), **values}
    return json.dumps({name: value for name, value in data.items() if value is not ...})


@pytest.mark.parametrize(
    "text",
    [
        "", "\xff", "[]", "3", "null", "{}", '{"entries": {}}', '{"entries": []}',
        broken(version=2), broken(version=...), broken(flags=...), broken(more=1),
        broken(entries={"k": {"name": "x"}}), broken(entries={"k": 3}),
        broken(entries={"k": {**asdict(entry("x")), "more": 1}}),
        broken(signature=13), broken(plans=3), broken(plans=[3]),
        broken(entries={"k": {**asdict(entry("x")), "cubin_bytes": "1"}}),
        broken(entries={"k": {**asdict(entry("x")), "uses": 3}}),
        broken(entries={"k": asdict(entry("x", {"n": 1}))}),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert one_line(caught).startswith(f"{tmp_path}/manifest.json is not a manifest: ")


def test_a_manifest_from_elsewhere_is_named_so() -> None:
    assert parse_manifest(manifest_text(BASE).encode(), "there") == BASE
    with pytest.raises(UserError, match=r"^there is not a manifest: "):
        parse_manifest(b"{}", "there")


def test_a_folder_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert one_line(caught) == f"cannot read {tmp_path}/manifest.json: Is a directory"


def test_the_second_holder_of_a_lock_is_told(tmp_path: Path) -> None:
    with locked(tmp_path) as first:
        with locked(tmp_path, wait=False) as second:
            assert (first, second) == (True, False)
        with locked(tmp_path, wait=False) as third:
            assert third is False
    with locked(tmp_path, wait=False) as after:
        assert after is True


HOLDER = """
import sys
from pathlib import Path
from runner.jit.store.manifest import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_a_lock_goes_with_its_killed_holder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with locked(tmp_path, wait=False) as got:
            assert got is False
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with locked(tmp_path) as got:
        assert got is True


# Verify


def expected(manifest: Manifest, library: Library | None = None, /, **values: Any) -> Expectation:
    given = {
        "wanted": list(manifest.entries), "known": set(manifest.entries),
        "signature": manifest.signature, "flags": manifest.flags, "library": library,
        "manifest": manifest,
    }  # fmt: skip
    return Expectation(**{**given, **values})


ANYTHING = Expectation((), None, None, None, None, None)


def test_a_whole_cache_has_no_problem(made: tuple[KernelCache, Manifest], here: Library) -> None:
    cache, manifest = made
    assert len(manifest.entries) == 4
    assert verify(cache, expected(manifest, here)) == []
    assert verify(cache, ANYTHING) == []
    assert verify(KernelCache(cache.root / "nowhere"), ANYTHING) == []


def first_of(made: tuple[KernelCache, Manifest]) -> tuple[str, Path]:
    key = min(made[1].entries)
    return key, made[0].entry(key)


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_missing(made: tuple[KernelCache, Manifest], here: Library) -> None:
    key, path = first_of(made)
    remove(path)
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding(Problem.MISSING, key, "is not in the cache")]


@pytest.mark.parametrize("name", ["notes.txt", "kernel.gemm.12", "kernel..".ljust(41, "0"), "a/b"])
def test_what_has_no_kernels_name_is_foreign(made: tuple[KernelCache, Manifest], name: str) -> None:
    path = made[0].entry(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    finding = Finding(Problem.FOREIGN, name.removesuffix("/b"), "is not a kernel's folder")
    assert verify(made[0], expected(made[1])) == [finding]
    assert verify(made[0], ANYTHING) == [finding]


def test_a_file_of_a_kernels_name_is_foreign(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    remove(path)
    path.write_text("")
    found = verify(made[0], expected(made[1]))
    assert found == [Finding(Problem.FOREIGN, key, "is not a kernel's folder")]


def test_an_entry_that_nobody_named_is_foreign(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    cache, manifest = made
    key, _ = first_of(made)
    rest = manifest.without({key})
    found = verify(cache, expected(rest, here))
    assert found == [Finding(Problem.FOREIGN, key, "is not in the manifest or the plan")]
    assert verify(cache, expected(rest, here, known=None)) == []
    assert verify(cache, expected(rest, here, known=set(manifest.entries))) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shorter_cubin_is_truncated(data: st.DataObject) -> None:
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
    assert (found.problem, found.key) == (Problem.TRUNCATED, folder.name)
    if length == 0:
        assert found.words == "kernel.cubin is empty"
    elif length < 6:
        assert found.words == "kernel.cubin is not an ELF64 file"
    else:
        assert found.words.startswith(f"kernel.cubin is cut short: {length} bytes")


@pytest.mark.parametrize("file", ["kernel.cu", "kernel.cubin"])
def test_half_an_entry(made: tuple[KernelCache, Manifest], here: Library, file: str) -> None:
    key, path = first_of(made)
    (path / file).unlink()
    words = f"{file} is missing: the library aborts on this entry"
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding(Problem.TRUNCATED, key, words)]


def test_a_cubin_without_a_kernel(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    cubin = (path / "kernel.cubin").read_bytes().replace(b".text.", b".data.")
    (path / "kernel.cubin").write_bytes(cubin)
    words = "kernel.cubin holds 0 kernels instead of one"
    found = verify(made[0], expected(made[1]))
    assert found == [Finding(Problem.TRUNCATED, key, words)]


@pytest.mark.parametrize(
    "cubin",
    [
        tiny_cubin(b"code")[:6] + bytes(len(tiny_cubin(b"code")) - 6),
        tiny_cubin(b"code").replace(b".text", b"\xfftext"),
        tiny_cubin(b"code")[:0x3E] + b"\xff\xff" + tiny_cubin(b"code")[0x40:],
    ],
    ids=["zeros", "name", "index"],
)
def test_a_garbled_cubin_is_a_finding(made: tuple[KernelCache, Manifest], cubin: bytes) -> None:
    key, path = first_of(made)
    (path / "kernel.cubin").write_bytes(cubin)
    found = verify(made[0], expected(made[1]))
    assert [(each.problem, each.key) for each in found] == [(Problem.TRUNCATED, key)]


def test_another_cubin_is_a_change(made: tuple[KernelCache, Manifest], here: Library) -> None:
    key, path = first_of(made)
    (path / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    found = verify(made[0], expected(made[1], here))
    assert found == [Finding(Problem.CHANGED, key, "kernel.cubin is not what was built")]
    assert verify(made[0], expected(made[1], here, manifest=None)) == []


def test_another_source_has_another_key(made: tuple[KernelCache, Manifest], here: Library) -> None:
    key, path = first_of(made)
    with (path / "kernel.cu").open("a") as file:
        file.write("// more\n")
    assert verify(made[0], expected(made[1], here)) == [
        Finding(Problem.WRONG_KEY, key, "is not this source's key for this compiler and path"),
        Finding(Problem.CHANGED, key, "kernel.cu is not what was built"),
    ]


@pytest.mark.parametrize(
    "values", [{"signature": "NVCC13.1"}, {"flags": "-O3"}], ids=["signature", "flags"]
)
def test_keys_of_another_machine(
    made: tuple[KernelCache, Manifest], values: dict[str, str]
) -> None:
    found = verify(made[0], expected(made[1], **values))
    assert [(each.problem, each.key) for each in found] == [
        (Problem.WRONG_KEY, key) for key in sorted(made[1].entries)
    ]


def test_a_renamed_entry_has_the_wrong_key(made: tuple[KernelCache, Manifest]) -> None:
    _, path = first_of(made)
    name = path.name[:-32] + "0" * 32
    path.rename(path.with_name(name))
    words = "is not this source's key for this compiler and path"
    found = verify(made[0], expected(made[1], wanted=(), known=None))
    assert found == [Finding(Problem.WRONG_KEY, name, words)]


def test_headers_of_another_version(made: tuple[KernelCache, Manifest], tmp_path: Path) -> None:
    words = "was generated from headers of another version"
    other = small_library(tmp_path / "newer", "int b;\n")
    everything = [Finding(Problem.WRONG_VERSION, key, words) for key in sorted(made[1].entries)]
    assert verify(made[0], expected(made[1], other)) == everything
    assert verify(made[0], expected(made[1], Library(tmp_path / "nowhere"))) == everything


def test_a_source_without_the_hash_line(made: tuple[KernelCache, Manifest], here: Library) -> None:
    key, path = first_of(made)
    text = (path / "kernel.cu").read_text()
    (path / "kernel.cu").write_text(text.partition("\n")[2])
    found = verify(made[0], expected(made[1], here, signature=None, manifest=None))
    words = "was generated from headers of another version"
    assert found == [Finding(Problem.WRONG_VERSION, key, words)]


def test_missing_entries_come_first(made: tuple[KernelCache, Manifest]) -> None:
    cache, manifest = made
    first, last = min(manifest.entries), max(manifest.entries)
    (cache.entry(first) / "kernel.cubin").unlink()
    remove(cache.entry(last))
    found = [(each.problem, each.key) for each in verify(cache, expected(manifest))]
    assert found == [(Problem.MISSING, last), (Problem.TRUNCATED, first)]


# Relocate


def cubins(cache: KernelCache) -> dict[str, bytes]:
    return {path.name: (path / "kernel.cubin").read_bytes() for path in cache.entries()}


@pytest.mark.parametrize("signature", ["NVCC13.0", "NVCC13.1", "NVCC14.0"])
def test_a_relocated_cache_is_the_other_machines(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path, signature: str
) -> None:
    cache, manifest = made
    before = contents(cache.root)
    there = keys_for(here, OTHER_ROOT, signature)
    target = KernelCache(tmp_path / "target")
    progress: list[tuple[int, int]] = []
    done = relocate(
        cache, manifest, there, target, progress=lambda *numbers: progress.append(numbers)
    )
    assert (done.placed, done.present, done.refused) == (4, 0, [])
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert cubins(target) == {
        there.cache_key(item.kernel): cubin_for(there.source(item.kernel))
        for item in small_plan().kernels
    }
    assert sorted(cubins(target).values()) == sorted(cubins(cache).values())
    assert contents(cache.root) == before
    moved = done.manifest
    assert (moved.signature, moved.flags) == (signature, there.flags)
    assert (moved.built_with, moved.plans, moved.library) == (
        "NVCC13.0", manifest.plans, manifest.library,
    )  # fmt: skip
    assert verify(target, expected(moved, here)) == []
    uses = {name: entry.uses for name, entry in manifest.entries.items()}
    for item in small_plan().kernels:
        at_target = moved.entries[there.cache_key(item.kernel)]
        assert at_target.uses == uses[keys_for(here).cache_key(item.kernel)]
        assert at_target.name == item.kernel.name


def test_relocated_again_all_are_there(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path
) -> None:
    there, target = keys_for(here, OTHER_ROOT), KernelCache(tmp_path / "target")
    first = relocate(*made, there, target)
    before = contents(target.root)
    again = relocate(*made, there, target)
    assert (again.placed, again.present, again.refused) == (0, 4, [])
    assert again.manifest == first.manifest
    assert contents(target.root) == before


def test_for_the_same_machine_it_is_a_copy(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path
) -> None:
    target = KernelCache(tmp_path / "target")
    done = relocate(*made, keys_for(here), target)
    assert (done.placed, done.present, done.refused) == (4, 0, [])
    assert done.manifest == made[1]
    write_manifest(target.root, done.manifest)
    assert contents(target.root) == contents(made[0].root)


def cut(path: Path) -> None:
    (path / "kernel.cubin").write_bytes((path / "kernel.cubin").read_bytes()[:-1])


def change(path: Path) -> None:
    (path / "kernel.cubin").write_bytes(tiny_cubin(b"other"))


def halve(path: Path) -> None:
    (path / "kernel.cubin").unlink()


@pytest.mark.parametrize(
    ("damage", "problem", "words"),
    [
        (cut, Problem.TRUNCATED, "kernel.cubin is cut short: "),
        (change, Problem.CHANGED, "kernel.cubin is not what was built"),
        (halve, Problem.TRUNCATED, "kernel.cubin is missing: the library aborts on this entry"),
        (remove, Problem.MISSING, "is not in the cache"),
    ],
    ids=["cut", "changed", "halved", "missing"],
)  # fmt: skip
def test_unsound_entries_are_refused(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path,
    damage: Callable[[Path], None], problem: Problem, words: str,
) -> None:  # fmt: skip
    key, path = first_of(made)
    damage(path)
    there, target = keys_for(here, OTHER_ROOT), KernelCache(tmp_path / "target")
    done = relocate(*made, there, target)
    (refused,) = done.refused
    assert (refused.problem, refused.key) == (problem, key)
    assert refused.words.startswith(words)
    assert (done.placed, len(done.manifest.entries), target.count()) == (3, 3, 3)
    assert verify(target, expected(done.manifest, here)) == []


def test_sources_of_other_headers_are_refused(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    other = small_library(tmp_path / "newer", "int b;\n")
    target = KernelCache(tmp_path / "target")
    done = relocate(*made, keys_for(other, OTHER_ROOT), target)
    assert [each.problem for each in done.refused] == [Problem.WRONG_VERSION] * 4
    assert (done.placed, target.count(), done.manifest.entries) == (0, 0, {})


@pytest.mark.parametrize(
    ("built", "wanted"), [("13.1", "13.0"), ("13.0", "12.9"), ("13.10", "13.9")]
)
def test_an_older_release_is_refused(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path, built: str, wanted: str
) -> None:
    target = KernelCache(tmp_path / "target")
    manifest = replace(made[1], built_with=f"NVCC{built}")
    with pytest.raises(UserError) as caught:
        relocate(made[0], manifest, keys_for(here, OTHER_ROOT, f"NVCC{wanted}"), target)
    assert one_line(caught) == (
        f"the cache was built with CUDA {built} and cannot go to CUDA {wanted}: a driver need not "
        f"load what a newer compiler made; build it with nvcc {wanted}"
    )
    assert target.count() == 0


def test_a_builder_of_no_release(made: tuple[KernelCache, Manifest], here: Library) -> None:
    with pytest.raises(UserError) as caught:
        relocate(made[0], replace(made[1], built_with="clang"), keys_for(here), made[0])
    assert one_line(caught) == "'clang' is not a compiler signature such as NVCC13.0"


# Archive


@pytest.fixture
def archive(made: tuple[KernelCache, Manifest], tmp_path: Path) -> Path:
    path = tmp_path / "kernels.tar.gz"
    assert pack(*made, path) == path.stat().st_size
    return path


def age(root: Path, seconds: int) -> None:
    for path in [root, *root.rglob("*")]:
        os.utime(path, (seconds, seconds))
        path.chmod(0o700)


def test_equal_caches_give_equal_bytes(
    made: tuple[KernelCache, Manifest], keys: CacheKeys, archive: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.tar.gz"
    pack(*made, again)
    assert again.read_bytes() == archive.read_bytes()
    cache, manifest = fill(tmp_path / "twin", keys, small_plan().kernels[::-1])
    age(cache.root, 10**9)
    pack(cache, manifest, again)
    assert again.read_bytes() == archive.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.tar.gz", "deep_gemm", "kernels.tar.gz", "made", "twin",
    ]  # fmt: skip


def test_what_an_archive_holds(made: tuple[KernelCache, Manifest], archive: Path) -> None:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    files = [f"cache/{key}/{file}" for key in sorted(made[1].entries)
             for file in ("kernel.cu", "kernel.cubin")]  # fmt: skip
    assert [member.name for member in members] == ["manifest.json", *files]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_what_the_manifest_does_not_name_is_not_packed(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    made[0].entry("notes.txt").write_text("")
    again = tmp_path / "again.tar.gz"
    pack(*made, again)
    assert again.read_bytes() == archive.read_bytes()


def test_a_cache_that_lacks_kernels_is_not_packed(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    key, path = first_of(made)
    remove(path)
    with pytest.raises(UserError) as caught:
        pack(*made, tmp_path / "x.tar.gz")
    assert one_line(caught) == (
        f"1 of 4 kernels of the manifest are missing in {made[0].root}, {key} among them: build "
        "them first (runner compile)"
    )
    assert not (tmp_path / "x.tar.gz").exists()


@pytest.mark.parametrize(
    ("folder", "words"), [("nowhere", "No such file or directory"), ("file", "Not a directory")]
)
def test_an_archive_that_cannot_be_written(
    made: tuple[KernelCache, Manifest], tmp_path: Path, folder: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "x.tar.gz"
    with pytest.raises(UserError) as caught:
        pack(*made, path)
    assert one_line(caught) == f"cannot write {path}: {words}"


def test_an_entry_that_changed_is_not_packed(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    _, path = first_of(made)
    change(path)
    with pytest.raises(UserError) as caught:
        pack(*made, tmp_path / "x.tar.gz")
    assert one_line(caught) == (f"{path} is not what was built: runner cache verify {made[0].root}")
    assert not (tmp_path / "x.tar.gz").exists()


def test_unpacked_is_what_was_packed(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    target = KernelCache(tmp_path / "target")
    target.prepare()
    progress: list[tuple[int, int]] = []
    manifest, placed = unpack(archive, target, progress=lambda *numbers: progress.append(numbers))
    assert (manifest, placed) == (made[1], 4)
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    write_manifest(target.root, manifest)
    assert contents(target.root) == contents(made[0].root)
    assert list((target.root / "tmp").iterdir()) == []
    assert unpack(archive, target) == (made[1], 0)


def test_entries_that_are_there_stay(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    key, _ = first_of(made)
    target = KernelCache(tmp_path / "target")
    target.entry(key).mkdir(parents=True)
    (target.entry(key) / "kernel.cu").write_text("mine")
    (target.entry(key) / "kernel.cubin").write_text("mine")
    manifest, placed = unpack(archive, target)
    assert placed == 3
    assert (target.entry(key) / "kernel.cubin").read_text() == "mine"
    named = made[1].entries[key]
    mine = describe_entry(target.entry(key), named.name, named.uses)
    assert mine != named
    assert manifest == replace(made[1], entries={**made[1].entries, key: mine})
    assert target.count() == 4


Members = list[tuple[tarfile.TarInfo, bytes]]


def plain(name: str, data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def link(name: str, kind: bytes, target: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def members_of(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write_archive(path: Path, members: Members) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))


def with_first(kind: bytes, target: str = "/etc/passwd") -> Callable[[Members], Members]:
    return lambda all_: [all_[0], link(all_[1][0].name, kind, target), *all_[2:]]


def garble_source(members: Members) -> Members:
    """A manifest that agrees with a source that is no text."""
    (head, data), (source, text), *rest = members
    manifest = json.loads(data)
    key = source.name.split("/")[1]
    manifest["entries"][key]["source_sha256"] = sha256(text + b"\xff")
    return [plain(head.name, json.dumps(manifest).encode()),
            plain(source.name, text + b"\xff"), *rest]  # fmt: skip


NAMELESS = f"cache/kernel.gemm.{'0' * 32}/kernel.cu"

HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "outside": (lambda m: [*m, plain("../evil")],
                "{archive} holds ../evil, which its manifest does not name"),
    "absolute": (lambda m: [*m, plain("/evil")],
                 "{archive} holds /evil, which its manifest does not name"),
    "through the cache": (
        lambda m: [m[0], plain("cache/../../evil/kernel.cu"), *m[1:]],
        "{archive} holds cache/../../evil/kernel.cu, which its manifest does not name"),
    "unnamed": (lambda m: [*m, plain(NAMELESS)],
                f"{{archive}} holds {NAMELESS}, which its manifest does not name"),
    "another file": (lambda m: [*m, plain(m[1][0].name + "x")],
                     "{archive} holds {first}x, which its manifest does not name"),
    "second manifest": (lambda m: [*m, m[0]],
                        "{archive} holds manifest.json, which its manifest does not name"),
    "symlink": (with_first(tarfile.SYMTYPE), "{archive}: {first} is not a plain file"),
    "hard link": (with_first(tarfile.LNKTYPE, "manifest.json"),
                  "{archive}: {first} is not a plain file"),
    "folder": (with_first(tarfile.DIRTYPE), "{archive}: {first} is not a plain file"),
    "device": (with_first(tarfile.CHRTYPE), "{archive}: {first} is not a plain file"),
    "other source": (lambda m: [m[0], plain(m[1][0].name, b"x"), *m[2:]],
                     "{archive}: {first} is not what its manifest names"),
    "other cubin": (lambda m: [*m[:2], plain(m[2][0].name, b"x"), *m[3:]],
                    "{archive}: {first}bin is not what its manifest names"),
    "a kernel less": (lambda m: m[:-2], "{archive} lacks 1 kernels that its manifest names"),
    "a cubin less": (lambda m: m[:-1],
                     "{archive}: kernel.cubin of {last} must follow its kernel.cu"),
    "manifest alone": (lambda m: m[:1], "{archive} lacks 4 kernels that its manifest names"),
    "nothing": (lambda m: [], "{archive} is not a packed cache: manifest.json must come first"),
    "late manifest": (lambda m: [*m[1:], m[0]],
                      "{archive} is not a packed cache: manifest.json must come first"),
    "linked manifest": (lambda m: [link("manifest.json", tarfile.SYMTYPE, "/etc/passwd"), *m[1:]],
                        "{archive}: manifest.json is not a plain file"),
    "cubin first": (lambda m: [m[0], m[2], m[1], *m[3:]],
                    "{archive}: {first}bin where kernel.cu was expected"),
    "sources first": (lambda m: [m[0], m[1], m[3], m[2], *m[4:]],
                      "{archive}: {second} where kernel.cubin was expected"),
    "another's cubin": (lambda m: [m[0], m[1], m[4], m[3], m[2], *m[5:]],
                        "{archive}: kernel.cubin of {key} must follow its kernel.cu"),
    "source no text": (garble_source,
                       "cannot read {archive}: 'utf-8' codec can't decode byte 0xff"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_archive_is_one_line_and_leaves_whole_entries(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path, case: str
) -> None:
    edit, words = HOSTILE[case]
    members = members_of(archive)
    first, second = members[1][0].name, members[3][0].name
    bad = tmp_path / "bad.tar.gz"
    write_archive(bad, edit(members))
    target = KernelCache(tmp_path / "out" / "target")
    target.prepare()
    with pytest.raises(UserError) as caught:
        unpack(bad, target)
    line = words.format(archive=bad, first=first, second=second, key=first.split("/")[1],
                        last=members[-1][0].name.split("/")[1])  # fmt: skip
    told = one_line(caught)
    assert told == line or (case == "source no text" and told.startswith(line))
    assert_whole(target, made[1])
    assert list((tmp_path / "out").iterdir()) == [target.root]


def assert_whole(target: KernelCache, manifest: Manifest) -> None:
    """Entries are the manifest's, each whole, and nothing else lies in the cache."""
    assert list((target.root / "tmp").iterdir()) == []
    assert {path.name for path in target.root.iterdir()} <= {"tmp", "cache"}
    assert verify(target, expected(manifest, wanted=())) == []


@pytest.mark.parametrize("data", [b"", b"no archive", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(30)])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(data)
    target = KernelCache(tmp_path / "target")
    with pytest.raises(UserError) as caught:
        unpack(path, target)
    assert one_line(caught).startswith(f"cannot read {path}: ")
    assert target.count() == 0


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        unpack(tmp_path / "x.tar.gz", KernelCache(tmp_path / "target"))
    assert one_line(caught).startswith(f"cannot read {tmp_path}/x.tar.gz: ")


def outcome(data: bytes, manifest: Manifest) -> str:
    """What unpacking gives; the cache holds whole entries in any case."""
    with tempfile.TemporaryDirectory() as name:
        path, target = Path(name) / "x.tar.gz", KernelCache(Path(name) / "target")
        path.write_bytes(data)
        target.prepare()
        try:
            assert unpack(path, target)[1] == len(manifest.entries)
        except UserError as error:
            assert "\n" not in str(error)
            assert_whole(target, manifest)
            return "refused"
        assert target.count() == len(manifest.entries)
        assert_whole(target, manifest)
        return "placed"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Manifest]:
    root = tmp_path_factory.mktemp("packed")
    cache, manifest = fill(root / "made", keys_for(small_library(root / "deep_gemm")))
    pack(cache, manifest, root / "x.tar.gz")
    return (root / "x.tar.gz").read_bytes(), manifest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_archive(packed: tuple[bytes, Manifest], data: st.DataObject) -> None:
    whole, manifest = packed
    length = data.draw(st.integers(0, len(whole) - 1))
    # What comes last is the filling after the last file: nothing is missing without it.
    filled = len(whole) - 64
    assert outcome(whole, manifest) == "placed"
    assert outcome(whole[:length], manifest) == "refused" or length > filled


def test_a_garbled_archive_places_what_was_packed_or_refuses(
    packed: tuple[bytes, Manifest],
) -> None:
    whole, manifest = packed
    raised = set()
    for at in range(0, len(whole), 5):
        garbled = whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :]
        try:
            outcome(garbled, manifest)
        except Exception as error:
            raised.add(type(error))
    assert raised == set()


def test_a_bad_manifest_of_an_archive_is_told_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    write_archive(path, [plain("manifest.json", b"{}")])
    with pytest.raises(UserError) as caught:
        unpack(path, KernelCache(tmp_path / "target"))
    assert str(path) in one_line(caught) and "target" not in one_line(caught)


def test_a_killed_unpack_does_not_stop_the_next(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    """In containers the pid is the same each time."""
    target = KernelCache(tmp_path / "target")
    (target.root / "tmp" / f"manifest-{os.getpid()}").mkdir(parents=True)
    assert unpack(archive, target) == (made[1], 4)


def test_merge_manifest(made: tuple[KernelCache, Manifest], tmp_path: Path) -> None:
    _, manifest = made
    key, _ = first_of(made)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert merge_manifest(empty, manifest.without({key})) == manifest.without({key})
    merged = merge_manifest(empty, replace(manifest, plans=["more"]))
    assert merged == replace(manifest, plans=["small", "more"])
    assert read_manifest(empty) == merged


def test_manifests_of_two_machines_do_not_merge(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    cache, manifest = made
    other = manifest_for(keys_for(here, signature="NVCC13.1"))
    for refuse in (merge_manifest, check_target):
        with pytest.raises(UserError) as caught:
            refuse(cache.root, other)
        assert one_line(caught) == (
            f"{cache.root} was built for another machine (NVCC13.0, sgl-deep-gemm 0.1.4.post1, "
            "other flags or path): use another directory"
        )
    assert read_manifest(cache.root) == manifest
    check_target(cache.root, manifest)
    check_target(cache.root / "nowhere", other)
    write_manifest(cache.root, manifest.without(set(manifest.entries)))
    check_target(cache.root, other)
    assert merge_manifest(cache.root, other) == other


# Prune


def test_prune_takes_what_no_plan_needs(
    made: tuple[KernelCache, Manifest], keys: CacheKeys, here: Library
) -> None:
    cache, manifest = made
    wanted = [keys.cache_key(item.kernel) for item in small_plan(max_m=16).kernels]
    going = sorted(set(manifest.entries) - set(wanted))
    assert (len(wanted), len(going)) == (2, 2)
    cache.entry("notes.txt").write_text("mine")
    cache.entry("kernel.txt").write_text("mine")
    cache.entry("folder").mkdir()
    found = superfluous(cache, wanted)
    assert found == [cache.entry(key) for key in going]
    assert prune(cache, found) == 2 * ENTRY_BYTES
    assert [path.name for path in cache.entries()] == sorted(
        [*wanted, "folder", "kernel.txt", "notes.txt"]
    )
    assert read_manifest(cache.root) == manifest.without(set(going))
    assert list((cache.root / "tmp").iterdir()) == []
    assert superfluous(cache, wanted) == []


def test_prune_without_a_manifest(made: tuple[KernelCache, Manifest]) -> None:
    cache, manifest = made
    (cache.root / "manifest.json").unlink()
    assert prune(cache, superfluous(cache, ())) == len(manifest.entries) * ENTRY_BYTES
    assert contents(cache.root) == {}


def test_prune_takes_half_entries_too(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    halve(path)
    prune(made[0], [path])
    assert key not in {each.name for each in made[0].entries()}


def test_prune_takes_a_link_and_leaves_what_it_names(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    _, path = first_of(made)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    prune(made[0], [path])
    assert not path.is_symlink()
    assert sorted(contents(tmp_path / "elsewhere")) == ["kernel.cu", "kernel.cubin"]


def test_size_of(tmp_path: Path, made: tuple[KernelCache, Manifest]) -> None:
    assert size_of(first_of(made)[1]) == ENTRY_BYTES
    assert size_of(tmp_path / "nowhere") == 0


# Plan files


def plan_json(keys: CacheKeys | None) -> dict[str, Any]:
    return {**plan_to_json(small_plan(), keys), "for": "small"}


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_plan_is_read_back(keys: CacheKeys, tmp_path: Path) -> None:
    data = plan_json(keys)
    plan = read_plan_file(write_json(tmp_path / "plan.json", data))
    assert (plan.title, plan.signature, plan.flags) == ("small", "NVCC13.0", keys.flags)
    assert plan.keys == [keys.cache_key(item.kernel) for item in small_plan().kernels]
    for item, kernel in zip(small_plan().kernels, data["kernels"], strict=True):
        assert plan.uses_of(item.kernel.name, config_of(item.kernel)) == kernel["uses"]
        assert plan.uses_of("other", config_of(item.kernel)) == []
        assert plan.uses_of(item.kernel.name, {}) == []


def test_a_plan_without_keys(tmp_path: Path) -> None:
    plan = read_plan_file(write_json(tmp_path / "plan.json", plan_json(None)))
    assert (plan.signature, plan.flags) == (None, None)
    with pytest.raises(UserError) as caught:
        _ = plan.keys
    assert one_line(caught) == (
        "the plan has no cache keys: make it where deep_gemm's headers are installed"
    )


def test_a_plan_of_nothing(tmp_path: Path) -> None:
    path = write_json(tmp_path / "plan.json", {"for": "x", "kernels": []})
    assert read_plan_file(path) == PlanFile("x", None, None, [])
    assert read_plan_file(path).keys == []


@pytest.mark.parametrize(
    "text",
    [
        "", "\xff", "3", "null", "[]", "{}", '{"for": "x"}', '{"for": "x", "kernels": 3}',
        '{"kernels": []}', '{"for": "x", "kernels": [{"name": "x"}]}',
        '{"for": "x", "kernels": [3]}',
        '{"for": "x", "kernels": [{"name": "x", "cache_key": "k", "config": {}, "uses": 3}]}',
        '{"for": "x", "kernels": [{"name": "x", "cache_key": "k", "config": {}, "uses": [{}]}]}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_plan_file(path)
    assert one_line(caught).startswith(f"{path} is not a plan of runner plan --json: ")


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_plan_file(tmp_path)
    assert one_line(caught) == f"cannot read {tmp_path}: Is a directory"


def use(*m_ranges: list[int], groups: int = 1, n: int = 4096) -> dict[str, Any]:
    return {"type": "gemm", "n": n, "k": 64, "num_groups": groups, "m_ranges": list(m_ranges)}


@pytest.mark.parametrize(
    ("uses", "words"),
    [
        ([], ""),
        ([use([1, 16])], "gemm:4096:64 M 1..16"),
        ([use([1, 16], [33, 33])], "gemm:4096:64 M 1..16, 33"),
        ([use([1, 1], [3, 3], [5, 5])], "gemm:4096:64 M 1, 3, 5"),
        ([use([1, 1], [3, 3], [5, 5], [7, 9])], "gemm:4096:64 M 1, 3, 5, ..."),
        ([use([128, 256], groups=256)], "gemm:4096:64:256 M 128..256"),
        ([use([1, 1]), use([2, 2], n=8)], "gemm:4096:64 M 1; gemm:8:64 M 2"),
        ([use([1, 1], n=n) for n in (1, 2, 3)], "gemm:1:64 M 1; gemm:2:64 M 1; gemm:3:64 M 1"),
        (
            [use([1, 1], n=n) for n in (1, 2, 3, 4, 5)],
            "gemm:1:64 M 1; gemm:2:64 M 1; gemm:3:64 M 1; and 2 more GEMMs",
        ),
    ],
)
def test_uses_in_words(uses: list[dict[str, Any]], words: str) -> None:
    assert uses_in_words(uses) == words


def test_the_helper_adds_what_the_plan_names(tmp_path: Path, keys: CacheKeys) -> None:
    cache = KernelCache(tmp_path / "one")
    item = small_plan().kernels[0]
    key = add(cache, keys, item)
    assert key == keys.cache_key(item.kernel) and size_of(cache.entry(key)) == ENTRY_BYTES
