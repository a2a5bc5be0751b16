"""What a measured Timeline tells a calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.driver.warmup import planned_kernels
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.types import KernelCall
from runner.schedule import Collective, Compute, Walk
from runner.timeline import Span
from sim.calibration.calibrate import fit_profile
from sim.calibration.data import Samples, take_samples
from sim.calibration.drift import Drift
from sim.costs.compile_time import compile_seconds
from tests.unit.measured_runs import another, measured, usual
from tests.unit.tiny_runs import scenario

P = WarmupPolicy


def samples(policy: WarmupPolicy = P.NONE, **layout: int) -> Samples:
    values = {"pp": 1, "tp": 1, **layout}
    return take_samples(measured(scenario(policy, **values), another()), usual())


def test_every_compile_is_a_sample_and_alone_it_has_no_company() -> None:
    found = samples()
    assert len(found.compiles) == found.timeline.kernels_compiled > 10
    for sample in found.compiles:
        alone = compile_seconds(another().compile, sample.kernel)
        assert sample.seconds == pytest.approx(alone)
        assert sample.company == pytest.approx(1.0)
        assert sample.cores == 16


def test_a_run_is_read_as_if_its_machine_did_not_drift() -> None:
    one = scenario(P.FULL, tp=2)
    plain = take_samples(measured(one, another()), usual())
    run = measured(one, another(), drift=Drift(1.5, 50.0))
    found = take_samples(run, usual())
    assert run.wall > plain.timeline.wall + 5
    assert found.timeline.wall == pytest.approx(plain.timeline.wall)
    assert found.phases == pytest.approx(plain.phases)
    assert len(found.compiles) == len(plain.compiles) > 10
    for sample, expected in zip(found.compiles, plain.compiles, strict=True):
        assert (sample.kernel, sample.cores) == (expected.kernel, expected.cores)
        assert (sample.start, sample.seconds, sample.company) == pytest.approx(
            (expected.start, expected.seconds, expected.company)
        )
    assert [seconds for _, seconds in found.walks] == pytest.approx(
        [seconds for _, seconds in plain.walks]
    )
    for rank, other in zip(found.ranks, plain.ranks, strict=True):
        assert rank.runs == other.runs
        assert (rank.compute, rank.comm) == pytest.approx((other.compute, other.comm))
    assert found.first_uses == pytest.approx(plain.first_uses)


def test_a_compile_tells_when_it_was() -> None:
    found = samples()
    spans = [s for s in found.timeline.spans if s.is_kernel]
    assert [(s.kernel.identity, s.start) for s in found.compiles] == [
        (span.key, span.start) for span in spans
    ]


def test_company_is_how_many_compile_at_a_time() -> None:
    """Two tensor ranks that do the same at the same time."""
    assert {round(s.company, 6) for s in samples(tp=2).compiles} == {2.0}
    found = samples()
    first = next(s for s in found.timeline.spans if s.is_kernel)
    half = replace(first, end=first.start + first.seconds / 2)
    more = replace(found.timeline, spans=(*found.timeline.spans, half))
    again = take_samples(more, usual())
    (sample,) = (
        s
        for s in again.compiles
        if s.kernel.identity == first.key and s.seconds == pytest.approx(first.seconds)
    )
    assert sample.company == pytest.approx(1.5)


def test_compiles_of_a_builder_are_no_samples_of_one_process() -> None:
    found = samples(P.PLANNED)
    assert found.timeline.kernels_compiled > 10 and found.compiles == []


def test_loads_are_told_by_what_they_were_for() -> None:
    plain = samples()
    # Each kernel that is compiled is brought in once, at its first use.
    assert plain.first_uses == (
        plain.timeline.kernels_compiled,
        pytest.approx(0.02 * plain.timeline.kernels_compiled),
    )
    assert plain.loads == plain.verified == (0, 0.0)
    prebuilt = samples(P.PREBUILT)
    count = len(prebuilt.plan_of(scenario).kernels)
    assert prebuilt.loads == (count, pytest.approx(0.004 * count))
    assert prebuilt.verified == (count, pytest.approx(0.0009 * count))
    assert prebuilt.first_uses == (0, 0.0)


def test_verifying_is_the_first_rank_of_a_nodes() -> None:
    found = samples(P.PREBUILT, tp=2)
    count = len(found.plan_of(scenario).kernels)
    assert found.verified[0] == count and found.loads[0] == 2 * count


def test_a_walks_time_is_its_own() -> None:
    found = samples(P.RELAX)
    ops = [op for op in record(found.scenario).ranks[0] if isinstance(op, Walk)]
    assert [run.name for run, _ in found.walks] == [op.name for op in ops]
    for run, seconds in found.walks:
        # With what another machine takes: 0.02 s a load, 0.2 ms a call, 50 ms a walk.
        calls = sum(count for count, _ in run.calls)
        loads = sum(len(kernels) for kernels, _ in run.steps)
        assert seconds == pytest.approx(0.05 + 0.02 * loads + 0.0002 * calls, rel=1e-3)


@pytest.mark.parametrize(
    "facts", [{"device": "cpu"}, {"compute": "skip"}, {"device": "cpu", "compute": "skip"}]
)
def test_without_a_gpus_work_nothing_is_told_of_it(facts: dict[str, str]) -> None:
    run = measured(scenario(P.FULL, tp=2), another())
    on_gpu = take_samples(run, usual())
    found = take_samples(replace(run, meta={**run.meta, **facts}), usual())
    assert on_gpu.walks and found.walks == []
    assert [(one.operations, one.device) for one in found.ranks] == [(0, 0.0)] * 2
    # What walks load is still no first use, and all else is as it was.
    assert found.first_uses == on_gpu.first_uses and found.compiles == on_gpu.compiles
    assert [one.comm for one in found.ranks] == [one.comm for one in on_gpu.ranks]


def test_a_fit_to_runs_without_a_gpu_keeps_what_is_known_of_one() -> None:
    run = measured(scenario(P.FULL, tp=2), another())
    silent = replace(
        run,
        meta={**run.meta, "device": "cpu"},
        spans=tuple(s for s in run.spans if s.kind != "load"),
    )
    made = fit_profile([silent], usual(), "x").profile
    assert (made.gpu, made.host) == (usual().gpu, usual().host)


def test_a_build_is_the_largest_share_from_the_warm_ups_begin() -> None:
    found = samples(P.PLANNED)
    assert found.build is not None
    kernels, start, seconds, workers = found.build
    assert set(kernels) == {item.kernel for item in found.plan_of(scenario).kernels}
    assert workers == 16
    spans = [s for s in found.timeline.spans if s.kind == "compile"]
    assert start == pytest.approx(2.5)
    assert seconds == max(s.end for s in spans) - min(s.start for s in spans)
    shared = take_samples(
        measured(scenario(P.PLANNED, pp=2, tp=2, nodes=4), another(), hosts=2), usual()
    )
    assert shared.build is not None and shared.build[3] == 8
    assert len(shared.build[0]) == max(
        len(planned_kernels(shared.scenario, rank).share) for rank in range(4)
    )
    assert samples(P.NONE).build is samples(P.PREBUILT).build is None


def test_a_ranks_sums() -> None:
    one = scenario(tp=2)
    found = take_samples(measured(one, another()), usual())
    ops = record(one).ranks[0]
    own = found.ranks[0]
    assert own.operations == sum(isinstance(op, Compute | KernelCall) for op in ops)
    collectives = [op for op in ops if isinstance(op, Collective)]
    reduced = sum(op.bytes for op in collectives if op.name.startswith("all_reduce"))
    gathered = sum(op.bytes for op in collectives if op.name.startswith("all_gather"))
    # On two ranks a ring moves all bytes of a reduction once, and of a gather.
    assert (own.moved, own.gathered, own.messages) == (reduced, gathered, len(collectives))
    totals = found.timeline.totals()[0]
    assert (own.compute, own.comm) == (totals.compute, totals.comm)
    link = another().links["gloo"]
    assert link.gather_bandwidth is not None
    expected = link.latency * len(collectives) + reduced / 4e6 + gathered / 1e6
    assert own.comm == pytest.approx(expected)
    # The host is what is waited for here, and what its first forward takes is no operation.
    assert own.compute == pytest.approx(0.002 * own.operations + 0.75)
    assert own.device == pytest.approx(found.ranks[1].device) and 0 < own.device < own.compute


def test_unknown_kernels_and_empty_compiles_are_left_out() -> None:
    found = samples()
    odd = (
        Span(0, 1.0, 2.0, "compile", "other", "other 0"),
        Span(0, 3.0, 3.0, "compile", "x", kernels_of_first(found)),
    )
    more = replace(found.timeline, spans=(*found.timeline.spans, *odd))
    assert len(take_samples(more, usual()).compiles) == len(found.compiles)


def kernels_of_first(found: Samples) -> str:
    call = next(op for op in record(found.scenario).ranks[0] if isinstance(op, KernelCall))
    return kernels_of(call)[0].identity
