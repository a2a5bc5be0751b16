"""Plan files: reading, invalid files, and uses as text."""

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cache.manifest import Manifest
from runner.cache.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.errors import UserError
from runner.kernels.describe import config_of
from runner.kernels.keys import CacheKeys
from runner.planning.plan import plan_to_json
from tests.unit.kept_cache import one_line
from tests.unit.small_cache import NVCC_TEXT, second_keys_for, second_library, small_plan


def plan_json(keys: CacheKeys | None) -> dict[str, Any]:
    return {**plan_to_json(small_plan(), keys), "for": "small"}


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_plan_file_is_read_with_title_target_keys_and_uses(keys: CacheKeys, tmp_path: Path) -> None:
    data = plan_json(keys)
    plan = read_plan_file(write_json(tmp_path / "plan.json", data))
    assert plan.title == "small"
    assert plan.target == Manifest(
        library="sgl-deep-gemm 0.1.4.post1",
        arch="sm_90a",
        signature="NVCC13.0",
        flags=keys.flags,
        built_with="NVCC13.0",
        generation=1,
    )
    assert plan.keys == [keys.cache_key(item.kernel) for item in small_plan().kernels]
    for item, kernel in zip(small_plan().kernels, data["kernels"], strict=True):
        assert plan.uses_of(item.kernel.name, config_of(item.kernel)) == kernel["uses"]
        assert plan.uses_of("other", config_of(item.kernel)) == []
        assert plan.uses_of(item.kernel.name, {}) == []


def test_plan_file_for_generation_2_has_its_keys_and_target(tmp_path: Path) -> None:
    keys = second_keys_for(second_library(tmp_path / "deep_gemm"))
    data = {**plan_json(keys), "generation": 2}
    plan = read_plan_file(write_json(tmp_path / "plan.json", data))
    assert plan.keys == [keys.cache_key(item.kernel) for item in small_plan().kernels]
    assert plan.target is not None
    assert (plan.target.generation, plan.target.extra_signature) == (2, "deep-gemm")
    assert (plan.target.signature, plan.target.flags) == (NVCC_TEXT, keys.flags)
    older = {name: data[name] for name in data if name not in ("generation", "extra_signature")}
    target = read_plan_file(write_json(tmp_path / "older.json", older)).target
    assert target is not None and (target.generation, target.extra_signature) == (1, "")


def test_keys_of_plan_file_without_keys_is_a_one_line_error(tmp_path: Path) -> None:
    plan = read_plan_file(write_json(tmp_path / "plan.json", plan_json(None)))
    assert plan.target is None
    with pytest.raises(UserError) as caught:
        _ = plan.keys
    assert one_line(caught) == (
        "the plan has no cache keys: make it where deep_gemm's headers are installed"
    )


def test_empty_plan_file_has_no_keys(tmp_path: Path) -> None:
    path = write_json(tmp_path / "plan.json", {"version": 1, "for": "x", "kernels": []})
    assert read_plan_file(path) == PlanFile("x", [], None)
    assert read_plan_file(path).keys == []


def one_kernel(uses: str) -> str:
    kernel = f'{{"name": "x", "cache_key": "k", "config": {{}}, "uses": {uses}}}'
    return f'{{"version": 1, "for": "x", "kernels": [{kernel}]}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param("[" * 200_000, id="deep"),
        "\xff",
        "3",
        "null",
        "[]",
        "{}",
        '{"version": 1, "for": "x"}',
        '{"version": 1, "for": "x", "kernels": 3}',
        '{"version": 1, "kernels": []}',
        '{"version": 2, "for": "x", "kernels": []}',
        '{"version": 1, "for": "x", "kernels": [{"name": "x"}]}',
        '{"version": 1, "for": "x", "kernels": [3]}',
        one_kernel("3"),
        one_kernel("[{}]"),
    ],
)
def test_invalid_plan_file_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_plan_file(path)
    assert one_line(caught).startswith(f"{path} is not a plan from runner plan --json: ")


def test_unreadable_plan_file_is_a_one_line_error(tmp_path: Path) -> None:
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
def test_uses_in_words_lists_gemms_and_shortens_long_lists(
    uses: list[dict[str, Any]], words: str
) -> None:
    assert uses_in_words(uses) == words
