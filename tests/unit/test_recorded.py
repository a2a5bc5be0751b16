"""Recorded tables as files: written, read back, refused, and made one of several."""

import gzip
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runner.kernels.recorded import RecordedHeaders, merged, read_table, step_of, write_table

from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.table import Demand, Origin, RecordedTable, Run, Source
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape
from runner.kernels.types import DeepGemmKernelType as T
from tests.unit.kernel_tables import DENSE, GROUPED, ORIGIN, RECIPE, A, B, C, Runs, table

HEADERS = {"deep_gemm/a.cuh": "0" * 32, "deep_gemm/b.cuh": "f" * 32}
SMALL = RecordedTable(
    ORIGIN,
    RECIPE,
    {DENSE: (Run(1, 16, (A,)), Run(17, 32, (B, A))), GROUPED: (Run(128, 256, ()),)},
    HEADERS,
)


def values(made: RecordedTable) -> tuple[Any, ...]:
    return made.origin, made.recipe, dict(made.runs), dict(made.headers)


def as_recorded(origin: Origin, arch: str) -> Origin:
    return replace(origin, source=Source.RECORDED, arch=arch)


def test_a_table_is_read_back(tmp_path: Path) -> None:
    write_table(tmp_path / "t.json.gz", SMALL)
    again = read_table(tmp_path / "t.json.gz")
    assert values(again) == (
        as_recorded(ORIGIN, "sm_100f"),
        RECIPE,
        dict(SMALL.runs),
        HEADERS,
    )
    assert again.kernels_of(DENSE.call(20)) == (B, A)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]
    write_table(tmp_path / "again.json.gz", again)
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "t.json.gz").read_bytes()


def shapes() -> st.SearchStrategy[GemmShape]:
    sizes = st.integers(0, 1 << 30)
    return st.builds(GemmShape, st.sampled_from(list(T)), sizes, sizes, sizes, sizes)


def run_lists() -> st.SearchStrategy[tuple[Run, ...]]:
    kernels = st.lists(
        st.builds(
            Kernel, st.text(), st.text(), st.text(), st.lists(st.text()).map(tuple), st.text()
        ),
        max_size=2,
    ).map(tuple)
    gaps = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), kernels), max_size=4)

    def laid_out(found: list[tuple[int, int, tuple[Kernel, ...]]]) -> tuple[Run, ...]:
        runs, m = [], 0
        for gap, more, ran in found:
            runs.append(Run(m + gap, m + gap + more, ran))
            m += gap + more
        return tuple(runs)

    return gaps.map(laid_out)


def tables() -> st.SearchStrategy[RecordedTable]:
    origins = st.builds(
        Origin,
        st.text(),
        st.just(2),
        st.text(),
        st.integers(1, 1024),
        st.just("sm_100f"),
        st.just(Source.RECORDED),
    )
    recipes = st.builds(
        replace,
        st.just(RECIPE),
        extra_signature=st.text(),
        options=st.text(),
    )
    runs = st.dictionaries(shapes(), run_lists(), max_size=3)
    headers = st.dictionaries(st.text(), st.text(), max_size=3)
    return st.builds(RecordedTable, origins, recipes, runs, headers)


@given(tables(), st.randoms())
def test_any_table_is_read_back_and_equal_ones_are_equal_files(
    made: RecordedTable, random: Any
) -> None:
    def shuffled(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
        keys = list(mapping)
        random.shuffle(keys)
        return {key: mapping[key] for key in keys}

    twin = replace(made, runs=shuffled(made.runs), headers=shuffled(made.headers))
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        write_table(one, made)
        write_table(two, twin)
        assert one.read_bytes() == two.read_bytes()
        assert values(read_table(one)) == values(made)


def packed(data: Any) -> bytes:
    return gzip.compress(json.dumps(data).encode(), mtime=0)


def whole() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "t", SMALL)
        data: dict[str, Any] = json.loads(gzip.decompress((Path(folder) / "t").read_bytes()))
        return data


@pytest.mark.parametrize(
    "content",
    [
        packed([]),
        packed(3),
        packed({}),
        packed({"version": 1}),
        packed({**whole(), "version": 2}),
        packed({**whole(), "kernels": [["a"]]}),
        packed({**whole(), "kernels": []}),
        packed({**whole(), "gemms": [["NO_TYPE", 1, 1, 1, 1, []]]}),
        packed({**whole(), "gemms": [["GEMM_NT_F8F8BF16", 1, 1, []]]}),
        packed(whole())[:-30],
        gzip.compress(b"{", mtime=0),
        gzip.compress(b"\xff", mtime=0),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path} is not a table of kernels: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no gzip"])
def test_a_table_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.json.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_table(tmp_path / "t", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_how_far_apart_m_are() -> None:
    assert {kind: step_of(kind) for kind in T} == {
        kind: 128 if kind in CONTIGUOUS_TYPES else 1 for kind in T
    }


def test_headers_where_the_library_is_not_at_hand() -> None:
    headers = RecordedHeaders(HEADERS)
    assert headers.header_hash("deep_gemm/b.cuh") == "f" * 32
    with pytest.raises(KeyError):
        headers.header_hash("deep_gemm/c.cuh")


# -- several tables -------------------------------------------------------------------------------


def test_of_several_tables_one_is_made() -> None:
    one = replace(table([(1, 16, (A,)), (40, 48, (B,))]), headers={"a": "1"})
    two = replace(table([(17, 39, (A,)), (49, 60, (C,))]), headers={"b": "2"})
    three = table([(128, 256, (C,)), (384, 384, (C,))], GROUPED)
    made = merged([one, two, three])
    assert values(made) == (
        ORIGIN,
        RECIPE,
        {
            DENSE: (Run(1, 39, (A,)), Run(40, 48, (B,)), Run(49, 60, (C,))),
            GROUPED: (Run(128, 384, (C,)),),
        },
        {"a": "1", "b": "2"},
    )
    assert values(merged([one])) == values(one)
    assert dict(one.runs) == {DENSE: (Run(1, 16, (A,)), Run(40, 48, (B,)))}, "which is as it was"


@given(st.lists(st.sampled_from([(A,), (B, C), ()]), min_size=12, max_size=12), st.data())
def test_a_table_in_pieces_is_the_table(
    each: list[tuple[Kernel, ...]], data: st.DataObject
) -> None:
    whole_table = table([(m, m, kernels) for m, kernels in enumerate(each, 1)])
    where = data.draw(st.lists(st.integers(0, 2), min_size=12, max_size=12))
    pieces: list[Runs] = [[], [], []]
    for m, (kernels, piece) in enumerate(zip(each, where, strict=True), 1):
        pieces[piece].append((m, m, kernels))
    made = merged([table(piece) for piece in pieces])
    assert values(made) == values(merged([whole_table]))
    assert made.lacking(Demand(DENSE, range(1, 13))) == []


@pytest.mark.parametrize(
    "runs",
    [
        [(1, 1, (A,)), (1, 1, (A,))],
        [(1, 30, (A,)), (10, 12, (A,))],
        [(1, 16, (A,)), (10, 30, (A,))],
    ],
    ids=["twice", "inside", "across"],
)
def test_tables_that_overlap_know_each_m_once(runs: Runs) -> None:
    """As the GEMM does that every worker is asked for."""
    made = merged([table([run]) for run in runs])
    last = max(last for _, last, _ in runs)
    assert made.runs[DENSE] == (Run(1, last, (A,)),)
    assert made.lacking(Demand(DENSE, range(1, last + 1))) == []
