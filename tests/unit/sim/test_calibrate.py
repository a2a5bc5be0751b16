"""Calibration: fitting runs simulated with a known profile recovers its constants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from runner.config.warmup import WarmupPolicy
from runner.timeline import Timeline
from sim.calibration.calibrate import Calibration, fit_profile, leave_one_out
from sim.calibration.data import read_calibration_data
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import validate
from sim.costs.profile import Builder, Link, Probe, Profile, slowed
from sim.costs.profile_costs import config_key, template_of
from sim.costs.start_up import made_elements
from tests.unit.measured_runs import measured, other_profile, usual_profile
from tests.unit.tiny_runs import scenario

P = WarmupPolicy
KNOWN = other_profile()


VALUES: dict[str, Any] = {"walk_max_m": 2048, "max_tokens": 2048, "batch_sizes": (1, 64, 512)}
LONG: dict[str, Any] = {"layers": 8, "max_tokens": 2048, "batch_sizes": tuple(range(1, 101))}


@cache
def runs() -> tuple[Timeline, ...]:
    return tuple(
        measured(scenario(policy, tp=2, layers=layers, **VALUES), KNOWN)
        for policy, layers in (
            (P.NONE, 8),
            (P.PLANNED, 8),
            (P.PREBUILT, 8),
            (P.FAST, 2),
            (P.RELAX, 4),
        )
    )


@cache
def long_run() -> Timeline:
    return measured(scenario(P.NONE, **LONG), KNOWN)


@cache
def base() -> Profile:
    """The usual profile with a slow link, so that these runs' few bytes take measurable time."""
    return replace(usual_profile(), links={**usual_profile().links, "gloo": Link(0.001, 8e6, 2e6)})


@cache
def fitted() -> Calibration:
    return fit_profile(runs(), base(), "mine")


def test_fit_recovers_builder_start_and_averages_its_scale_with_the_base() -> None:
    # The base's scale, 1.23, counts as one more build beside the measured one of 1.9.
    assert (base().builder, KNOWN.builder) == (Builder(1.2, 1.23), Builder(2.5, 1.9))
    assert fitted().profile.builder == Builder(2.5, round((1.23 * 1.9) ** 0.5, 4))
    thrice = fit_profile(3 * [runs()[1]], base(), "mine").profile
    assert thrice.builder == Builder(2.5, round((1.23 * 1.9**3) ** 0.25, 4))
    known = fit_profile([runs()[1]], replace(base(), builder=KNOWN.builder), "mine").profile
    assert known.builder == KNOWN.builder


def test_fit_recovers_cache_times_exactly() -> None:
    assert fitted().profile.cache == KNOWN.cache


def test_fit_recovers_host_times_within_a_thousandth() -> None:
    """One run is long: a few operations would not outweigh the base profile."""
    host = fit_profile([*runs(), long_run()], base(), "mine").profile.host
    assert host.call == pytest.approx(KNOWN.host.call, rel=1e-3)
    assert host.walk == pytest.approx(KNOWN.host.walk, rel=1e-3)
    assert host.walk_call == pytest.approx(KNOWN.host.walk_call, rel=1e-3)


def test_fit_to_sequential_compiles_recovers_scales_and_keeps_contention() -> None:
    alone = measured(scenario(P.NONE), KNOWN)
    made = fit_profile([alone], usual_profile(), "mine").profile.compile
    assert made.contention == pytest.approx(usual_profile().compile.contention, abs=1e-4)
    for name, scale in KNOWN.compile.scale.items():
        assert made.scale[name] == pytest.approx(scale, rel=1e-3)
    unlisted = set(made.scale) - set(KNOWN.compile.scale)
    assert "transpose_fp32" in unlisted
    for name in unlisted:
        assert made.scale[name] == pytest.approx(KNOWN.compile.default_scale, rel=1e-3)
    for sample in read_calibration_data(alone, usual_profile()).compiles:
        # Here the mean scale equals that of the sample itself.
        found = made.by_config[config_key(sample.kernel)]
        assert found == pytest.approx(sample.seconds, rel=0.1)


def concurrent_runs(speeds: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[Timeline]:
    """Runs with few and many concurrent compiles, on hosts with these speed factors."""
    layouts = (({"pp": 4}, 4), ({"pp": 2, "tp": 2}, 4), ({"pp": 4, "tp": 2}, 8))
    return [
        measured(
            scenario(P.RELAX, layers=8, **layout, **VALUES), slowed(KNOWN, factor), cores=cores
        )
        for (layout, cores), factor in zip(layouts, speeds, strict=True)
    ]


def test_fit_recovers_contention_within_a_tenth() -> None:
    made = fit_profile(concurrent_runs(), usual_profile(), "mine").profile.compile
    assert usual_profile().compile.contention == 0.2 and KNOWN.compile.contention == 0.5
    assert made.contention == pytest.approx(0.5, abs=0.05)
    for name, scale in KNOWN.compile.scale.items():
        assert made.scale[name] == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("speeds", [(0.7, 1.0, 1.5), (1.5, 1.0, 0.7)])
def test_fit_recovers_contention_from_hosts_of_different_speed(
    speeds: tuple[float, float, float],
) -> None:
    """No run has a probe; the most concurrent one is on the slowest or the fastest host."""
    made = fit_profile(concurrent_runs(speeds), usual_profile(), "mine").profile.compile
    assert made.contention == pytest.approx(0.5, abs=0.05)


def test_fitted_probe_is_the_geometric_mean_of_the_runs_probes() -> None:
    one = scenario(P.NONE, tp=2)
    unprobed, same, slow = (measured(one, KNOWN, factor=factor) for factor in (None, 1.0, 2.25))
    assert fit_profile([unprobed, same, slow], usual_profile(), "mine").profile.probe == Probe(3.0)
    assert fit_profile([unprobed], usual_profile(), "mine").profile.probe == usual_profile().probe


def test_fit_to_faster_and_slower_hosts_corrects_for_their_probes() -> None:
    """Hosts are twice as fast and half as fast as the known profile."""
    values = (P.NONE, P.FAST, P.PLANNED, P.PREBUILT)
    runs = {
        factor: [measured(scenario(p, tp=2, **VALUES), KNOWN, factor=factor) for p in values]
        for factor in (0.5, 1.0, 2.0)
    }
    made = fit_profile(runs[0.5] + runs[2.0], base(), "mine").profile
    expected = fit_profile(2 * runs[1.0], base(), "mine").profile
    assert made.probe == expected.probe == usual_profile().probe
    assert (made.cache, made.builder) == (expected.cache, expected.builder)
    assert made.compile.scale == pytest.approx(expected.compile.scale, rel=1e-3)
    for name in ("call", "first_forward", "walk", "walk_call"):
        found = getattr(made.host, name)
        assert found == pytest.approx(getattr(expected.host, name), rel=0.02), name
    for phase in ("imports", "process_group"):
        found, same = (getattr(p.start_up, phase).of(2) for p in (made, expected))
        assert found == pytest.approx(same, rel=0.01)


def test_fit_recovers_first_forward_within_a_twentieth() -> None:
    assert (usual_profile().host.first_forward, KNOWN.host.first_forward) == (0.25, 0.75)
    made = fit_profile([*runs(), long_run()], base(), "mine").profile.host
    assert made.first_forward == pytest.approx(0.75, rel=0.05)


def test_fit_recovers_call_time_of_ranks_that_share_a_gpu() -> None:
    slower = replace(KNOWN, host=replace(KNOWN.host, shared_call=0.005))
    shared = measured(scenario(P.PREBUILT, **LONG), slower, ranks_per_gpu=2)
    short = measured(scenario(P.PREBUILT), slower, ranks_per_gpu=2)
    made = fit_profile([shared, *6 * [short]], base(), "mine").profile.host
    assert made.shared_call == pytest.approx(0.005, rel=2e-3)
    assert made.first_forward == pytest.approx(0.75, rel=0.1)
    assert made.call == base().host.call


def test_fit_recovers_link_within_a_tenth() -> None:
    """Small and large forwards of few and many layers separate latency from bandwidth."""
    many = [
        measured(scenario(P.NONE, tp=2, layers=layers, batch_sizes=sizes, max_tokens=2048), KNOWN)
        for layers in (2, 8)
        for sizes in (tuple(range(1, 25)), (512,), (2048,))
    ]
    link, known = (p.links["gloo"] for p in (fit_profile(many, base(), "mine").profile, KNOWN))
    assert link.latency == pytest.approx(known.latency, rel=0.1)
    assert link.bandwidth == pytest.approx(known.bandwidth, rel=0.1)
    assert link.gather_bandwidth == pytest.approx(known.gather_bandwidth, rel=0.1)
    assert link.queues is False


def test_fit_recovers_start_up_times_within_a_tenth() -> None:
    """Each layout measured four times."""
    seen = [
        measured(scenario(P.PREBUILT, pp=pp, tp=tp), KNOWN)
        for pp, tp in ((1, 1), (2, 1), (2, 2), (4, 2))
    ]
    made = fit_profile(4 * seen, usual_profile(), "mine").profile.start_up
    for ranks in (1, 2, 4, 8):
        for name in ("imports", "process_group"):
            phase, known = getattr(made, name), getattr(KNOWN.start_up, name)
            assert phase.of(ranks) == pytest.approx(known.of(ranks), rel=0.1), name


def test_fit_recovers_dummy_weight_rate_within_a_tenth() -> None:
    """Each layout measured four times."""
    layouts = ((1, 1, 1), (1, 2, 2), (2, 2, 4), (4, 2, 8))
    seen = [
        measured(scenario(P.PREBUILT, pp=pp, tp=tp), KNOWN, ranks_per_gpu=ranks)
        for pp, tp, ranks in layouts
    ]
    made = fit_profile(4 * seen, usual_profile(), "mine").profile.start_up
    assert (usual_profile().start_up.weights_made, KNOWN.start_up.weights_made) == (1e7, 4e6)
    assert made.weights_made == pytest.approx(4e6, rel=0.1)
    assert made.weights.per_rank == 0.0
    for run in seen:
        one = read_metadata(run).scenario
        elements = made_elements(one.model, one.parallel, run.meta["ranks_per_gpu"])
        found = made.weights.seconds + elements / made.weights_made
        assert found == pytest.approx(1.0 + elements / 4e6, rel=0.1)
        assert found == pytest.approx(run.phases()["weights"], rel=0.1)


def test_fitted_import_time_depends_on_ranks_per_host() -> None:
    seen = [
        measured(scenario(P.PREBUILT, pp=2, tp=2, nodes=hosts), KNOWN, hosts=hosts)
        for hosts in (1, 2, 4)
    ]
    made = fit_profile(4 * seen, usual_profile(), "mine").profile.start_up
    for hosts in (1, 2, 4):
        known = KNOWN.start_up.imports.of(4 // hosts)
        assert made.imports.of(4 // hosts) == pytest.approx(known, rel=0.1)
    assert made.process_group.of(4) == pytest.approx(KNOWN.start_up.process_group.of(4), rel=0.1)


def test_constants_that_no_run_measures_come_from_the_base() -> None:
    prebuilt = fit_profile([runs()[2]], base(), "mine").profile
    assert (prebuilt.compile, prebuilt.builder) == (base().compile, base().builder)
    assert (prebuilt.gpu, prebuilt.num_sms) == (base().gpu, base().num_sms)
    assert prebuilt.cache.first_use == base().cache.first_use
    assert prebuilt.host.walk == base().host.walk
    assert prebuilt.links["nvlink"] == base().links["nvlink"]
    assert prebuilt.start_up.capture == base().start_up.capture


def test_only_the_link_used_by_enough_ranks_is_fitted() -> None:
    run = measured(scenario(P.NONE, pp=2, tp=2), KNOWN, link="nvlink")
    links = fit_profile([run], base(), "mine").profile.links
    assert links["gloo"] == base().links["gloo"] and links["nvlink"] != base().links["nvlink"]
    assert links["nvlink"].queues
    turns = measured(scenario(P.NONE, pp=2, tp=2), KNOWN, link="nvlink", ranks_per_gpu=2)
    assert fit_profile([turns], base(), "mine").profile.links == base().links, (
        "ranks that share a GPU are not used"
    )
    two_ranks = measured(scenario(P.NONE, tp=2), KNOWN)
    assert fit_profile([two_ranks], base(), "mine").profile.links == base().links, "too few ranks"


def test_fitted_profile_records_its_provenance() -> None:
    made = fit_profile(runs()[:2], replace(base(), estimate=True), "mine").profile
    assert made.name == "mine" and not made.estimate
    assert made.provenance == [
        "fitted to 2 measured runs (a GPU): none, dsv4-tiny 8 layers, pp 1 tp 2, nodes 1, "
        "2026-11-22; planned, dsv4-tiny 8 layers, pp 1 tp 2, nodes 1, 2026-11-22",
        "what they do not say is from usual: " + " | ".join(usual_profile().provenance),
    ]
    assert Profile.from_json(made.to_json()) == made


def test_each_fitted_figure_has_its_number_of_samples() -> None:
    lines = {line.name: line for line in fitted().fitted}
    assert (lines["builder start"].value, lines["builder start"].samples) == ("2.50 s", 1)
    assert lines["builder scale"].value == "1.529"
    assert lines["verify"].value == "0.90 ms a kernel"
    host, start_up = fitted().profile.host, fitted().profile.start_up
    assert lines["host, one operation"].value == f"{1e6 * host.call:.0f} us"
    assert lines["host, first forward"].value == f"{host.first_forward:.2f} s"
    assert lines["host, first forward"].samples == 10
    assert lines["phase weights"].value == (
        f"{start_up.weights.seconds:.2f} s, {start_up.weights_made / 1e9:.1f} G elements/s made up"
    )
    assert lines["host, one operation"].samples == 10
    assert lines["phase imports"].samples == len(runs())
    compiles = [s for run in runs() for s in read_calibration_data(run, base()).compiles]
    assert lines["compile contention"].samples == len(compiles)
    for name in {template_of(sample.kernel) for sample in compiles}:
        of_name = sum(template_of(sample.kernel) == name for sample in compiles)
        assert lines[f"compile scale {name}"].samples == of_name


# -- accuracy -------------------------------------------------------------------------------------


def test_fitted_profile_predicts_its_runs_within_3_percent() -> None:
    known = replace(base(), builder=KNOWN.builder)
    for found in validate(runs(), fit_profile(runs(), known, "mine").profile):
        assert abs(found.error) < 0.03 and found.counts_agree
    assert max(abs(found.error) for found in validate(runs(), base())) > 0.3


def test_leave_one_out_predicts_each_run_from_the_others() -> None:
    three = runs()[:3]
    found = leave_one_out(three, base())
    assert [item.measured for item in found] == list(three)
    for index, item in enumerate(found):
        others = [run for run in three if run is not three[index]]
        (expected,) = validate([three[index]], fit_profile(others, base(), "others").profile)
        assert item.predicted.timeline.spans == expected.predicted.timeline.spans
    (alone,) = leave_one_out(three[:1], base())
    (expected,) = validate(three[:1], base())
    assert alone.predicted.timeline.spans == expected.predicted.timeline.spans


def test_runs_without_weights_do_not_change_the_weight_rate() -> None:
    made = measured(scenario(WarmupPolicy.PREBUILT, tp=2), other_profile())
    skipped = replace(made, meta={**made.meta, "device": "cpu", "compute": "skip"})
    fitted = fit_profile([skipped], usual_profile(), "skipped").profile.start_up
    assert fitted.weights_made == usual_profile().start_up.weights_made
    assert fitted.weights.seconds > usual_profile().start_up.weights.seconds


def test_fitted_first_forward_averages_shared_and_unshared_gpus() -> None:
    shared = measured(scenario(WarmupPolicy.PREBUILT, tp=2), other_profile())
    assert shared.meta["ranks_per_gpu"] == 1
    of_two = replace(shared, meta={**shared.meta, "ranks_per_gpu": 2})
    firsts = [
        fit_profile(runs, usual_profile(), "one").profile.host.first_forward
        for runs in ([shared], [of_two], [shared, of_two])
    ]
    assert firsts[2] == pytest.approx((firsts[0] + firsts[1]) / 2, abs=1e-3)
