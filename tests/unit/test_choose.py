"""Who tells the kernels: our rules where they hold, the library itself elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runner.kernels.choose import choose_source
from runner.kernels.recorded import write_table

from runner.cache.keys import first_recipe
from runner.config.environ import Environ, cache_folder
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.library import LibrarySource
from runner.kernels.rules import RULES
from runner.kernels.shipped import ShippedFirst, shipped_libraries, shipped_table
from runner.kernels.source import KernelSource
from runner.kernels.table import Demand, KernelTable, Origin, Source
from runner.standin.gpus import GPUS, gpu_named
from tests.unit.kernel_tables import DENSE, ORIGIN, RECIPE, A, B, table

KNOWN = Library(Path("/dg"), "sgl-deep-gemm", "0.1.4.post1")
OTHERS = [
    Library(Path("/dg"), "sgl-deep-gemm", "0.1.5"),
    Library(Path("/dg"), "vllm", "0.1.4.post1"),
]
HOME = {"HOME": "/home/me"}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of tables that ship; there are none in it."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr("runner.kernels.shipped._FOLDER", folder)
    shipped_table.cache_clear()
    yield folder
    shipped_table.cache_clear()


def chosen(gpu: str, library: Library | None, **values: Any) -> KernelSource:
    given = {"environ": Environ(), "environment": HOME, "version_text": None, **values}
    return choose_source(gpu_named(gpu), library, **given)


@pytest.mark.parametrize("library", [KNOWN, None], ids=["installed", "none"])
@pytest.mark.parametrize(("gpu", "num_sms"), [("h100", 132), ("h200", 132), ("h20", 78)])
def test_rules_hold_for_one_version_on_hopper(
    gpu: str, num_sms: int, library: Library | None
) -> None:
    environ = Environ(dg_jit_cpp_standard=17)
    source = chosen(gpu, library, environ=environ)
    assert source == RULES.on(gpu, num_sms, first_recipe(environ))
    assert source.origin == Origin(
        "sgl-deep-gemm 0.1.4.post1", 1, gpu, num_sms, "sm_90a", Source.RULES
    )


@pytest.mark.parametrize(
    ("gpu", "library", "ask"),
    [
        ("h200", OTHERS[0], False),
        ("h200", OTHERS[1], False),
        ("b200", KNOWN, False),
        ("h200", KNOWN, True),
    ],
    ids=["version", "name", "gpu", "asked for"],
)
def test_elsewhere_the_library_is_asked(gpu: str, library: Library, ask: bool) -> None:
    source = chosen(gpu, library, ask=ask, version_text="release 13.1")
    assert isinstance(source, LibrarySource)
    assert (source.library, source.gpu) == (library, gpu_named(gpu))
    assert source.version_text == "release 13.1"
    assert source.memo_dir == Path("/home/me/.cache/deepgemm-coldstart/tables")
    assert source.origin == Origin(
        library.title, 1, gpu, gpu_named(gpu).sms, gpu_named(gpu).arch, Source.LIBRARY
    )


def test_some_compiler_is_stood_in_where_none_is_known() -> None:
    source = chosen("h200", OTHERS[0])
    assert isinstance(source, LibrarySource)
    assert "release 13.0, V13.0.88" in source.version_text


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS if gpu.arch != "sm_90a"])
def test_without_a_library_other_gpus_are_not_known(gpu: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(gpu, None)
    assert str(caught.value) == (
        f"kernels for {gpu} ({gpu_named(gpu).arch}) are only known to the library itself, and none "
        "is installed here: pip install 'deepgemm-coldstart[library]', or give one with --library "
        "(our rules hold for sgl-deep-gemm 0.1.4.post1 on Hopper GPUs only)"
    )


# -- tables that ship -----------------------------------------------------------------------------


def ship(folder: Path, version: str, gpu: str = "b200", name: str = "sgl-deep-gemm") -> None:
    origin = replace(ORIGIN, library=f"{name} {version}", gpu=gpu, num_sms=gpu_named(gpu).sms)
    made = replace(table([(1, 16, (A,)), (17, 32, (B,))]), origin=origin)
    write_table(folder / f"{name}-{version}-{gpu}.json.gz", made)


def shape_of(made: KernelTable) -> list[Any]:
    return made.parts(DENSE, range(1, 33))


KNOWN_PARTS = [((A,), 0, 16), ((B,), 16, 32)]


def test_a_table_of_the_installed_library_comes_first(tables: Path) -> None:
    ship(tables, "0.1.5")
    source = chosen("b200", OTHERS[0])
    assert isinstance(source, ShippedFirst)
    assert source.origin == Origin(
        "sgl-deep-gemm 0.1.5", 2, "b200", 148, "sm_100f", Source.RECORDED
    )
    assert shape_of(source.table(lambda: [Demand(DENSE, range(1, 33))])) == KNOWN_PARTS
    assert isinstance(chosen("b200", OTHERS[0], ask=True), LibrarySource)
    assert isinstance(chosen("b200", OTHERS[1]), LibrarySource), "of another library"
    assert isinstance(chosen("gb300", OTHERS[0]), LibrarySource), "for another GPU"
    smaller = choose_source(
        gpu_named("b200", 100), OTHERS[0], environ=Environ(), environment=HOME, version_text=None
    )
    assert isinstance(smaller, LibrarySource), "for another number of SMs"


def test_the_environment_changes_a_tables_recipe(tables: Path) -> None:
    ship(tables, "0.1.5")
    source = chosen("b200", OTHERS[0], environ=Environ(dg_jit_cpp_standard=17))
    assert isinstance(source, ShippedFirst)
    assert source.shipped.recipe == replace(
        RECIPE, flags=("-std=c++17", "--gpu-architecture=sm_100f")
    )


def test_what_a_table_does_not_know_is_asked_of_the_library(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, so that one source tells."""
    ship(tables, "0.1.5")
    asked: list[list[Demand]] = []

    def answer(self: LibrarySource, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        asked.append(list(demands()))
        return RULES

    monkeypatch.setattr(LibrarySource, "table", answer)
    source = chosen("b200", OTHERS[0])
    wanted = Demand(DENSE, tuple(range(1, 34)))
    assert source.table(lambda: [wanted]) is RULES
    assert [[(demand.shape, tuple(demand.ms)) for demand in each] for each in asked] == [
        [(DENSE, wanted.ms)]
    ]


def test_without_a_library_the_newest_table_tells(tables: Path) -> None:
    for version, name in (
        ("0.1.5", "sgl-deep-gemm"),
        ("0.2.3", "sgl-deep-gemm"),
        ("0.33.0", "vllm"),
    ):
        ship(tables, version, name=name)
    assert shipped_libraries("b200") == [
        "sgl-deep-gemm 0.2.3",
        "sgl-deep-gemm 0.1.5",
        "vllm 0.33.0",
    ]
    assert shipped_libraries("h200") == []
    for wanted, title in (
        (None, "sgl-deep-gemm 0.2.3"),
        ("sgl-deep-gemm", "sgl-deep-gemm 0.2.3"),
        ("sgl-deep-gemm==0.1.5", "sgl-deep-gemm 0.1.5"),
        ("vllm", "vllm 0.33.0"),
    ):
        assert chosen("b200", None, wanted=wanted).origin.library == title
    with pytest.raises(UserError) as caught:
        chosen("b200", None, wanted="vllm==0.34.0")
    assert str(caught.value) == (
        "--library vllm==0.34.0 is not installed, and no table of it ships for this GPU: install "
        "it, give the path of its deep_gemm folder, or take one that does (sgl-deep-gemm==0.2.3, "
        "sgl-deep-gemm==0.1.5, vllm==0.33.0)"
    )
    source = chosen("b200", None)
    with pytest.raises(UserError, match=r"^kernels for b200 \(sm_100f\) are only known to the"):
        source.table(lambda: [Demand(DENSE, (64,))])


def test_versions_are_ordered_as_numbers(tables: Path) -> None:
    for version in ("0.9.0", "0.10.0", "0.2.3"):
        ship(tables, version)
    assert shipped_libraries("b200") == [
        "sgl-deep-gemm 0.10.0",
        "sgl-deep-gemm 0.9.0",
        "sgl-deep-gemm 0.2.3",
    ]


def test_the_rules_version_may_be_named_where_it_is_not_installed() -> None:
    source = chosen("h200", None, wanted="sgl-deep-gemm==0.1.4.post1")
    assert source.origin.source is Source.RULES


def test_rules_are_not_taken_for_a_library_that_was_named() -> None:
    with pytest.raises(UserError, match=r"--library vllm is not installed, and no table of it"):
        chosen("h200", None, wanted="vllm")


def test_where_answers_are_kept() -> None:
    assert cache_folder(HOME) == Path("/home/me/.cache/deepgemm-coldstart")
    assert cache_folder({**HOME, "XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/deepgemm-coldstart")
    assert cache_folder({}) == Path.home() / ".cache" / "deepgemm-coldstart"
