"""The kernel cache on disk and its file locks."""

import errno
import fcntl
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import IO

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.lock import locked
from runner.errors import UserError
from tests.unit.elf import tiny_cubin

KEY = f"kernel.gemm.{'0123' * 8}"
SECOND_KEY = f"gemm.{'0123' * 8}"
EXTRA = {"meta.json": b"{}", ".committed": b""}
CUBIN = tiny_cubin(b"code")


def files_below(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "dg")


def test_put_makes_an_entry_appear_atomically(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, seen = Path.rename, []

    def watching(source: Path, target: Path) -> Path:
        seen.append((files_below(source), cache.entry(KEY).exists()))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", watching)
    assert not cache.has(KEY)
    assert cache.put(KEY, "code", b"cubin") is True
    assert seen == [(["kernel.cu", "kernel.cubin"], False)]
    assert cache.has(KEY)
    assert cache.entry(KEY) == cache.root / "cache" / KEY
    assert files_below(cache.root) == [f"cache/{KEY}/kernel.cu", f"cache/{KEY}/kernel.cubin"]
    assert (cache.entry(KEY) / "kernel.cu").read_text() == "code"
    assert (cache.entry(KEY) / "kernel.cubin").read_bytes() == b"cubin"
    assert list((cache.root / "tmp").iterdir()) == []


def test_concurrent_puts_leave_one_entry_and_no_leftovers(cache: KernelCache) -> None:
    barrier, taken = Barrier(8), []

    def write(number: int) -> None:
        barrier.wait()
        taken.append(cache.put(KEY, f"{number}", b"%d" % number))

    threads = [Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
    source, cubin = (cache.entry(KEY) / name for name in ("kernel.cu", "kernel.cubin"))
    assert source.read_bytes() == cubin.read_bytes()
    assert files_below(cache.root) == [f"cache/{KEY}/kernel.cu", f"cache/{KEY}/kernel.cubin"]


def test_put_on_full_disk_leaves_nothing_behind(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put(KEY, "code", CUBIN)
    assert not cache.has(KEY)
    assert list((cache.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "kept", "lacking"),
    [
        (KEY, ["kernel.cu"], "kernel.cubin"),
        (KEY, ["kernel.cubin"], "kernel.cu"),
        (KEY, [], "kernel.cu and kernel.cubin"),
        (SECOND_KEY, ["kernel.cu", "kernel.cubin", "meta.json"], ".committed"),
        (SECOND_KEY, ["kernel.cu", ".committed"], "kernel.cubin and meta.json"),
        (SECOND_KEY, [], "kernel.cu and kernel.cubin and meta.json and .committed"),
    ],
)
def test_has_raises_on_incomplete_entry(
    cache: KernelCache, key: str, kept: list[str], lacking: str
) -> None:
    entry = cache.entry(key)
    entry.mkdir(parents=True)
    for name in kept:
        (entry / name).write_text("")
    with pytest.raises(UserError) as caught:
        cache.has(key)
    assert str(caught.value) == f"corrupted cache entry {entry}: {lacking} missing; remove it"


@pytest.mark.parametrize("name", ["kernel.gemm.0123", "notes"])
def test_directory_without_an_entry_name_holds_no_kernel(cache: KernelCache, name: str) -> None:
    assert not cache.has(name)
    cache.entry(name).mkdir(parents=True)
    assert cache.has(name)
    assert not cache.holds(name, "code"), "but it holds no kernel"


def test_generation_2_entry_is_put_with_its_extra_files(
    cache: KernelCache,
) -> None:
    assert cache.put(SECOND_KEY, "code", CUBIN, EXTRA)
    assert cache.has(SECOND_KEY)
    assert sorted(path.name for path in cache.entry(SECOND_KEY).iterdir()) == [
        ".committed",
        "kernel.cu",
        "kernel.cubin",
        "meta.json",
    ]
    assert (cache.entry(SECOND_KEY) / "meta.json").read_bytes() == b"{}"
    assert cache.holds(SECOND_KEY, "code") and not cache.holds(SECOND_KEY, "other")
    (cache.entry(SECOND_KEY) / ".committed").unlink()
    assert not cache.holds(SECOND_KEY, "code")


# Read-only directories below the writable one


def test_of_text_parses_one_or_more_directories() -> None:
    assert KernelCache.of_text("/a") == KernelCache(Path("/a"), ())
    assert KernelCache.of_text("/a:/b:/c") == KernelCache(Path("/a"), (Path("/b"), Path("/c")))


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/a", "/a::/b"])
def test_of_text_refuses_an_empty_part(text: str) -> None:
    with pytest.raises(UserError) as caught:
        KernelCache.of_text(text)
    assert str(caught.value) == (
        f"cache directory {text!r} has an empty part: it must be DIR, or WRITABLE:READONLY:..."
    )


def keys(*numbers: int) -> list[str]:
    return [f"kernel.gemm.{number:032x}" for number in numbers]


def test_read_only_directories_are_read_but_never_written(tmp_path: Path) -> None:
    top, middle, low = (KernelCache(tmp_path / name) for name in ("top", "middle", "low"))
    one, two, three, four = keys(1, 2, 3, 4)
    assert top.put(one, "top", CUBIN)
    assert middle.put(one, "middle", CUBIN) and middle.put(two, "middle", CUBIN)
    assert low.put(two, "low", CUBIN) and low.put(three, "low", CUBIN)
    before = files_below(tmp_path / "middle"), files_below(tmp_path / "low")
    both = KernelCache.of_text(f"{top.root}:{middle.root}:{low.root}")
    assert [both.entry(key) for key in (one, two, three, four)] == [
        top.entry(one),
        middle.entry(two),
        low.entry(three),
        top.entry(four),
    ]
    assert both.entries() == [top.entry(one), middle.entry(two), low.entry(three)]
    assert len(both.entries()) == 3
    assert [both.has(key) for key in (one, two, three, four)] == [True, True, True, False]
    both.prepare()
    assert both.put(four, "new", CUBIN) is True
    assert both.entry(four) == top.entry(four)
    both.discard(one)
    assert both.entry(one) == middle.entry(one)
    both.discard(three)  # which is not the top's to take away
    assert both.has(three)
    assert (files_below(tmp_path / "middle"), files_below(tmp_path / "low")) == before


def test_missing_read_only_directory_is_ignored(tmp_path: Path) -> None:
    cache = KernelCache.of_text(f"{tmp_path / 'top'}:{tmp_path / 'gone'}")
    assert cache.entries() == [] and len(cache.entries()) == 0
    assert not cache.has(KEY)
    assert cache.entry(KEY) == tmp_path / "top" / "cache" / KEY
    assert cache.put(KEY, "code", CUBIN)
    assert not (tmp_path / "gone").exists()


def test_has_raises_on_incomplete_entry_in_read_only_directory(tmp_path: Path) -> None:
    low = KernelCache(tmp_path / "low")
    assert low.put(KEY, "code", CUBIN)
    (low.entry(KEY) / "kernel.cubin").unlink()
    with pytest.raises(UserError) as caught:
        KernelCache.of_text(f"{tmp_path / 'top'}:{low.root}").has(KEY)
    assert str(caught.value) == (
        f"corrupted cache entry {low.entry(KEY)}: kernel.cubin missing; remove it"
    )


def test_file_in_place_of_an_entry_directory_is_an_error(cache: KernelCache) -> None:
    cache.entry(KEY).parent.mkdir(parents=True)
    cache.entry(KEY).write_text("")
    with pytest.raises(UserError, match=r"^corrupted cache entry "):
        cache.has(KEY)
    with pytest.raises(NotADirectoryError):
        cache.put(KEY, "code", CUBIN)
    assert list((cache.root / "tmp").iterdir()) == []


def test_prepare_creates_an_empty_cache_and_may_be_repeated(cache: KernelCache) -> None:
    cache.prepare()
    cache.prepare()
    assert files_below(cache.root) == []
    assert list((cache.root / "tmp").iterdir()) == []


def test_prepare_of_unwritable_path_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "cache"
    with pytest.raises(UserError) as caught:
        KernelCache(root).prepare()
    assert str(caught.value) == (
        f"cache directory {root} cannot be written (Not a directory): "
        "choose another with --cache-dir or DG_JIT_CACHE_DIR"
    )


# What must be built


def broken_source(entry: Path) -> None:
    (entry / "kernel.cu").write_text("other")


def no_cubin(entry: Path) -> None:
    (entry / "kernel.cubin").unlink()


def cut_cubin(entry: Path) -> None:
    (entry / "kernel.cubin").write_bytes(CUBIN[:-1])


@pytest.mark.parametrize("damage", [broken_source, no_cubin, cut_cubin])
def test_keys_to_build_discards_only_broken_entries(
    cache: KernelCache, damage: Callable[[Path], None]
) -> None:
    whole, broken, absent = keys(1, 2, 3)
    for key in (whole, broken):
        assert cache.put(key, "code", CUBIN)
    damage(cache.entry(broken))
    before = cache.entry(whole).stat().st_ino
    assert cache.keys_to_build(dict.fromkeys(keys(1, 2, 3), "code")) == [broken, absent]
    assert [path.name for path in cache.entries()] == [whole]
    assert cache.entry(whole).stat().st_ino == before
    assert list((cache.root / "tmp").iterdir()) == []


def test_keys_to_build_discards_cubins_whose_digest_differs(cache: KernelCache) -> None:
    assert cache.put(KEY, "code", CUBIN)
    assert cache.keys_to_build({KEY: "code"}, {"another key": "0" * 64}) == []
    assert cache.keys_to_build({KEY: "code"}, {KEY: "0" * 64}) == [KEY]
    assert cache.entries() == []


def test_keys_to_build_keeps_entry_another_process_replaced_meanwhile(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builders find a broken entry; the other one replaces it before this one discards it."""
    assert cache.put(KEY, "broken", CUBIN)
    holds, inodes = KernelCache.holds, []

    def slow(self: KernelCache, *arguments: str) -> bool:
        found = holds(self, *arguments)
        if not inodes:
            self.discard(KEY)
            assert self.put(KEY, "code", CUBIN)
            inodes.append(self.entry(KEY).stat().st_ino)
        return found

    monkeypatch.setattr(KernelCache, "holds", slow)
    assert cache.keys_to_build({KEY: "code"}) == []
    assert cache.entry(KEY).stat().st_ino == inodes[0]


# Locks


def test_held_exclusive_lock_cannot_be_taken_again(tmp_path: Path) -> None:
    with locked(tmp_path) as first:
        for _ in range(2):
            with locked(tmp_path, wait=False) as second:
                assert (first, second) == (True, False)
    with locked(tmp_path, wait=False) as after:
        assert after is True


def test_shared_locks_coexist_and_exclude_an_exclusive_lock(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True, wait=False) as second:
        assert second is True
        with locked(tmp_path, wait=False) as alone:
            assert alone is False
    with locked(tmp_path), locked(tmp_path, shared=True, wait=False) as late:
        assert late is False


HOLDER = """
import sys
from pathlib import Path
from runner.cache.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_lock_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with locked(tmp_path, wait=False) as lock:
            assert lock is False
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with locked(tmp_path) as lock:
        assert lock is True


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: IO[str] | int, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = KernelCache(tmp_path)
    assert cache.put(KEY, "broken", CUBIN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for wait in (True, False):
            with locked(tmp_path, wait=wait) as lock:
                assert lock is None
                assert cache.keys_to_build({KEY: "code"}) == [KEY]
    assert [str(warning.message) for warning in caught] == [
        f"the file system of {tmp_path} has no file locks: use it from one process at a time"
    ]


def test_other_locking_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: IO[str], operation: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"), locked(tmp_path):
        pass
