"""Predictions against real CPU runs with nvcc: counts exactly, times roughly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler
from runner.config.hf import load_model
from runner.config.presets import PRESETS
from runner.driver.run import record_parts
from runner.planning.plan import table_of
from runner.planning.residency import stalls_of
from runner.timeline import Timeline, read_timelines
from sim.calibration.calibrate import fit_profile
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import validate
from sim.costs.profile import load_profile
from tests.distributed.launching import FEW_KERNELS, launch

pytest.importorskip("torch")
pytestmark = [pytest.mark.distributed, pytest.mark.nvcc]

COMMON = (
    "--compute skip --device cpu --batch-sizes 1,128 --stream 20,128 --max-tokens 128 "
    "--walk-max-m 64"
)
STAGES = "--pp 2 --virtual-nodes 2"
"""Each stage has its own cache, so no two ranks race to compile."""
SHARDS = "--tp 2 --compile-lock"
"""Both ranks share a cache; the lock decides which one compiles."""


def measure(folder: Path, arguments: str, policies: list[str]) -> list[Timeline]:
    path = folder / "timeline.json"
    warmup = " ".join(f"--warmup {policy}" for policy in policies)
    model = folder / "config.json"
    launch("--model", model, COMMON, arguments, warmup, "--timeline", path, timeout=540)
    return read_timelines(path)


def test_real_runs_have_predicted_stalls_counts_and_approximate_times(
    nvcc_compiler: NvccCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile fitted to some runs predicts the others."""
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FEW_KERNELS))
    monkeypatch.setitem(PRESETS, "few", load_model(str(folder / "config.json")))
    none, parallel, full, planned = measure(
        folder, STAGES, ["none", "pp-parallel", "full", "planned"]
    )
    (locked,) = measure(folder, SHARDS, ["full"])

    for timeline in (none, parallel, full, planned):
        scenario = read_metadata(timeline).scenario
        # Every node is one rank.
        said = stalls_of(record_parts(scenario), table_of(scenario), scenario.parallel.node_of)
        assert timeline.meta["stalls"] == [[s.forward, s.name, s.node, s.kernel] for s in said]
        assert bool(said) == (timeline is not planned)
    assert locked.kernels_compiled > locked.duplicates == 0

    made = fit_profile([none, planned], load_profile("h200"), "here")
    for item in validate([none, planned, parallel, full, locked], made.profile):
        print(f"{item.name}: {item.measured.wall:.1f} s, off by {item.error:+.0%}")
        assert item.counts_agree, item.name
        if item.measured not in (none, planned):
            # Other tests share the cores, so only a factor is checked.
            assert 0.4 < 1 + item.error < 2.5, item.name
