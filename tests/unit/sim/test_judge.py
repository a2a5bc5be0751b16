"""Measured runs beside what the simulator says of them."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError
from runner.scenario import Scenario
from runner.timeline import Span, Timeline, write_timelines
from sim.calibration.calibrate import fit_profile
from sim.calibration.drift import Drift
from sim.calibration.validation import judge, machine_of, read_measured, scenario_of, summary
from sim.costs.profile import Link, Phase, Probe, slowed
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.simulate import Machine
from tests.unit.measured_runs import another, measured, usual
from tests.unit.tiny_runs import scenario

MACHINE = {"cores": 16, "gpu": "a GPU", "date": "2026-11-22"}


def run_of(one: Scenario, **facts: Any) -> Timeline:
    """A Timeline with all that launch says of a run, and a moment of work in it."""
    policy = one.policy.value
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
    return Timeline(policy, "measured", one.parallel.world_size, spans, meta)


def changed(run: Timeline, name: str, value: Any) -> Timeline:
    """A run that tells ``name`` otherwise; ``machine.cores`` is the machine's."""
    meta = {**run.meta, "machine": dict(run.meta["machine"])}
    *outer, last = name.split(".")
    where = meta[outer[0]] if outer else meta
    where[last] = value
    return replace(run, meta=meta)


def without(run: Timeline, name: str) -> Timeline:
    return replace(run, meta={k: v for k, v in run.meta.items() if k != name})


@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_a_scenario_comes_back_from_its_timeline(policy: WarmupPolicy) -> None:
    values: dict[str, Any] = {
        "stage_layers": (1, 3),
        "batch_sizes": (2, 64),
        "graph_batch_sizes": (4, 1),
        "walk_max_m": 32,
        "compile_lock": True,
        "prompt_len": 2,
        "stream": (7, 9),
        "walk_memory": 1e9,
        "num_sms": 100,
        "speculative": True,
        "ep": True,
        "max_tokens": 128,
        "disaggregation": DisaggregationMode.PREFILL,
    }
    one = scenario(policy, pp=2, tp=2, nodes=2, **values)
    assert scenario_of(run_of(one)) == one
    plain = scenario(policy, pp=2, tp=2, walk_max_m=None)
    assert scenario_of(run_of(plain)) == plain


def test_a_split_and_copied_layout_comes_back() -> None:
    one = scenario(pp=1, tp=2, attn_cp=2, replicas=3, nodes=3, batch_sizes=(2, 64))
    assert scenario_of(run_of(one)) == one


def test_default_batch_sizes_come_back_as_what_they_were() -> None:
    one = scenario(batch_sizes=None, max_tokens=16384)
    again = scenario_of(run_of(one))
    assert again.batch_sizes == one.batch_sizes
    assert again.requests == one.requests


def test_the_machine_is_the_one_that_the_run_was_on() -> None:
    run = run_of(scenario(tp=2), hosts=1, ranks_per_gpu=2, machine={"cores": 6}, link="nccl")
    assert machine_of(run, usual()) == Machine(
        profile=usual(),
        cores_per_node=6,
        hosts=1,
        link="nvlink",
        ranks_per_gpu=2,
        nccl_timeout=float("inf"),
        run_ahead=False,
        start=StartPhases(PHASES, Weights.DUMMY),
    )
    assert machine_of(run_of(scenario()), usual()).link == "gloo"


def test_a_profile_without_the_runs_link_cannot_tell() -> None:
    only_fast = replace(usual(), links={"nvlink": usual().links["nvlink"]})
    with pytest.raises(UserError) as caught:
        machine_of(run_of(scenario()), only_fast)
    assert str(caught.value) == "profile usual has no link 'gloo', which gloo is"


@pytest.mark.parametrize(
    "lacking",
    [
        "replicas",
        "max_tokens",
        "stream",
        "walk_memory",
        "graph_batch_sizes",
        "compile_lock",
        "bf16_fp32_algo",
        "speculative",
        "prompt_len",
        "disaggregation",
        "stage_layers",
        "attn_cp",
        "hosts",
        "ranks_per_gpu",
        "machine",
        "link",
        "jit",
        "device",
        "compute",
    ],
)
def test_an_older_timeline_is_one_clear_line(lacking: str) -> None:
    with pytest.raises(UserError) as caught:
        judge([without(run_of(scenario()), lacking)], usual())
    assert str(caught.value) == (
        f"a Timeline of none does not tell its '{lacking}': it was written by an older version, "
        "measure it again"
    )


@pytest.mark.parametrize("lacking", MACHINE)
def test_a_machine_that_does_not_tell_all(lacking: str) -> None:
    run = run_of(scenario())
    facts = {k: v for k, v in MACHINE.items() if k != lacking}
    with pytest.raises(UserError, match=f"does not tell its '{lacking}'"):
        judge([changed(run, "machine", facts)], usual())


def test_a_link_of_another_name_is_told() -> None:
    with pytest.raises(UserError, match=r"link 'carrier pigeon' is not known: gloo or nccl"):
        judge([run_of(scenario(), link="carrier pigeon")], usual())


COUNT, COUNTS = "not a whole number from 1 on", "not a list of whole numbers from 1 on"
ABOVE_0 = "not a number above 0"
MUTATED = [
    ("disaggregation", "both", "'both' is not a valid"),
    ("batch_sizes", 3, COUNTS),
    ("batch_sizes", [0], COUNTS),
    ("stage_layers", 3, COUNTS),
    ("graph_batch_sizes", None, COUNTS),
    ("stream", ["7"], COUNTS),
    ("nodes", None, COUNT),
    ("layers", 4.0, COUNT),
    ("pp", True, COUNT),
    ("num_sms", 0, COUNT),
    ("hosts", 0, COUNT),
    ("hosts", None, COUNT),
    ("hosts", 2, "its 1 nodes are not on 2 hosts"),
    ("ranks_per_gpu", "x", "its 'ranks_per_gpu' is 'x', not a whole number from 1 on"),
    ("tp", 2, "it is of 1 ranks, its layout of another number"),
    ("ep", 1, "not true or false"),
    ("compile_lock", None, "not true or false"),
    ("model", 7, "not a word"),
    ("jit", None, "not a word"),
    ("device", 1, "not a word"),
    ("walk_memory", float("inf"), ABOVE_0),
    ("walk_memory", "1", ABOVE_0),
    ("machine", None, "its 'machine' is None, not a machine"),
    ("machine.cores", "16", "its 'cores' is '16', not a whole number from 1 on"),
    ("machine.cores", None, COUNT),
    ("machine.date", 2026, "not a word"),
    ("machine.gpu", 1, "not a word"),
    ("machine.probe", 0, ABOVE_0),
    ("machine.probe", -1.5, ABOVE_0),
    ("machine.probe", float("nan"), ABOVE_0),
    ("machine.probe", "2", ABOVE_0),
    ("machine.probe", True, ABOVE_0),
    ("prompt_len", list(range(99)), "10, 11..., not a whole"),
]


@pytest.mark.parametrize(("name", "value", "words"), MUTATED)
def test_what_is_told_in_another_form_is_one_line(name: str, value: Any, words: str) -> None:
    """Whether it is judged or a profile is fitted to it."""
    run = changed(run_of(scenario()), name, value)
    for use in (lambda: judge([run], usual()), lambda: fit_profile([run], usual(), "x")):
        with pytest.raises(UserError) as caught:
            use()
        start = "a Timeline of none tells of no run that is known here: "
        assert str(caught.value).startswith(start) and words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_in_which_nothing_happens_is_told() -> None:
    with pytest.raises(UserError, match="known here: nothing in it takes any time"):
        judge([replace(run_of(scenario()), spans=())], usual())


OFF = "off, kernels are not compiled: --no-jit was given"


def test_a_run_that_compiles_nothing_is_no_start_up() -> None:
    run = run_of(scenario(), jit=OFF)
    for use in (lambda: judge([run], usual()), lambda: fit_profile([run], usual(), "x")):
        with pytest.raises(UserError) as caught:
            use()
        assert str(caught.value) == (
            "a Timeline of none is of a run without a JIT, which tells nothing of a start-up that "
            f"compiles ({OFF})"
        )


def test_a_policy_of_another_name_is_told() -> None:
    with pytest.raises(UserError, match="a Timeline of cold tells of no run that is known here"):
        judge([replace(run_of(scenario()), policy="cold")], usual())


@pytest.mark.parametrize("facts", [{}, {"probe": None}])
def test_where_nobody_looked_a_machine_does_not_drift(facts: dict[str, Any]) -> None:
    machine = machine_of(run_of(scenario(), machine=facts), usual())
    assert (machine.drift, machine.host_factor) == (None, 1.0)


def test_a_run_on_a_slow_host_is_held_against_a_slow_host() -> None:
    """Where the reference kernel took half as long again, so does all that CPUs do at first."""
    assert usual().probe == another().probe == Probe(2.0, 50.0)
    run = run_of(scenario(), machine={"cores": 16, "probe": 3.0})
    machine = machine_of(run, usual())
    assert (machine.drift, machine.host_factor) == (Drift(1.5, 50.0), 1.0)
    one = scenario(WarmupPolicy.PLANNED, tp=2)
    made = measured(one, another(), drift=Drift(1.5, 50.0))
    assert made.meta["machine"]["probe"] == 3.0
    (judged,) = judge([made], another())
    assert (judged.error, judged.counts_agree) == (0.0, True)
    nobody = {**made.meta["machine"], "probe": None}
    (judged,) = judge([replace(made, meta={**made.meta, "machine": nobody})], another())
    assert judged.predicted.timeline.wall == measured(one, another()).wall
    assert judged.error < -0.1


def test_a_host_that_stays_slow_is_a_profile_of_a_slow_host() -> None:
    """What never settles is what all of the profile's seconds are multiplied by."""
    one = scenario(WarmupPolicy.PLANNED, tp=2)
    # What the link and the GPU take is the same on a slow host: here, nothing.
    gpu = replace(another().gpu, memory_bandwidth=1e30, fp8_flops=1e30, bf16_flops=1e30)
    quick = replace(
        another(),
        gpu=gpu,
        links={"gloo": Link(0.0, 1e30)},
        probe=Probe(2.0, 1e7),
        start_up=replace(another().start_up, weights=Phase(0.0), weights_made=1e30),
    )
    made = measured(one, slowed(quick, 1.5))
    slow = {**made.meta["machine"], "probe": 3.0}
    (judged,) = judge([replace(made, meta={**made.meta, "machine": slow})], quick)
    assert judged.error == pytest.approx(0.0, abs=1e-5) and judged.counts_agree


@pytest.mark.parametrize(
    "facts", [{"device": "cpu"}, {"compute": "skip"}, {"device": "cpu", "compute": "skip"}]
)
def test_without_a_gpus_work_there_is_no_first_forward_and_no_weight_is_made(
    facts: dict[str, str],
) -> None:
    assert another().host.first_forward == 0.75
    profile = machine_of(run_of(scenario(), **facts), another()).profile
    host = replace(another().host, first_forward=0.0)
    start_up = replace(another().start_up, weights_made=inf)
    assert profile == replace(another(), host=host, start_up=start_up)
    assert machine_of(run_of(scenario()), another()).profile == another()


# -- judging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_a_run_that_a_profile_made_up_it_foretells_exactly(policy: WarmupPolicy) -> None:
    one = scenario(policy, pp=2, tp=2, nodes=2, graph_batch_sizes=(1,), stream=(9, 64))
    run = measured(one, another(), cores=3, hosts=1)
    (judged,) = judge([run], another())
    assert (judged.error, judged.counts_agree) == (0.0, True)
    assert judged.predicted.timeout is None
    assert judged.predicted.timeline.phases() == run.phases()


def test_an_error_is_relative_to_the_measured() -> None:
    run = measured(scenario(), another())
    (judged,) = judge([run], usual())
    assert judged.error == judged.predicted.timeline.wall / run.wall - 1
    assert judged.error < -0.2


def test_counts_disagree_where_compiles_or_duplicates_do() -> None:
    run = measured(scenario(), another())
    first = next(span for span in run.spans if span.is_kernel)
    one_less = replace(run, spans=tuple(s for s in run.spans if s is not first))
    same_twice = replace(run, spans=(*one_less.spans, replace(first, key="another kernel")))
    another_span = next(s for s in run.spans if s.is_kernel and s.key != first.key)
    duplicate = replace(run, spans=(*one_less.spans, replace(first, key=another_span.key)))
    assert not judge([duplicate], another())[0].counts_agree
    assert not judge([one_less], another())[0].counts_agree
    assert judge([same_twice], another())[0].counts_agree


def test_names() -> None:
    plain = measured(scenario(tp=2), another())
    more = run_of(scenario(WarmupPolicy.PLANNED, pp=2, tp=2, nodes=2, compile_lock=True))
    assert [
        judged.name for judged in judge([plain, replace(more, spans=plain.spans)], usual())
    ] == [
        "dsv4-tiny 4 layers, pp 1 tp 2, none",
        "dsv4-tiny 4 layers, pp 2 tp 2, 2 nodes, locked, planned",
    ]


def test_a_summary() -> None:
    run = measured(scenario(), another())
    judged = judge([run, run, run], another())
    assert summary(judged) == (
        "3 runs: median absolute error 0.0%, worst 0.0%; compiles and duplicates exact in 3"
    )
    half = replace(
        run, spans=tuple(replace(s, start=s.start / 2, end=s.end / 2) for s in run.spans[:-1])
    )
    assert summary(judge([run, run, half], another())).startswith(
        "3 runs: median absolute error 0.0%, worst 100.0%;"
    )


# -- files ----------------------------------------------------------------------------------------


def test_all_runs_of_all_files(tmp_path: Path) -> None:
    one, two = run_of(scenario()), run_of(scenario(WarmupPolicy.PLANNED))
    write_timelines(tmp_path / "a.json", [one, two])
    write_timelines(tmp_path / "b.json", [one])
    found = read_measured([tmp_path / "a.json", tmp_path / "b.json"])
    assert [run.policy for run in found] == ["none", "planned", "none"]


def test_a_prediction_is_no_measurement(tmp_path: Path) -> None:
    write_timelines(tmp_path / "a.json", [replace(run_of(scenario()), source="predicted")])
    with pytest.raises(UserError) as caught:
        read_measured([tmp_path / "a.json"])
    assert str(caught.value) == "none is a predicted Timeline, not a measured one"


def test_files_without_a_timeline(tmp_path: Path) -> None:
    write_timelines(tmp_path / "a.json", [])
    with pytest.raises(UserError, match="the files hold no Timeline"):
        read_measured([tmp_path / "a.json"])
