"""Warm-up policies on real ranks perform the recorded operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.scenario import Scenario
from runner.schedule import Capture, Walk
from tests.distributed.launching import read_schedule, run_launch

pytest.importorskip("torch")
pytestmark = pytest.mark.distributed

FAST = "SGLANG_JIT_DEEPGEMM_FAST_WARMUP"
PRECOMPILE = "SGLANG_JIT_DEEPGEMM_PRECOMPILE"
PP_PARALLEL = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"
JIT = "SGLANG_ENABLE_JIT_DEEPGEMM"

ARGUMENTS = (
    "--model dsv4-tiny --layers 3 --pp 2 --virtual-nodes 2 --device cpu --batch-sizes 1,8 "
    "--stream 5,130 --cuda-graphs 2,4 --walk-memory 0.002 --max-tokens 256"
)


def scenario_of(policy: WarmupPolicy, **warmup: Any) -> Scenario:
    return Scenario(
        model=with_layers(load_model("dsv4-tiny"), 3),
        parallel=ParallelConfig(pp=2, nodes=2),
        policy=policy,
        batch_sizes=(1, 8),
        graph_batch_sizes=(2, 4),
        **warmup,
        stream=(5, 130),
        walk_memory=0.002 * 2**30,
        max_tokens=256,
    )


def ran(path: Path, *arguments: str, **env: str) -> str:
    """Run a launch, write its operations to ``path`` and return its output."""
    done = run_launch(ARGUMENTS, *arguments, "--schedule", path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_ran(path: Path, scenario: Scenario) -> None:
    recorded, really = record(scenario), read_schedule(path)
    for rank, (ours, theirs) in enumerate(zip(recorded.ranks, really.ranks, strict=True)):
        assert ours == theirs, f"rank {rank}"
    walks = scenario.policy.walked or scenario.policy is WarmupPolicy.RELAX
    for ops in really.ranks:
        assert any(isinstance(op, Walk) for op in ops) == bool(walks)
        assert sum(isinstance(op, Capture) for op in ops) == 2


@pytest.mark.parametrize("name", ["full", "pp-parallel+fast", "relax", "planned", "prebuilt"])
def test_policy_performs_the_recorded_operations(name: str, tmp_path: Path) -> None:
    """With graphs, walks and a stream; --warmup overrides SGLang's variables."""
    path = tmp_path / "schedule.json"
    arguments = f"--no-jit --walk-max-m 64 --warmup {name}"
    printed = ran(path, arguments, **{PRECOMPILE: "1", FAST: "1"})
    assert f"policy {name}, batch sizes 1,8" in printed
    assert "JIT: off, kernels are not compiled: --no-jit was given" in printed
    assert_ran(path, scenario_of(WarmupPolicy(name), walk_max_m=64))


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({FAST: "1"}, "fast"),
        ({PRECOMPILE: "1", PP_PARALLEL: "true"}, "pp-parallel+full"),
    ],
)
def test_sglang_variables_select_the_policy_and_disable_the_jit(
    variables: dict[str, str], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "schedule.json"
    printed = ran(path, **{JIT: "0", **variables})
    assert f"policy {name}, batch sizes 1,8" in printed
    assert f"JIT: off, kernels are not compiled: {JIT} is off" in printed
    assert_ran(path, scenario_of(WarmupPolicy(name)))
