"""The source of kernels: built-in rules, a bundled table, or the library itself."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.keys import first_recipe
from runner.kernels.library import LibrarySource
from runner.kernels.rules import RULES
from runner.kernels.source import BundledFirst, KernelSource, choose_source
from runner.kernels.table import Demand, KernelTable, Origin, Source
from runner.kernels.table_file import bundled_libraries, bundled_table, write_table
from runner.standin.gpus import GPUS, gpu_named
from tests.unit.kernel_tables import DENSE, ORIGIN, RECIPE, A, B, table

RULED = Library(Path("/dg"), "sgl-deep-gemm", "0.1.4.post1")
NEWER = Library(Path("/dg"), "sgl-deep-gemm", "0.1.5")
VLLM = Library(Path("/dg"), "vllm", "0.1.4.post1")


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of the bundled tables."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr("runner.kernels.table_file.BUNDLED_FOLDER", folder)
    bundled_table.cache_clear()
    yield folder
    bundled_table.cache_clear()


def bundle(folder: Path, version: str, gpu: str = "b200", name: str = "sgl-deep-gemm") -> None:
    origin = replace(ORIGIN, library=f"{name} {version}", gpu=gpu, num_sms=gpu_named(gpu).num_sms)
    made = replace(table([(1, 16, (A,)), (17, 32, (B,))]), origin=origin)
    write_table(folder / f"{name}-{version}-{gpu}.json.gz", made)


def choose(gpu: str, library: Library | str | None, environ: Environ | None = None) -> KernelSource:
    return choose_source(gpu_named(gpu), library, environ or Environ())


UNKNOWN = r"^only the library itself knows its kernels for {} \({}\), and none is installed here: "


@pytest.mark.parametrize("library", [RULED, None, "sgl-deep-gemm==0.1.4.post1"], ids=str)
@pytest.mark.parametrize(("gpu", "num_sms"), [("h100", 132), ("h200", 132), ("h20", 78)])
def test_rules_cover_one_version_on_hopper(
    gpu: str, num_sms: int, library: Library | str | None
) -> None:
    environ = Environ(dg_jit_cpp_standard=17)
    source = choose(gpu, library, environ)
    assert source == RULES.on(gpu, num_sms, first_recipe(environ))
    assert source.origin == Origin(
        "sgl-deep-gemm 0.1.4.post1", 1, gpu, num_sms, "sm_90a", Source.RULES
    )


@pytest.mark.parametrize(
    ("gpu", "library", "ask"),
    [("h200", NEWER, False), ("h200", VLLM, False), ("b200", RULED, False), ("h200", RULED, True)],
    ids=["other version", "other name", "other gpu", "always_ask"],
)
def test_library_is_asked_if_rules_do_not_cover_it(gpu: str, library: Library, ask: bool) -> None:
    text = "release 13.1"
    source = choose_source(gpu_named(gpu), library, Environ(), version_text=text, always_ask=ask)
    assert isinstance(source, LibrarySource)
    assert (source.library, source.gpu, source.version_text) == (library, gpu_named(gpu), text)
    assert source.origin == Origin(
        library.title, 1, gpu, gpu_named(gpu).num_sms, gpu_named(gpu).arch, Source.LIBRARY
    )


def test_gpu_without_rules_is_refused_if_no_library_is_installed() -> None:
    for gpu in GPUS:
        if gpu.arch != "sm_90a":
            with pytest.raises(UserError, match=UNKNOWN.format(gpu.name, gpu.arch)):
                choose(gpu.name, None)
    with pytest.raises(UserError, match=UNKNOWN.format("h200", "sm_90a")):
        choose_source(gpu_named("h200"), None, Environ(), always_ask=True)


# -- bundled tables -------------------------------------------------------------------------------


def test_bundled_table_is_preferred_only_for_its_library_gpu_and_sm_count(tables: Path) -> None:
    bundle(tables, "0.1.5")
    source = choose("b200", NEWER)
    assert isinstance(source, BundledFirst)
    assert source.origin == Origin(
        "sgl-deep-gemm 0.1.5", 2, "b200", 148, "sm_100f", Source.RECORDED
    )
    made = source.table(lambda: [Demand(DENSE, range(1, 33))])
    assert made.parts(DENSE, range(1, 33)) == [((A,), 0, 16), ((B,), 16, 32)]
    assert isinstance(
        choose_source(gpu_named("b200"), NEWER, Environ(), always_ask=True), LibrarySource
    )
    assert isinstance(choose("b200", VLLM), LibrarySource), "the table is another library's"
    assert isinstance(choose("gb300", NEWER), LibrarySource), "the table is for another GPU"
    fewer_sms = choose_source(gpu_named("b200", 100), NEWER, Environ())
    assert isinstance(fewer_sms, LibrarySource), "the table is for another number of SMs"


def test_bundled_table_is_not_used_if_headers_differ(tables: Path, tmp_path: Path) -> None:
    header = tmp_path / "dg" / "include" / "deep_gemm" / "a.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("int a;\n")
    library = Library(tmp_path / "dg", "sgl-deep-gemm", "0.1.5")
    made = replace(
        table([(1, 16, (A,))]), headers={"deep_gemm/a.cuh": library.header_hash("deep_gemm/a.cuh")}
    )
    write_table(tables / "sgl-deep-gemm-0.1.5-b200.json.gz", made)
    assert isinstance(choose("b200", library), BundledFirst)
    header.write_text("int patched;\n")
    patched = Library(tmp_path / "dg", "sgl-deep-gemm", "0.1.5")
    assert isinstance(choose("b200", patched), LibrarySource)
    header.unlink()
    without = Library(tmp_path / "dg", "sgl-deep-gemm", "0.1.5")
    assert isinstance(choose("b200", without), LibrarySource)


def test_environment_changes_flags_of_bundled_table(tables: Path) -> None:
    bundle(tables, "0.1.5")
    source = choose("b200", NEWER, Environ(dg_jit_cpp_standard=17))
    assert isinstance(source, BundledFirst)
    flags = ("-std=c++17", "--gpu-architecture=sm_100f")
    assert source.bundled.recipe == replace(RECIPE, flags=flags)


def test_library_is_asked_if_bundled_table_is_incomplete(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle(tables, "0.1.5")
    asked: list[list[Demand]] = []

    def answer(self: LibrarySource, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        asked.append(list(demands()))
        return RULES

    monkeypatch.setattr(LibrarySource, "table", answer)
    demand = Demand(DENSE, tuple(range(1, 34)))
    assert choose("b200", NEWER).table(lambda: [demand]) is RULES
    assert asked == [[demand]]


def test_newest_or_named_bundled_table_is_used_without_a_library(tables: Path) -> None:
    for version in ("0.9.0", "0.10.0", "0.2.3"):
        bundle(tables, version)
    bundle(tables, "0.33.0", name="vllm")
    assert bundled_libraries("b200") == [
        "sgl-deep-gemm 0.10.0",
        "sgl-deep-gemm 0.9.0",
        "sgl-deep-gemm 0.2.3",
        "vllm 0.33.0",
    ]
    for wanted, title in (
        (None, "sgl-deep-gemm 0.10.0"),
        ("sgl-deep-gemm", "sgl-deep-gemm 0.10.0"),
        ("sgl-deep-gemm==0.9.0", "sgl-deep-gemm 0.9.0"),
        ("vllm", "vllm 0.33.0"),
    ):
        assert choose("b200", wanted).origin.library == title
    with pytest.raises(UserError) as caught:
        choose("b200", "vllm==0.34.0")
    assert str(caught.value) == (
        "--library vllm==0.34.0 is not installed, and no table of it ships for this GPU: install "
        "it, give the path of its deep_gemm folder, or use one that does (sgl-deep-gemm==0.10.0, "
        "sgl-deep-gemm==0.9.0, sgl-deep-gemm==0.2.3, vllm==0.33.0)"
    )
    with pytest.raises(UserError, match=UNKNOWN.format("b200", "sm_100f")):
        choose("b200", None).table(lambda: [Demand(DENSE, (64,))])


def test_rules_are_used_after_bundled_table_unless_another_library_is_named(tables: Path) -> None:
    bundle(tables, "0.2.3", gpu="h200")
    demands = [Demand(DENSE, (64,))]
    assert choose("h200", None).table(lambda: demands).origin.source is Source.RULES
    with pytest.raises(UserError, match=UNKNOWN.format("h200", "sm_90a")):
        choose("h200", "sgl-deep-gemm==0.2.3").table(lambda: demands)
    with pytest.raises(UserError, match="--library vllm is not installed, and no table of it"):
        choose("h200", "vllm")
