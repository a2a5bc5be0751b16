"""Kernel table files: writing, reading, invalid files, and the bundled tables."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.kernels.call_template import CallShape, Template
from runner.kernels.kernel import Kernel
from runner.kernels.table import Origin, RecordedTable, Run, Source
from runner.kernels.table_file import (
    BUNDLED_FOLDER,
    BUNDLED_GPUS,
    bundled_gpu,
    bundled_libraries,
    bundled_table,
    read_table,
    write_table,
)
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
from runner.standin.gpus import gpu_named
from tests.unit.kernel_tables import DENSE, GROUPED, ORIGIN, RECIPE, A, B, values

SMALL = RecordedTable(
    ORIGIN,
    RECIPE,
    {DENSE: (Run(1, 16, (A,)), Run(17, 32, (B, A))), GROUPED: (Run(128, 256, ()),)},
    {"deep_gemm/a.cuh": "0" * 32, "deep_gemm/b.cuh": "f" * 32},
)
Key, Value = TypeVar("Key"), TypeVar("Value")


def test_written_table_is_read_back_as_recorded(tmp_path: Path) -> None:
    write_table(tmp_path / "t.json.gz", SMALL)
    again = read_table(tmp_path / "t.json.gz")
    recorded = replace(SMALL, origin=replace(ORIGIN, source=Source.RECORDED))
    assert values(again) == values(recorded)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]


def run_lists() -> st.SearchStrategy[tuple[Run, ...]]:
    words = st.text()
    kernel = st.builds(Kernel, words, words, words, st.lists(words).map(tuple), words)
    kernels = st.lists(kernel, max_size=2).map(tuple)
    gaps = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), kernels), max_size=4)

    def lay_out(found: list[tuple[int, int, tuple[Kernel, ...]]]) -> tuple[Run, ...]:
        runs, m = [], 0
        for gap, more, ran in found:
            runs.append(Run(m + gap, m + gap + more, ran))
            m += gap + more
        return tuple(runs)

    return gaps.map(lay_out)


def tables() -> st.SearchStrategy[RecordedTable]:
    sizes = st.integers(0, 1 << 30)
    gemms = st.builds(GemmShape, st.sampled_from(list(T)), sizes, sizes, sizes, sizes)
    tensors = st.fixed_dictionaries({"dtype": st.text(), "shape": st.lists(sizes | st.just("M"))})
    templates = st.builds(
        Template,
        st.text(),
        st.lists(tensors | sizes | st.none(), max_size=2),
        st.dictionaries(st.text(), st.text() | st.lists(sizes), max_size=2),
    )
    shapes = gemms | st.builds(CallShape.of, templates, sizes, sizes)
    recorded, arch = st.just(Source.RECORDED), st.just("sm_100f")
    origins = st.builds(Origin, st.text(), st.just(2), st.text(), sizes, arch, recorded)
    recipes = st.builds(replace, st.just(RECIPE), extra_signature=st.text(), options=st.text())
    runs = st.dictionaries(shapes, run_lists(), max_size=3)
    headers = st.dictionaries(st.text(), st.text(), max_size=3)
    return st.builds(RecordedTable, origins, recipes, runs, headers)


@given(tables(), st.randoms())
def test_tables_round_trip_and_equal_tables_give_equal_files(
    tmp_path_factory: pytest.TempPathFactory, made: RecordedTable, random: Random
) -> None:
    def shuffled(mapping: Mapping[Key, Value]) -> dict[Key, Value]:
        keys = list(mapping)
        random.shuffle(keys)
        return {key: mapping[key] for key in keys}

    one, two = (tmp_path_factory.getbasetemp() / name for name in ("one", "two"))
    write_table(one, made)
    write_table(two, replace(made, runs=shuffled(made.runs), headers=shuffled(made.headers)))
    assert one.read_bytes() == two.read_bytes()
    assert values(read_table(one)) == values(made)


CALL = CallShape.of(Template("f", [{"dtype": "bfloat16", "shape": ["M", 8]}], {"c": None}), 148)


def test_table_of_recorded_calls_is_read_back_beside_gemms(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    write_table(path, replace(SMALL, runs={CALL: (Run(1, 9, (B,)),), **SMALL.runs}))
    again = read_table(path)
    assert again.parts(CALL, range(1, 10)) == [((B,), 0, 9)]
    assert dict(again.runs) == {CALL: (Run(1, 9, (B,)),), **SMALL.runs}
    with pytest.raises(UserError, match=r"has f\(bfloat16\[M,8\], c=None\) with M 10 on 148 SMs"):
        again.parts(CALL, (9, 10))
    with pytest.raises(UserError, match="has f"):
        again.parts(replace(CALL, num_sms=132), (1,))


def test_table_without_recorded_calls_has_no_field_for_them(tmp_path: Path) -> None:
    write_table(tmp_path / "t", SMALL)
    assert "calls" not in json.loads(gzip.decompress((tmp_path / "t").read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        {"calls": 3},
        {"calls": [["text", 1, []]]},
        {"calls": [["text", 1, 1, [[1, 2, [99]]]]]},
        {"version": 2},
        {"kernels": [["a"]]},
        {"kernels": []},
        {"gemms": [["NO_TYPE", 1, 1, 1, 1, []]]},
        {"gemms": [["GEMM_NT_F8F8BF16", 1, 1, []]]},
    ],
    ids=str,
)
def test_table_with_invalid_values_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "t.json.gz"
    write_table(path, SMALL)
    data = {**json.loads(gzip.decompress(path.read_bytes())), **change}
    assert_refused(path, gzip.compress(json.dumps(data).encode()), "is not a kernel table: ")


def assert_refused(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"[]", b"3", b"{}", b'{"version": 1}', b"{", b"\xff"], ids=str)
def test_json_that_is_not_a_table_is_refused(tmp_path: Path, text: bytes) -> None:
    assert_refused(tmp_path / "t.json.gz", gzip.compress(text), "is not a kernel table: ")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    deep = gzip.compress(b"[" * 200_000)
    assert_refused(tmp_path / "t.json.gz", deep, "is not a kernel table: .*nested too deeply")


def test_truncated_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    write_table(path, SMALL)
    assert_refused(path, path.read_bytes()[:-30], "is not a kernel table: ")


def test_unreadable_table_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "t.json.gz", b"no gzip", "^cannot read ")
    with pytest.raises(UserError, match=r"^cannot read .*none: No such file"):
        read_table(tmp_path / "none")


def test_failed_write_of_a_table_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_table(tmp_path / "t", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("path", sorted(BUNDLED_FOLDER.iterdir()), ids=lambda path: path.name)
def test_bundled_table_is_named_after_its_content_and_rewritten_unchanged(
    path: Path, tmp_path: Path
) -> None:
    table = read_table(path)
    write_table(tmp_path / "t", table)
    assert gzip.decompress((tmp_path / "t").read_bytes()) == gzip.decompress(path.read_bytes())
    gpu = gpu_named(table.origin.gpu)
    assert table.origin.num_sms == gpu.num_sms
    assert path.name == f"{table.origin.library.replace(' ', '-')}-{gpu.name}.json.gz"


def test_bundled_libraries_of_each_gpu() -> None:
    for gpu in BUNDLED_GPUS:
        assert bundled_libraries(gpu) == ["sgl-deep-gemm 0.2.5", "vllm 0.33.0"]
        table = bundled_table("vllm 0.33.0", gpu)
        assert table is not None and table.origin.library == "vllm 0.33.0"
    assert bundled_table("vllm 0.32.0", "h200") is None


def test_gpu_uses_bundled_table_of_same_architecture_and_sm_count() -> None:
    assert bundled_gpu(gpu_named("h100")) == "h200"
    assert bundled_gpu(gpu_named("b300")) == "b300"
    assert bundled_gpu(gpu_named("h200", 78)) == "h20"
    assert bundled_gpu(gpu_named("h200", 100)) == "h200"
