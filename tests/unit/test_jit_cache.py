"""The kernel cache on disk."""

from pathlib import Path
from threading import Barrier, Thread

import pytest

from runner.build.compiler import CompileError, NvccCompiler
from runner.build.lazy import Found, LazyJit
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import first_recipe
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.watch.shim import read_records, write_shim
from tests.unit.elf import tiny_cubin

KEY = f"kernel.gemm.{'0123' * 8}"
SECOND_KEY = f"gemm.{'0123' * 8}"
EXTRA = {"meta.json": b"{}", ".committed": b""}


def files_below(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def build(source: Path, cubin: Path, work_dir: Path) -> None:
    assert work_dir.is_dir()
    cubin.write_bytes(b"cubin of " + source.read_bytes())


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "dg")


def test_an_entry_appears_whole(cache: KernelCache) -> None:
    seen = []

    def watching(source: Path, cubin: Path, work_dir: Path) -> None:
        build(source, cubin, work_dir)
        seen.append((cache.has(KEY), cache.entry(KEY).exists(), work_dir, source.parent.parent))

    assert not cache.has(KEY)
    assert cache.add(KEY, "code", watching) is True
    assert seen == [(False, False, cache.root / "tmp", cache.root / "tmp")]
    assert cache.has(KEY)
    assert cache.entry(KEY) == cache.root / "cache" / KEY
    assert files_below(cache.root) == [f"cache/{KEY}/kernel.cu", f"cache/{KEY}/kernel.cubin"]
    assert (cache.entry(KEY) / "kernel.cu").read_text() == "code"
    assert (cache.entry(KEY) / "kernel.cubin").read_bytes() == b"cubin of code"
    assert list((cache.root / "tmp").iterdir()) == []


def test_the_loser_of_a_race_cleans_up(cache: KernelCache) -> None:
    def overtaken(source: Path, cubin: Path, work_dir: Path) -> None:
        assert cache.add(KEY, "first", build) is True
        build(source, cubin, work_dir)

    assert cache.add(KEY, "second", overtaken) is False
    assert (cache.entry(KEY) / "kernel.cubin").read_bytes() == b"cubin of first"
    assert list((cache.root / "tmp").iterdir()) == []


def test_many_writers_one_winner(cache: KernelCache) -> None:
    barrier, taken = Barrier(8), []

    def late(source: Path, cubin: Path, work_dir: Path) -> None:
        build(source, cubin, work_dir)
        barrier.wait()

    threads = [Thread(target=lambda: taken.append(cache.add(KEY, "x", late))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
    assert files_below(cache.root) == [f"cache/{KEY}/kernel.cu", f"cache/{KEY}/kernel.cubin"]


def test_a_failing_build_leaves_nothing_behind(cache: KernelCache) -> None:
    def failing(source: Path, cubin: Path, work_dir: Path) -> None:
        build(source, cubin, work_dir)
        raise CompileError("no")

    with pytest.raises(CompileError, match=r"^no$"):
        cache.add(KEY, "code", failing)
    assert not cache.has(KEY)
    assert files_below(cache.root) == []
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_build_without_a_result_leaves_nothing_behind(cache: KernelCache) -> None:
    with pytest.raises(FileNotFoundError):
        cache.add(KEY, "code", lambda source, cubin, work_dir: None)
    assert not cache.has(KEY)
    assert files_below(cache.root) == []


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
def test_a_corrupted_entry(cache: KernelCache, key: str, kept: list[str], lacking: str) -> None:
    entry = cache.entry(key)
    entry.mkdir(parents=True)
    for name in kept:
        (entry / name).write_text("")
    with pytest.raises(UserError) as caught:
        cache.has(key)
    assert str(caught.value) == f"corrupted cache entry {entry}: {lacking} missing; remove it"


@pytest.mark.parametrize("name", ["kernel.gemm.0123", "notes"])
def test_what_has_no_entrys_name_needs_no_files(cache: KernelCache, name: str) -> None:
    assert not cache.has(name)
    cache.entry(name).mkdir(parents=True)
    assert cache.has(name)
    assert not cache.holds(name, "code"), "but it holds no kernel"


def test_an_entry_of_the_second_generation_has_its_files_from_the_start(
    cache: KernelCache,
) -> None:
    assert cache.add(SECOND_KEY, "code", build, extra=EXTRA)
    assert cache.has(SECOND_KEY)
    assert sorted(path.name for path in cache.entry(SECOND_KEY).iterdir()) == [
        ".committed",
        "kernel.cu",
        "kernel.cubin",
        "meta.json",
    ]
    assert (cache.entry(SECOND_KEY) / "meta.json").read_bytes() == b"{}"
    assert cache.put(f"gemm.{'f' * 32}", "code", tiny_cubin(b"x"), extra=EXTRA)
    assert cache.holds(f"gemm.{'f' * 32}", "code")
    (cache.entry(f"gemm.{'f' * 32}") / ".committed").unlink()
    assert not cache.holds(f"gemm.{'f' * 32}", "code")


# More directories below


def test_a_text_names_one_directory_or_several() -> None:
    assert KernelCache.of_text("/a") == KernelCache(Path("/a"), ())
    assert KernelCache.of_text("/a:/b:/c") == KernelCache(Path("/a"), (Path("/b"), Path("/c")))


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/a", "/a::/b"])
def test_a_text_with_an_empty_part(text: str) -> None:
    with pytest.raises(UserError) as caught:
        KernelCache.of_text(text)
    assert str(caught.value) == (
        f"cache directory {text!r} has an empty part: it must be DIR, or WRITABLE:READONLY:..."
    )


def keys(*numbers: int) -> list[str]:
    return [f"kernel.gemm.{number:032x}" for number in numbers]


def test_directories_below_are_read_and_never_written(tmp_path: Path) -> None:
    top, middle, low = (KernelCache(tmp_path / name) for name in ("top", "middle", "low"))
    one, two, three, four = keys(1, 2, 3, 4)
    assert top.add(one, "top", build)
    assert middle.add(one, "middle", build) and middle.add(two, "middle", build)
    assert low.add(two, "low", build) and low.add(three, "low", build)
    before = files_below(tmp_path / "middle"), files_below(tmp_path / "low")
    both = KernelCache.of_text(f"{top.root}:{middle.root}:{low.root}")
    assert [both.entry(key) for key in (one, two, three, four)] == [
        top.entry(one),
        middle.entry(two),
        low.entry(three),
        top.entry(four),
    ]
    assert both.entries() == [top.entry(one), middle.entry(two), low.entry(three)]
    assert both.count() == 3
    assert [both.has(key) for key in (one, two, three, four)] == [True, True, True, False]
    both.prepare()
    assert both.add(four, "new", build) is True
    assert both.entry(four) == top.entry(four)
    both.discard(one)
    assert both.entry(one) == middle.entry(one)
    both.discard(three)  # which is not the top's to take away
    assert both.has(three)
    assert (files_below(tmp_path / "middle"), files_below(tmp_path / "low")) == before


def test_a_directory_below_need_not_be_there(tmp_path: Path) -> None:
    cache = KernelCache.of_text(f"{tmp_path / 'top'}:{tmp_path / 'gone'}")
    assert cache.entries() == [] and cache.count() == 0
    assert not cache.has(KEY)
    assert cache.entry(KEY) == tmp_path / "top" / "cache" / KEY
    assert cache.add(KEY, "code", build)
    assert not (tmp_path / "gone").exists()


def test_half_an_entry_below_is_told(tmp_path: Path) -> None:
    low = KernelCache(tmp_path / "low")
    assert low.add(KEY, "code", build)
    (low.entry(KEY) / "kernel.cubin").unlink()
    with pytest.raises(UserError) as caught:
        KernelCache.of_text(f"{tmp_path / 'top'}:{low.root}").has(KEY)
    assert str(caught.value) == (
        f"corrupted cache entry {low.entry(KEY)}: kernel.cubin missing; remove it"
    )


def test_a_file_in_place_of_an_entry(cache: KernelCache) -> None:
    cache.entry(KEY).parent.mkdir(parents=True)
    cache.entry(KEY).write_text("")
    with pytest.raises(UserError, match=r"^corrupted cache entry "):
        cache.has(KEY)
    with pytest.raises(NotADirectoryError):
        cache.add(KEY, "code", build)
    assert list((cache.root / "tmp").iterdir()) == []


def test_prepare_makes_the_directory(cache: KernelCache) -> None:
    cache.prepare()
    cache.prepare()
    assert files_below(cache.root) == []
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "cache"
    with pytest.raises(UserError) as caught:
        KernelCache(root).prepare()
    assert str(caught.value) == (
        f"cache directory {root} cannot be written (Not a directory): "
        "choose another with --cache-dir or DG_JIT_CACHE_DIR"
    )


KERNEL = Kernel("gemm", "deep_gemm/a.cuh", "gemm_impl", ("1, 2",))
BROKEN = Kernel("gemm", "deep_gemm/a.cuh", "broken_impl", ("1, 2",))


def test_memory_then_disk_then_compiler(
    cache: KernelCache, fake_nvcc: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    first, second = LazyJit(compiler, cache), LazyJit(compiler, cache)
    assert not first.is_loaded(KERNEL)
    assert [first.ensure(KERNEL) for _ in range(2)] == [Found.MISS, Found.MEMORY]
    assert first.is_loaded(KERNEL)
    assert [second.ensure(KERNEL) for _ in range(2)] == [Found.DISK, Found.MEMORY]
    entry = cache.entry(compiler.keys.cache_key(KERNEL))
    assert (entry / "kernel.cu").read_text() == compiler.keys.source(KERNEL)
    assert (entry / "kernel.cubin").read_text() == compiler.keys.source(KERNEL)


def test_a_kernel_that_does_not_compile_is_not_loaded(
    cache: KernelCache, fake_nvcc: Path, fake_library: Library
) -> None:
    jit = LazyJit(NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ())), cache)
    for _ in range(2):
        with pytest.raises(CompileError, match=r"^error: it is broken$"):
            jit.ensure(BROKEN)
    assert not jit.is_loaded(BROKEN)
    assert files_below(cache.root) == []


def test_paths_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_nvcc: Path, fake_library: Library
) -> None:
    """nvcc runs in the cache's own directory, so a relative path must not reach it."""
    monkeypatch.chdir(tmp_path)
    compiler = NvccCompiler(Path("./nvcc"), fake_library, first_recipe(Environ()))
    write_shim(Path("nvcc"), nvcc=Path(fake_nvcc.name), log_dir=Path("log"))
    assert LazyJit(compiler, KernelCache(Path("here"))).ensure(KERNEL) is Found.MISS
    assert KernelCache(tmp_path / "here").has(compiler.keys.cache_key(KERNEL))
    assert len(read_records(tmp_path / "log")) == 1
