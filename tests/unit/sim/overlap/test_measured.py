"""Steps measured on two H200s, against the overlap model; and invalid step files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import PRESETS
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_forward
from runner.errors import UserError
from runner.kernels.types import DeepGemmKernelType, KernelCall
from runner.model.strategy import STRATEGIES, OverlapStrategy
from runner.scenario import Scenario
from runner.schedule import Await, Begin, Collective, Mark, Op
from sim.costs.profile import load_profile
from sim.costs.profile_costs import ProfileCosts, gemm_work
from sim.overlap.forward import Forward, Part, Step, StepKind
from sim.overlap.measured import (
    MeasuredStep,
    MeasuredSteps,
    StepSettings,
    measured_turns,
    read_steps,
)
from sim.overlap.turns import Turns, run

FOLDER = Path(__file__).parents[4] / "docs" / "measurements"
DECODE = FOLDER / "h200x2_steps_decode.json"
BEGUN = {"all_to_all tokens", "all_gather routing", "all_to_all results"}


def forward_of(settings: StepSettings) -> Forward:
    assert settings.layers is not None
    parallel = ParallelConfig(tp=settings.tp, ep=settings.ep, moe_a2a=True)
    model = with_layers(PRESETS[settings.model], settings.layers)
    scenario = Scenario(model=model, parallel=parallel, policy=WarmupPolicy.NONE)
    return Forward(scenario, 0, ForwardBatch.decode((settings.prompt_len + 1,) * settings.batch))


@pytest.fixture(scope="module")
def steps() -> MeasuredSteps:
    return read_steps(DECODE)


def test_measured_collectives_ran_while_the_gpu_computed(steps: MeasuredSteps) -> None:
    """At least 98 % of asynchronous communication time, the GPU was computing."""
    forward = forward_of(steps.settings)
    for step in steps.steps[1:]:
        turns = measured_turns(forward, step)
        computing = [piece for piece in turns.pieces if piece.lane == "compute"]
        under_way = [p for p in turns.pieces if p.lane == "link" and p.name in BEGUN]
        waited = [p.seconds for p in turns.pieces if p.lane == "wait" and p.name in BEGUN]
        assert len(under_way) == len(waited) == 2 * 8 * 3
        overlapped = sum(
            max(0.0, min(its.end, one.end) - max(its.start, one.start))
            for its in under_way
            for one in computing
        )
        assert overlapped > 0.98 * sum(piece.seconds for piece in under_way)
        assert sum(waited) < 0.05 * sum(piece.seconds for piece in under_way)


def run_parts_of(forward: Forward, other: MeasuredStep, strategy: OverlapStrategy) -> Turns:
    """Turns predicted for ``strategy`` with each part as long as measured under another one."""
    assert other.strategy is not None
    halves = forward.in_halves(strategy.comm_sms, tuple)
    ran, link = pairwise(other.ends), iter(other.link)

    def step_of(op: Op) -> Step:
        start, end = next(ran)
        if isinstance(op, Await):
            return Step(StepKind.AWAIT, op.name, 0.0)
        if isinstance(op, Begin | Collective):
            begun, done = next(link)
            kind = StepKind.BEGIN if isinstance(op, Begin) else StepKind.BLOCK
            return Step(kind, op.name, done - begun)
        return Step(StepKind.COMPUTE, "", end - start)

    steps = {
        (part.half, part.layer, part.name): tuple(map(step_of, part.content))
        for part in halves.in_turns(other.strategy)
    }
    return run(
        Part(part.half, part.layer, part.name, steps[part.half, part.layer, part.name])
        for part in halves.in_turns(strategy)
    )


def test_overlap_model_predicts_step_time_from_parts_of_another_run(steps: MeasuredSteps) -> None:
    forward = forward_of(steps.settings)
    for step in steps.steps[1:]:
        assert step.strategy is not None
        for other in steps.steps[1:]:
            made = run_parts_of(forward, other, step.strategy)
            assert made.seconds == pytest.approx(step.ends[-1], rel=0.01)


def test_measured_turns_follow_from_operation_end_times(tmp_path: Path) -> None:
    """Each operation takes one second; each collective runs for three from its start."""
    strategy = STRATEGIES["deepseek-decode"]
    settings = StepSettings("dsv4-tiny", 1, 1, 2, True, ForwardMode.DECODE, 4, 8)
    forward = forward_of(settings)
    recorded = record_forward(replace(forward.scenario, overlap=(strategy,)), 0, forward.batch)
    ops = [op for op in recorded.ops if not isinstance(op, Mark)]
    link = [(i, i + 3) for i, op in enumerate(ops) if isinstance(op, Begin | Collective)]
    path = tmp_path / "steps.json"
    plain = {**vars(settings), "mode": "decode"}
    run = {
        "strategy": strategy.to_json(),
        "step_seconds": 1.5,
        "ends": [*range(len(ops) + 1)],
        "link": link,
    }
    path.write_text(json.dumps({"settings": plain, "machine": {"gpu": None}, "runs": [run]}))
    (step,) = read_steps(path).steps
    turns = measured_turns(forward, step)
    waits = sum(isinstance(op, Await | Collective) for op in ops)
    assert turns.seconds == len(ops)
    assert (turns.exposed, turns.communication) == (waits, 3 * len(link))
    assert turns.compute == len(ops) - waits
    assert {piece.half for piece in turns.pieces} == {-1, 0, 1}
    short = replace(step, ends=step.ends[:-1])
    with pytest.raises(UserError, match=f"{len(ops) - 1} operations were measured, but"):
        measured_turns(forward, short)


def test_measured_turns_of_an_unsplit_batch(steps: MeasuredSteps) -> None:
    whole = steps.steps[0]
    assert whole.strategy is None
    turns = measured_turns(forward_of(steps.settings), whole)
    assert turns.seconds == whole.ends[-1]
    assert {piece.half for piece in turns.pieces} == {-1}


# -- the profile against single measurements ------------------------------------------------------


def parts() -> dict[str, list[list[Any]]]:
    data: dict[str, list[list[Any]]] = json.loads((FOLDER / "h200x2_parts.json").read_text())
    return data


def test_profile_predicts_measured_nccl_collectives() -> None:
    """From 16 KB to 64 MB: every error below a third, the median below an eighth."""
    profile = load_profile("h200")
    costs = ProfileCosts(profile, profile.links["nvlink"], 16)
    errors = sorted(
        abs(costs.collective_seconds(Collective(kind, tuple(range(ranks)), size)) / seconds - 1)
        for kind, ranks, size, seconds in parts()["collectives"]
    )
    assert errors[-1] < 0.33 and errors[len(errors) // 2] < 0.125


def test_profile_predicts_measured_kernel_calls() -> None:
    """Median error below a tenth. Contiguous GEMMs were measured with all rows in one group."""
    profile = load_profile("h200")
    costs = ProfileCosts(profile, profile.links["nvlink"], 16)
    errors = []
    for name, *sizes, seconds in parts()["kernels"]:
        call = KernelCall(DeepGemmKernelType[name], *sizes)
        if "CONTIG" not in name:
            assert gemm_work(call)[0] > 0
            errors.append(abs(costs.kernel_seconds(call).device / seconds - 1))
    assert sorted(errors)[len(errors) // 2] < 0.1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tp", "2", "'tp' is '2', not a whole number"),
        ("mode", "sideways", "'mode' is 'sideways', not one of"),
        ("batch", None, "'batch' is None"),
    ],
)
def test_invalid_settings_are_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(DECODE.read_text())
    data["settings"][name] = value
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"is not a file from launch.steps: .*{message}"):
        read_steps(path)


def test_deeply_nested_steps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"is not a file from launch.steps: .*nested too deeply"):
        read_steps(path)
