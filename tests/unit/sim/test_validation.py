"""Validation: metadata of measured runs, and predictions compared with them."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.cli import cli
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError, run_guarded
from runner.report.validation import print_validation, validation_json
from runner.scenario import Scenario
from runner.timeline import Span, Timeline, write_timelines
from sim.calibration.calibrate import fit_profile
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import ValidatedRun, error_summary, read_measured, validate
from sim.costs.profile import Probe
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.machine import Machine
from sim.simulate import Prediction
from tests.unit.measured_runs import measured, other_profile, usual_profile
from tests.unit.tiny_runs import scenario

MACHINE = {"cores": 16, "gpu": "a GPU", "date": "2026-11-22"}


def run_of(one: Scenario, **facts: Any) -> Timeline:
    """A Timeline with the metadata that launch writes, and a moment of work."""
    machine = {**MACHINE, **facts.pop("machine", {})}
    meta = {
        **one.timeline_meta(),
        "link": "gloo",
        "hosts": 1,
        "ranks_per_gpu": 1,
        "device": "cuda",
        "compute": "real",
        "jit": "deep_gemm, nvcc 13.0",
        "machine": machine,
        **facts,
    }
    spans = (Span(0, 0.0, 1.0, "compute", "compute"),)
    return Timeline(one.policy.value, "measured", one.parallel.world_size, spans, meta)


def changed(run: Timeline, name: str, value: Any) -> Timeline:
    """A run with one metadata value replaced; a dotted name is inside ``machine``."""
    meta = {**run.meta, "machine": dict(run.meta["machine"])}
    *outer, last = name.split(".")
    where = meta[outer[0]] if outer else meta
    where[last] = value
    return replace(run, meta=meta)


# -- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_scenario_is_recovered_from_timeline_metadata(policy: WarmupPolicy) -> None:
    values: dict[str, Any] = {
        "stage_layers": (1, 3),
        "batch_sizes": (2, 64),
        "graph_batch_sizes": (4, 1),
        "walk_max_m": 32,
        "compile_lock": True,
        "prompt_len": 2,
        "stream": (7, 9),
        "walk_memory": 1e9,
        "num_sms": 132,
        "speculative": True,
        "ep": True,
        "max_tokens": 128,
        "disaggregation": DisaggregationMode.PREFILL,
    }
    one = scenario(policy, pp=2, tp=2, nodes=2, **values)
    assert read_metadata(run_of(one)).scenario == one
    plain = scenario(policy, pp=2, tp=2, walk_max_m=None)
    assert read_metadata(run_of(plain)).scenario == plain
    wide = scenario(policy, pp=1, tp=2, attn_cp=2, replicas=3, nodes=3, batch_sizes=(2, 64))
    assert read_metadata(run_of(wide)).scenario == wide


def test_default_batch_sizes_are_recovered_as_explicit_values() -> None:
    one = scenario(batch_sizes=None, max_tokens=16384)
    again = read_metadata(run_of(one)).scenario
    assert again.batch_sizes == one.resolved_batch_sizes
    assert again.request_tokens == one.request_tokens


def test_metadata_gives_the_machine_of_the_run() -> None:
    facts = {"cores": 6, "probe": 3.0}
    run = run_of(scenario(tp=2), hosts=1, ranks_per_gpu=2, machine=facts, link="nccl")
    assert usual_profile().probe == Probe(2.0)
    assert read_metadata(run).machine(usual_profile()) == Machine(
        profile=usual_profile(),
        host_factor=1.5,
        cores_per_node=6,
        hosts=1,
        link="nvlink",
        ranks_per_gpu=2,
        nccl_timeout=inf,
        run_ahead=False,
        start=StartPhases(PHASES, Weights.DUMMY),
    )
    for unprobed in ({}, {"probe": None}):
        machine = read_metadata(run_of(scenario(), machine=unprobed)).machine(usual_profile())
        assert (machine.host_factor, machine.link) == (1.0, "gloo")


@pytest.mark.parametrize(
    "facts", [{"device": "cpu"}, {"compute": "skip"}, {"device": "cpu", "compute": "skip"}]
)
def test_runs_without_gpu_computation_have_no_first_forward_or_weight_time(
    facts: dict[str, str],
) -> None:
    profile = read_metadata(run_of(scenario(), **facts)).machine(other_profile()).profile
    host = replace(other_profile().host, first_forward=0.0)
    start_up = replace(other_profile().start_up, weights_made=inf)
    assert profile == replace(other_profile(), host=host, start_up=start_up) != other_profile()


def refusal(run: Timeline) -> str:
    """The error when validating the run, which must equal that when fitting a profile to it."""
    messages = []
    for use in (
        lambda: validate([run], usual_profile()),
        lambda: fit_profile([run], usual_profile(), "x"),
    ):
        with pytest.raises(UserError) as caught:
            use()
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


OPTIONAL = {
    *("moe_a2a", "overlap", "library", "gpu", "ranks"),
    *("reduced_num_sms", "decode_batch_sizes", "without"),
}
"""Metadata that Timelines of older versions may lack."""

NEEDED = [name for name in run_of(scenario()).meta if name not in OPTIONAL]
NEEDED += [f"machine.{name}" for name in MACHINE]


@pytest.mark.parametrize("name", NEEDED)
def test_timeline_without_a_required_field_is_refused_and_the_field_named(name: str) -> None:
    run = changed(run_of(scenario()), name, None)
    del (run.meta["machine"] if "." in name else run.meta)[name.rpartition(".")[2]]
    assert refusal(run) == (
        f"a Timeline of none lacks '{name.rpartition('.')[2]}': an older version wrote it, "
        "measure the run again"
    )


COUNT, LIST = "not a whole number from 1 on", "not a list"
ABOVE_0 = "not a number above 0"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("disaggregation", "both", "'both', not one of none, prefill, decode"),
        ("batch_sizes", 3, LIST),
        ("batch_sizes", [0], COUNT),
        ("stage_layers", 3, LIST),
        ("graph_batch_sizes", None, LIST),
        ("stream", ["7"], COUNT),
        ("nodes", None, COUNT),
        ("layers", 4.0, COUNT),
        ("pp", True, COUNT),
        ("num_sms", 0, COUNT),
        ("hosts", 0, COUNT),
        ("hosts", None, COUNT),
        ("hosts", 2, "its 1 nodes cannot be split over 2 hosts"),
        ("ranks_per_gpu", "x", f"its 'ranks_per_gpu' is 'x', {COUNT}"),
        ("tp", 2, "it has 1 ranks, its layout has 2"),
        ("ep", 1, "not true or false"),
        ("compile_lock", None, "not true or false"),
        ("model", 7, "not a word"),
        ("jit", None, "not a word"),
        ("walk_memory", inf, ABOVE_0),
        ("walk_memory", "1", ABOVE_0),
        ("machine", None, "its 'machine' is not an object"),
        ("machine.cores", "16", f"its 'cores' is '16', {COUNT}"),
        ("machine.cores", None, COUNT),
        ("machine.date", 2026, "not a word"),
        ("machine.gpu", 1, "not a word"),
        ("machine.probe", 0, ABOVE_0),
        ("machine.probe", -1.5, ABOVE_0),
        ("machine.probe", float("nan"), ABOVE_0),
        ("machine.probe", "2", ABOVE_0),
        ("machine.probe", True, ABOVE_0),
        ("prompt_len", list(range(99)), "10, 11..., not a whole"),
    ],
)
def test_invalid_metadata_value_is_a_one_line_error(name: str, value: Any, words: str) -> None:
    run = run_of(scenario())
    message = refusal(replace(run, meta=changed(run, name, value).meta))
    start = "a Timeline of none describes no run that can be simulated: "
    assert message.startswith(start) and words in message


def test_run_without_work_or_with_unknown_policy_is_refused() -> None:
    run = run_of(scenario())
    assert "can be simulated: nothing in it takes any time" in refusal(replace(run, spans=()))
    assert refusal(replace(run, policy="cold")).startswith("a Timeline of cold describes no run")


def test_run_without_jit_is_refused() -> None:
    off = "off, kernels are not compiled: --no-jit was given"
    assert refusal(run_of(scenario(), jit=off)) == (
        "a Timeline of none is of a run without a JIT, which says nothing about a start-up that "
        f"compiles ({off})"
    )


def test_link_that_is_unknown_or_not_in_the_profile_is_refused() -> None:
    pigeon = run_of(scenario(), link="carrier pigeon")
    assert refusal(pigeon) == "link 'carrier pigeon' is not known: use gloo or nccl"
    only_fast = replace(usual_profile(), links={"nvlink": usual_profile().links["nvlink"]})
    with pytest.raises(UserError) as caught:
        validate([run_of(scenario())], only_fast)
    assert str(caught.value) == "profile usual has no link 'gloo' for backend gloo"


# -- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 1.5])
@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_profile_that_simulated_a_run_predicts_it_exactly(
    policy: WarmupPolicy, factor: float | None
) -> None:
    one = scenario(policy, pp=2, tp=2, nodes=2, graph_batch_sizes=(1,), stream=(9, 64))
    run = measured(one, other_profile(), cores=3, hosts=1, factor=factor)
    (found,) = validate([run], other_profile())
    assert (found.error, found.counts_agree) == (0.0, True)
    assert found.predicted.timeout is None
    assert found.predicted.timeline.phases() == run.phases()


def test_error_is_relative_to_the_measured_time() -> None:
    run = measured(scenario(), other_profile())
    (found,) = validate([run], usual_profile())
    assert found.error == found.predicted.timeline.wall / run.wall - 1
    assert found.error < -0.2
    slow = measured(scenario(), other_profile(), factor=1.5)
    unprobed = {**slow.meta, "machine": {**slow.meta["machine"], "probe": None}}
    (found,) = validate([replace(slow, meta=unprobed)], other_profile())
    assert found.error == run.wall / slow.wall - 1 < -0.1


def test_counts_agree_requires_equal_compiles_and_duplicates() -> None:
    run = measured(scenario(), other_profile())
    first = next(span for span in run.spans if span.is_kernel)
    another_span = next(s for s in run.spans if s.is_kernel and s.key != first.key)
    one_less = replace(run, spans=tuple(s for s in run.spans if s is not first))
    same_number = replace(run, spans=(*one_less.spans, first._replace(key="another kernel")))
    duplicate = replace(run, spans=(*one_less.spans, first._replace(key=another_span.key)))
    found = validate([duplicate, one_less, same_number], other_profile())
    assert [one.counts_agree for one in found] == [False, False, True]


def test_error_summary_has_median_and_worst_error() -> None:
    run = measured(scenario(), other_profile())
    spans = tuple(s._replace(start=s.start / 2, end=s.end / 2) for s in run.spans[:-1])
    assert error_summary(validate([run, run, replace(run, spans=spans)], other_profile())) == (
        "3 runs: median absolute error 0.0%, worst 100.0%; compiles and duplicates exact in 3"
    )


def simple_run(source: str, wall: float, kernels: str, **facts: Any) -> Timeline:
    """A run that answers its first request at half its time; each letter is a kernel."""
    spans = tuple(Span(0, 0.0, wall / 4, "compile", "gemm", key) for key in kernels)
    phases = (
        Span(0, 0.0, wall / 2, "phase", "first request"),
        Span(0, wall / 2, wall, "phase", "requests"),
    )
    meta = {"model": "a-model", "layers": 3, "pp": 4, "tp": 2, "nodes": 1, "compile_lock": False}
    return Timeline("none", source, 1, (*spans, *phases), {**meta, **facts})


def simple_runs() -> list[ValidatedRun]:
    return [
        ValidatedRun(
            simple_run("measured", 100.0, "abcaa"),
            Prediction(simple_run("predicted", 90.04, "abca"), None),
        ),
        ValidatedRun(
            simple_run("measured", 4.0, "ab", nodes=4, compile_lock=True),
            Prediction(simple_run("predicted", 5.0, "ab"), None),
        ),
    ]


def test_table_has_one_row_per_run_and_a_summary() -> None:
    out = StringIO()
    print_validation(Console(width=140, file=out), simple_runs(), "Predicted with x")
    rows = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "Predicted with x" in rows
    assert "a-model 3 layers, pp 4 tp 2, none 100.0 90.0 -10.0 % 5 4 2 1" in rows
    assert "a-model 3 layers, pp 4 tp 2, 4 nodes, locked, none 4.0 5.0 +25.0 % 2 2 0 0" in rows
    assert rows[-1] == error_summary(simple_runs())


def test_validation_json_has_measured_and_predicted_figures() -> None:
    data = validation_json(simple_runs()[:1], "h200")
    assert data == {
        "version": 1,
        "hardware": "h200",
        "runs": [
            {
                "run": "a-model 3 layers, pp 4 tp 2, none",
                "measured": {
                    "wall_seconds": 100.0,
                    "up_seconds": 50.0,
                    "kernels_compiled": 5,
                    "duplicates": 2,
                    "phases": {"first request": 50.0, "requests": 50.0},
                },
                "predicted": {
                    "wall_seconds": 90.04,
                    "up_seconds": 45.02,
                    "kernels_compiled": 4,
                    "duplicates": 1,
                    "phases": {"first request": 45.02, "requests": 45.02},
                },
                "error": -0.0996,
            }
        ],
    }


def test_sim_prints_the_accuracy_of_a_validated_profile_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "sim --model dsv4-tiny --warmup none --batch-sizes 1 --max-tokens 64 --hardware"
    printed = []
    for hardware in ("h200", "h20"):
        assert run_guarded(cli, [*options.split(), hardware], program="runner") == 0
        printed.append(capsys.readouterr().out)
    line = "errors of profile h200 on 25 measured runs: 13% (median), 33% (worst)\n"
    assert line in printed[0]
    assert "predictions of" not in printed[1], "an estimate was never validated"


# -- files ----------------------------------------------------------------------------------------


def test_read_measured_keeps_file_order_and_refuses_predicted_runs(tmp_path: Path) -> None:
    one, two = run_of(scenario()), run_of(scenario(WarmupPolicy.PLANNED))
    files = [tmp_path / f"{name}.json" for name in "abcd"]
    for path, runs in zip(
        files, ([one, two], [one], [replace(one, source="predicted")], []), strict=True
    ):
        write_timelines(path, runs)
    assert [run.policy for run in read_measured(files[:2])] == ["none", "planned", "none"]
    with pytest.raises(UserError, match="none is a predicted Timeline, not a measured one"):
        read_measured(files)
    with pytest.raises(UserError, match="the files hold no Timeline"):
        read_measured(files[3:])
