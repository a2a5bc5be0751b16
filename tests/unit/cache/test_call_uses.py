"""Uses of kernels by recorded calls: in manifests and plan files, in words, and called again."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cache.call_check import call_on_cache
from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import TargetMachine
from runner.cache.manifest import Manifest, check_uses, manifest_text, parse_manifest
from runner.cache.plan_file import read_plan_file, uses_in_words
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.call_template import CallShape, Template
from runner.kernels.installed import Library
from runner.planning.plan import KernelUse, use_to_json
from tests.unit.small_cache import NVCC_TEXT

ARGS = [{"dtype": "bfloat16", "shape": ["M", 64]}, {"object": "float32"}]
SHAPE = CallShape.of(Template("new_gemm", ARGS, {"recipe": [1, 128]}), 100, 128)
WORDS = "new_gemm(bfloat16[M,64], float32, recipe=(1, 128))"
USE = use_to_json(KernelUse(SHAPE, ((128, 384), (640, 640)), (0,)))


def test_use_of_a_recorded_call_is_written_with_its_template() -> None:
    assert dict(USE) == {
        "call": SHAPE.text,
        "num_sms": 100,
        "m_step": 128,
        "m_ranges": [[128, 384], [640, 640]],
        "stages": [0],
    }
    check_uses([USE, USE])


@pytest.mark.parametrize(
    "change",
    [
        {"call": 3},
        {"call": None},
        {"call": ""},
        {"call": "[]"},
        {"call": "{}"},
        {"call": '{"function": "f", "args": 3, "kwargs": {}}'},
        {"call": '{"function": "f", "args": [{}], "kwargs": {}}'},
        {"num_sms": "100"},
        {"num_sms": None},
        {"m_step": 1.5},
        {"m_step": 0},
        {"m_ranges": []},
        {"m_ranges": [[1]]},
        {"m_ranges": [[1, "2"]]},
        {"m_ranges": 3},
    ],
    ids=str,
)
def test_use_with_invalid_values_is_refused_in_manifests_and_plans(
    change: dict[str, object], tmp_path: Path
) -> None:
    use = {**USE, **change}
    with pytest.raises((TypeError, ValueError, KeyError)):
        check_uses([use])
    kernel: dict[str, object] = {"name": "x", "cache_key": None, "config": {}, "uses": [use]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 1, "for": "x", "kernels": [kernel]}))
    with pytest.raises(UserError, match="is not a plan"):
        read_plan_file(path)
    data = json.loads(manifest_text(manifest()))
    data["entries"]["key"]["uses"] = [use]
    with pytest.raises(UserError, match="is not a manifest"):
        parse_manifest(json.dumps(data).encode(), "here")


@pytest.mark.parametrize("name", ["num_sms", "m_step", "m_ranges"])
def test_use_without_a_field_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        check_uses([{key: value for key, value in USE.items() if key != name}])


def manifest(*uses: dict[str, Any]) -> Manifest:
    entry = {"source_sha256": "s", "cubin_sha256": "c", "cubin_bytes": 1}
    data = {
        "version": 1,
        "library": "lib 1",
        "arch": "sm_90a",
        "signature": "NVCC13.0",
        "flags": "-O3",
        "built_with": "NVCC13.0",
        "gpu": "h200",
        "num_sms": 132,
        "entries": {"key": {"name": "x", "uses": [*(uses or (USE,))], **entry}},
    }
    return parse_manifest(json.dumps(data).encode(), "here")


def test_manifest_with_recorded_calls_round_trips_and_merges() -> None:
    made = manifest()
    assert parse_manifest(manifest_text(made).encode(), "here") == made
    more = manifest({**USE, "m_ranges": [[512, 512]], "stages": [1]}, {**USE, "num_sms": 132})
    (first, second) = made.merged(more).entries["key"].uses
    ranges = [[128, 384], [512, 512], [640, 640]]
    assert first == {**USE, "m_ranges": ranges, "stages": [0, 1]}
    assert second == {**USE, "num_sms": 132}
    assert made.merged(more).sm_counts == {100, 132}


def test_uses_of_recorded_calls_in_words() -> None:
    gemm = {"type": "gemm", "n": 8, "k": 64, "num_groups": 1, "m_ranges": [[1, 2]]}
    assert uses_in_words([USE, gemm]) == f"{WORDS} M 128..384, 640; gemm:8:64 M 1..2"


def test_check_of_a_cache_calls_each_recorded_m_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "python"
    answer = json.dumps({"runs": [], "kernels": []})
    worker.write_text(f"#!/bin/sh\ncat > {tmp_path}/orders\necho '{answer}'\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr("runner.cache.call_check._GPU_DRIVER", tmp_path / "none")
    monkeypatch.setattr(
        "runner.cache.call_check.standin_environment", lambda *_, **__: dict(os.environ)
    )
    made = manifest(USE, {**USE, "m_ranges": [[640, 768]]})
    machine = TargetMachine(Library(tmp_path), tmp_path, NVCC_TEXT, Environ())
    report = call_on_cache(
        KernelCache(tmp_path / "cache"), made, machine, jobs=1, progress=lambda *_: None
    )
    assert (report.calls, report.compiled, report.added) == (5, [], [])
    orders = json.loads((tmp_path / "orders").read_text())
    assert orders["demands"] == [[[SHAPE.text, 100, 128], 128, [128, 256, 384, 640, 768]]]


def test_check_of_a_gemm_of_unknown_type_is_refused(tmp_path: Path) -> None:
    gemm = {"type": "new", "n": 8, "k": 64, "num_groups": 1, "m_ranges": [[1, 2]]}
    made = replace(manifest(gemm))
    machine = TargetMachine(Library(tmp_path), tmp_path, NVCC_TEXT, Environ())
    with pytest.raises(UserError, match="a GEMM of unknown type 'new': verify it"):
        call_on_cache(KernelCache(tmp_path), made, machine, jobs=1, progress=lambda *_: None)
