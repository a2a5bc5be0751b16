"""Packed caches: reproducible archives, unpacking, and malformed or hostile archives."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.cache.archive import pack, unpack
from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, sha256, write_manifest
from runner.cache.verify import verify
from runner.errors import UserError
from runner.kernels.keys import CacheKeys
from tests.unit.kept_cache import change, expected, first_of, one_line, remove
from tests.unit.small_cache import (
    contents,
    fill,
    keys_for,
    second_keys_for,
    second_library,
    small_library,
    small_plan,
)


@pytest.fixture
def archive(made: tuple[KernelCache, Manifest], tmp_path: Path) -> Path:
    path = tmp_path / "kernels.tar.gz"
    assert pack(*made, path) == path.stat().st_size
    return path


def age(root: Path, seconds: int) -> None:
    for path in [root, *root.rglob("*")]:
        os.utime(path, (seconds, seconds))
        path.chmod(0o700)


def test_pack_is_byte_for_byte_reproducible(
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
        "again.tar.gz",
        "deep_gemm",
        "kernels.tar.gz",
        "made",
        "twin",
    ]


def test_archive_holds_manifest_and_entry_files_with_neutral_metadata(
    made: tuple[KernelCache, Manifest], archive: Path
) -> None:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    files = [
        f"cache/{key}/{file}"
        for key in sorted(made[1].entries)
        for file in ("kernel.cu", "kernel.cubin")
    ]
    assert [member.name for member in members] == ["manifest.json", *files]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_pack_skips_files_the_manifest_does_not_name(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    made[0].entry("notes.txt").write_text("")
    again = tmp_path / "again.tar.gz"
    pack(*made, again)
    assert again.read_bytes() == archive.read_bytes()


def test_pack_refuses_cache_with_missing_kernels(
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
def test_pack_to_unwritable_path_is_a_one_line_error(
    made: tuple[KernelCache, Manifest], tmp_path: Path, folder: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "x.tar.gz"
    with pytest.raises(UserError) as caught:
        pack(*made, path)
    assert one_line(caught) == f"cannot write {path}: {words}"


def test_pack_refuses_entry_changed_since_it_was_built(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    _, path = first_of(made)
    change(path)
    with pytest.raises(UserError) as caught:
        pack(*made, tmp_path / "x.tar.gz")
    assert one_line(caught) == (
        f"{path} is not what was built: run runner cache verify {made[0].root}"
    )
    assert not (tmp_path / "x.tar.gz").exists()


def test_unpack_restores_the_packed_cache(
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


def test_unpack_replaces_entry_absent_from_the_target_manifest(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    key, _ = first_of(made)
    target = KernelCache(tmp_path / "target")
    target.entry(key).mkdir(parents=True)
    (target.entry(key) / "kernel.cu").write_text("mine")
    (target.entry(key) / "kernel.cubin").write_text("mine")
    manifest, placed = unpack(archive, target)
    assert placed == 4
    assert manifest == made[1]
    assert len(target.entries()) == 4
    assert unpack(archive, target) == (made[1], 0)


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
    """Make one source invalid UTF-8, with a manifest digest that matches it."""
    (head, data), (source, text), *rest = members
    manifest = json.loads(data)
    key = source.name.split("/")[1]
    manifest["entries"][key]["source_sha256"] = sha256(text + b"\xff")
    return [
        plain(head.name, json.dumps(manifest).encode()),
        plain(source.name, text + b"\xff"),
        *rest,
    ]


def with_key(key: str) -> Callable[[Members], Members]:
    """Replace the manifest's entries by a single one under ``key``."""

    def edit(members: Members) -> Members:
        (head, data), *rest = members
        manifest = json.loads(data)
        manifest["entries"] = {key: next(iter(manifest["entries"].values()))}
        return [plain(head.name, json.dumps(manifest).encode()), *rest]

    return edit


NO_KEY = "{archive}: its manifest names '../evil', which is not a kernel's key"
EXPECTED = "{archive} is not a packed cache: {found} where {expected} was expected"

HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "outside": (
        lambda m: [*m, plain("../evil")],
        "{archive} holds ../evil, which its manifest does not name",
    ),
    "a key that is a path": (with_key("../evil"), NO_KEY),
    "through the cache": (
        lambda m: [m[0], plain("cache/../../evil/kernel.cu"), *m[1:]],
        EXPECTED.replace("{found}", "cache/../../evil/kernel.cu"),
    ),
    "another file": (
        lambda m: [m[0], plain(m[1][0].name + "x"), *m[1:]],
        EXPECTED.replace("{found}", "{expected}x"),
    ),
    "second manifest": (
        lambda m: [*m, m[0]],
        "{archive} holds manifest.json, which its manifest does not name",
    ),
    "symlink": (with_first(tarfile.SYMTYPE), "{archive}: {expected} is not a plain file"),
    "hard link": (
        with_first(tarfile.LNKTYPE, "manifest.json"),
        "{archive}: {expected} is not a plain file",
    ),
    "folder": (with_first(tarfile.DIRTYPE), "{archive}: {expected} is not a plain file"),
    "device": (with_first(tarfile.CHRTYPE), "{archive}: {expected} is not a plain file"),
    "other source": (
        lambda m: [m[0], plain(m[1][0].name, b"x"), *m[2:]],
        "{archive}: {expected} does not match its manifest",
    ),
    "other cubin": (
        lambda m: [*m[:2], plain(m[2][0].name, b"x"), *m[3:]],
        "{archive}: {expected}bin does not match its manifest",
    ),
    "a cubin less": (
        lambda m: m[:-1],
        EXPECTED.replace("{found}", "nothing").replace("{expected}", "{last}"),
    ),
    "manifest alone": (lambda m: m[:1], EXPECTED.replace("{found}", "nothing")),
    "nothing": (
        lambda m: [],
        EXPECTED.replace("{found}", "nothing").replace("{expected}", "manifest.json"),
    ),
    "late manifest": (
        lambda m: [*m[1:], m[0]],
        EXPECTED.replace("{found}", "{expected}").replace(
            "where {expected}", "where manifest.json"
        ),
    ),
    "linked manifest": (
        lambda m: [link("manifest.json", tarfile.SYMTYPE, "/etc/passwd"), *m[1:]],
        "{archive}: manifest.json is not a plain file",
    ),
    "cubin first": (
        lambda m: [m[0], m[2], m[1], *m[3:]],
        EXPECTED.replace("{found}", "{expected}bin"),
    ),
    "source no text": (
        garble_source,
        "cannot read {archive}: 'utf-8' codec can't decode byte 0xff",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_archive_is_a_one_line_error_and_leaves_only_whole_entries(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path, case: str
) -> None:
    edit, words = HOSTILE[case]
    members = members_of(archive)
    bad = tmp_path / "bad.tar.gz"
    write_archive(bad, edit(members))
    target = KernelCache(tmp_path / "out" / "target")
    target.prepare()
    with pytest.raises(UserError) as caught:
        unpack(bad, target)
    first, last = members[1][0].name, members[-1][0].name
    line = words.format(archive=bad, expected=first, last=last)
    assert one_line(caught).startswith(line)
    assert case == "source no text" or one_line(caught) == line
    assert_whole(target, made[1])
    assert list((tmp_path / "out").iterdir()) == [target.root]


def assert_whole(target: KernelCache, manifest: Manifest) -> None:
    """The cache holds nothing but whole entries that the manifest names."""
    assert list((target.root / "tmp").iterdir()) == []
    assert {path.name for path in target.root.iterdir()} <= {"tmp", "cache"}
    assert verify(target, expected(manifest, wanted=())) == []


@pytest.mark.parametrize("data", [b"", b"no archive", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(30)])
def test_unpack_refuses_file_that_is_not_an_archive(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(data)
    target = KernelCache(tmp_path / "target")
    with pytest.raises(UserError) as caught:
        unpack(path, target)
    assert one_line(caught).startswith(f"cannot read {path}: ")
    assert len(target.entries()) == 0


def outcome(data: bytes, manifest: Manifest) -> str:
    """Unpack ``data``: "placed" or "refused"; either way the cache holds only whole entries."""
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
        assert len(target.entries()) == len(manifest.entries)
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
def test_unpack_refuses_truncated_archive(
    packed: tuple[bytes, Manifest], data: st.DataObject
) -> None:
    whole, manifest = packed
    length = data.draw(st.integers(0, len(whole) - 1))
    # The last bytes are padding: an archive cut within them is still complete.
    filled = len(whole) - 64
    assert outcome(whole, manifest) == "placed"
    assert outcome(whole[:length], manifest) == "refused" or length > filled


def test_unpack_of_archive_with_flipped_bit_places_all_or_refuses(
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


def test_error_about_manifest_in_archive_names_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    write_archive(path, [plain("manifest.json", b"{}")])
    with pytest.raises(UserError) as caught:
        unpack(path, KernelCache(tmp_path / "target"))
    assert str(path) in one_line(caught) and "target" not in one_line(caught)


def test_unpack_works_after_a_killed_unpack_with_the_same_pid(
    made: tuple[KernelCache, Manifest], archive: Path, tmp_path: Path
) -> None:
    """Containers often reuse a pid, so a temporary file may already exist."""
    target = KernelCache(tmp_path / "target")
    (target.root / "tmp" / f"manifest-{os.getpid()}").mkdir(parents=True)
    assert unpack(archive, target) == (made[1], 4)


# Entries of JIT generation 2


@pytest.fixture
def second(tmp_path: Path) -> tuple[KernelCache, Manifest]:
    library = second_library(tmp_path / "second_gemm")
    return fill(tmp_path / "second", second_keys_for(library))


def test_pack_keeps_all_four_files_of_generation_2_entries(
    second: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    pack(*second, tmp_path / "x.tar.gz")
    files = ("kernel.cu", "kernel.cubin", "meta.json", ".committed")
    assert [info.name for info, _ in members_of(tmp_path / "x.tar.gz")] == [
        "manifest.json",
        *(f"cache/{key}/{file}" for key in sorted(second[1].entries) for file in files),
    ]
    target = KernelCache(tmp_path / "target")
    target.prepare()
    assert unpack(tmp_path / "x.tar.gz", target) == (second[1], 4)
    write_manifest(target.root, second[1])
    assert contents(target.root) == contents(second[0].root)
    assert unpack(tmp_path / "x.tar.gz", target) == (second[1], 0)


@pytest.mark.parametrize(
    ("dropped", "found"),
    [(4, "cache/{next}/kernel.cu"), (3, "cache/{key}/.committed"), (-1, "nothing")],
)
def test_unpack_refuses_archive_with_a_missing_file(
    second: tuple[KernelCache, Manifest], tmp_path: Path, dropped: int, found: str
) -> None:
    pack(*second, tmp_path / "x.tar.gz")
    members = members_of(tmp_path / "x.tar.gz")
    name = members[dropped][0].name
    keys = sorted(second[1].entries)
    words = found.format(key=keys[0], next=keys[1])
    del members[dropped]
    write_archive(tmp_path / "bad.tar.gz", members)
    target = KernelCache(tmp_path / "target")
    target.prepare()
    with pytest.raises(UserError) as caught:
        unpack(tmp_path / "bad.tar.gz", target)
    assert one_line(caught) == (
        f"{tmp_path}/bad.tar.gz is not a packed cache: {words} where {name} was expected"
    )
    assert len(target.entries()) == (3 if dropped == -1 else 0)
