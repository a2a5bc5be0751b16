"""Data that calibration reads from a measured Timeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.driver.run import record
from runner.driver.warmup import WarmupPolicy as P
from runner.driver.warmup import node_shares
from runner.kernels.types import KernelCall
from runner.planning.plan import plan_of
from runner.schedule import Collective, Compute, Walk
from runner.timeline import Span, Timeline
from sim.calibration.calibrate import fit_profile
from sim.calibration.data import CalibrationData, read_calibration_data
from sim.costs.profile_costs import compile_seconds
from tests.unit.measured_runs import measured, other_profile, usual_profile
from tests.unit.tiny_runs import scenario


def run_of(policy: P = P.NONE, **layout: int) -> Timeline:
    return measured(scenario(policy, **{"pp": 1, "tp": 1, **layout}), other_profile())


def data_of(policy: P = P.NONE, **layout: int) -> CalibrationData:
    return read_calibration_data(run_of(policy, **layout), usual_profile())


def test_every_compile_of_a_rank_is_a_sample() -> None:
    run, found = run_of(), data_of()
    assert len(found.compiles) == run.kernels_compiled > 10
    for sample in found.compiles:
        alone = compile_seconds(other_profile().compile, sample.kernel)
        assert (sample.seconds, sample.concurrency) == (pytest.approx(alone), pytest.approx(1.0))
        assert sample.cores == 16
    assert data_of(P.PLANNED).compiles == [], "a builder's compiles are not counted"


def test_unknown_kernels_and_zero_length_compiles_are_skipped() -> None:
    run = run_of()
    known = next(span for span in run.spans if span.is_kernel)
    odd = (Span(0, 1.0, 2.0, "compile", "other", "other 0"), known._replace(end=known.start))
    found = read_calibration_data(replace(run, spans=(*run.spans, *odd)), usual_profile())
    assert len(found.compiles) == run.kernels_compiled


def test_concurrency_is_the_mean_number_of_simultaneous_compiles() -> None:
    assert {round(s.concurrency, 6) for s in data_of(tp=2).compiles} == {2.0}
    run = run_of()
    first = next(s for s in run.spans if s.is_kernel)
    half = first._replace(end=first.start + first.seconds / 2)
    found = read_calibration_data(replace(run, spans=(*run.spans, half)), usual_profile())
    (sample,) = (
        s
        for s in found.compiles
        if s.kernel.identity == first.key and s.seconds == pytest.approx(first.seconds)
    )
    assert sample.concurrency == pytest.approx(1.5)


@pytest.mark.parametrize("policy", [P.FULL, P.PLANNED, P.PREBUILT])
def test_host_times_are_scaled_by_the_host_factor_and_gpu_times_are_not(policy: P) -> None:
    one = scenario(policy, tp=2)
    plain, slow = (
        read_calibration_data(measured(one, other_profile(), factor=factor), usual_profile())
        for factor in (None, 1.5)
    )
    assert (plain.host_factor, slow.host_factor) == (1.0, 1.5)
    assert slow.loads == {name: pytest.approx(value) for name, value in plain.loads.items()}
    assert [s.seconds for s in slow.compiles] == pytest.approx([s.seconds for s in plain.compiles])
    if plain.build is not None and slow.build is not None:
        assert slow.build.start == pytest.approx(plain.build.start)
        assert slow.build.seconds == pytest.approx(plain.build.seconds)
    # These include GPU time, so they stay as measured.
    assert [r.runs for r in slow.ranks] == [r.runs for r in plain.ranks]
    assert all(s.compute > p.compute for s, p in zip(slow.ranks, plain.ranks, strict=True))
    assert [r.comm for r in slow.ranks] == pytest.approx([r.comm for r in plain.ranks])
    assert slow.phases["imports"] == pytest.approx(1.5 * plain.phases["imports"])


def test_loads_are_counted_by_purpose() -> None:
    compiled = run_of().kernels_compiled
    nothing = (0, 0.0)
    # Each compiled kernel is loaded once, at its first use.
    first_use = (compiled, pytest.approx(0.02 * compiled))
    assert data_of().loads == {"verify": nothing, "load": nothing, "first_use": first_use}
    prebuilt = data_of(P.PREBUILT)
    count = len(plan_of(prebuilt.metadata.scenario).kernels)
    assert prebuilt.loads == {
        "verify": (count, pytest.approx(0.0009 * count)),
        "load": (count, pytest.approx(0.004 * count)),
        "first_use": nothing,
    }
    loads = data_of(P.PREBUILT, tp=2).loads
    assert (loads["verify"][0], loads["load"][0]) == (count, 2 * count), "one rank verifies"


def test_walks_are_read_with_their_seconds() -> None:
    found = data_of(P.RELAX)
    ops = [op for op in record(found.metadata.scenario).ranks[0] if isinstance(op, Walk)]
    assert [walk.name for walk, _ in found.walks] == [op.name for op in ops]
    for walk, seconds in found.walks:
        # Costs of other_profile(): 50 ms a walk, 0.02 s a load, 0.2 ms a call.
        calls = sum(count for count, _ in walk.calls)
        loads = sum(len(kernels) for kernels, _ in walk.steps)
        assert seconds == pytest.approx(0.05 + 0.02 * loads + 0.0002 * calls, rel=1e-3)


@pytest.mark.parametrize(
    "facts", [{"device": "cpu"}, {"compute": "skip"}, {"device": "cpu", "compute": "skip"}]
)
def test_runs_without_gpu_computation_give_no_gpu_data(facts: dict[str, str]) -> None:
    run = run_of(P.FULL, tp=2)
    on_gpu = read_calibration_data(run, usual_profile())
    found = read_calibration_data(replace(run, meta={**run.meta, **facts}), usual_profile())
    assert on_gpu.walks and on_gpu.made_elements > 0
    assert (found.walks, found.made_elements) == ([], 0)
    assert [rank.runs for rank in found.ranks] == [()] * 2
    # Kernels loaded by walks still do not count as first uses; the rest is unchanged.
    assert (found.loads, found.compiles) == (on_gpu.loads, on_gpu.compiles)
    assert [one.comm for one in found.ranks] == [one.comm for one in on_gpu.ranks]
    silent = tuple(span for span in run.spans if span.kind != "load")
    run = replace(run, meta={**run.meta, **facts}, spans=silent)
    made = fit_profile([run], usual_profile(), "x").profile
    assert (made.gpu, made.host) == (usual_profile().gpu, usual_profile().host)


def test_build_is_the_largest_share_of_any_node() -> None:
    run, build = run_of(P.PLANNED), data_of(P.PLANNED).build
    assert build is not None
    plan = plan_of(scenario(P.PLANNED, pp=1, tp=1))
    assert set(build.kernels) == {item.kernel for item in plan.kernels}
    spans = [s for s in run.spans if s.kind == "compile"]
    assert (build.workers, build.start) == (16, pytest.approx(2.5))
    assert build.seconds == max(s.end for s in spans) - min(s.start for s in spans)
    one = scenario(P.PLANNED, pp=2, tp=2, nodes=4)
    shared = read_calibration_data(measured(one, other_profile(), hosts=2), usual_profile()).build
    assert shared is not None and shared.workers == 8
    assert len(shared.kernels) == max(map(len, node_shares(one)))
    assert data_of(P.NONE).build is data_of(P.PREBUILT).build is None


def test_rank_totals_of_operations_and_communication() -> None:
    run = run_of(tp=2)
    ops = record(scenario(pp=1, tp=2)).ranks[0]
    rank, other = read_calibration_data(run, usual_profile()).ranks
    operations = sum(isinstance(op, Compute | KernelCall) for op in ops)
    assert sum(count for count, _ in rank.runs) == operations
    collectives = [op for op in ops if isinstance(op, Collective)]
    reduced = sum(op.bytes for op in collectives if op.name.startswith("all_reduce"))
    gathered = sum(op.bytes for op in collectives if op.name.startswith("all_gather"))
    # With two ranks, a ring moves all bytes of a reduction or gather once.
    assert (rank.ring_bytes, rank.gather_bytes) == (reduced, gathered)
    assert rank.messages == len(collectives)
    totals = run.totals()[0]
    assert (rank.compute, rank.comm) == (totals.compute, totals.comm)
    # Costs of other_profile(): 3 ms a message, 4 and 1 MB/s; 2 ms of host time an operation, and
    # 0.75 s more for the first forward.
    assert rank.comm == pytest.approx(0.003 * len(collectives) + reduced / 4e6 + gathered / 1e6)
    assert rank.compute == pytest.approx(0.002 * operations + 0.75)
    assert 0 < sum(device for _, device in rank.runs) < rank.compute and rank.runs == other.runs
