"""Constants of a known machine come back out of runs that were made up with them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from runner.timeline import Timeline
from runner.warmup import WarmupPolicy
from sim.calibrate import Calibration, fit_profile, leave_one_out
from sim.compile_time import config_key, template_of
from sim.judge import judge
from sim.profile import Link, Profile
from sim.samples import take_samples
from tests.unit.measured_runs import another, measured, usual
from tests.unit.tiny_runs import scenario

P = WarmupPolicy
KNOWN = another()


@cache
def runs() -> tuple[Timeline, ...]:
    values = {"walk_max_m": 2048, "max_tokens": 2048, "batch_sizes": (1, 64, 512)}
    return tuple(
        measured(scenario(policy, tp=2, layers=layers, **values), KNOWN)
        for policy, layers in (
            (P.NONE, 8), (P.PLANNED, 8), (P.PREBUILT, 8), (P.FAST, 2), (P.RELAX, 4),
        )
    )  # fmt: skip


@cache
def base() -> Profile:
    """The usual machine with a slow link, that the few bytes of these runs tell of."""
    return replace(usual(), links={**usual().links, "gloo": Link(0.001, 8e6, 2e6)})


@cache
def fitted() -> Calibration:
    return fit_profile(runs(), base(), "mine")


def test_the_builder_comes_back_exactly() -> None:
    assert fitted().profile.builder == KNOWN.builder


def test_what_a_kernel_on_disk_takes_comes_back_exactly() -> None:
    assert fitted().profile.cache == KNOWN.cache


def test_host_work_comes_back_within_a_thousandth() -> None:
    host = fitted().profile.host
    assert host.call == pytest.approx(KNOWN.host.call, rel=1e-3)
    assert host.walk == pytest.approx(KNOWN.host.walk, rel=1e-3)
    assert host.walk_call == pytest.approx(KNOWN.host.walk_call, rel=1e-3)


def test_without_company_compiles_come_back_exactly_and_contention_stays() -> None:
    alone = measured(scenario(P.NONE), KNOWN)
    made = fit_profile([alone], usual(), "mine").profile.compile
    assert made.contention == pytest.approx(usual().compile.contention, abs=1e-4)
    for name, scale in KNOWN.compile.scale.items():
        assert made.scale[name] == pytest.approx(scale, rel=1e-3)
    unlisted = set(made.scale) - set(KNOWN.compile.scale)
    assert "transpose_fp32" in unlisted
    for name in unlisted:
        assert made.scale[name] == pytest.approx(KNOWN.compile.default_scale, rel=1e-3)
    for sample in take_samples(alone, usual()).compiles:
        # The mean scale and the sample itself are the same number here.
        found = made.by_config[config_key(sample.kernel)]
        assert found == pytest.approx(sample.seconds, rel=0.1)


def test_contention_comes_back_within_a_tenth() -> None:
    """Runs of one and of two ranks on four cores: the same kernels alone and in company."""
    mixed = [measured(scenario(P.NONE, tp=1, layers=8), KNOWN, cores=4),
             measured(scenario(P.NONE, tp=1, pp=4, layers=8), KNOWN, cores=4),
             measured(scenario(P.PP_PARALLEL, pp=4, layers=8), KNOWN, cores=4)]  # fmt: skip
    made = fit_profile(mixed, usual(), "mine").profile.compile
    assert usual().compile.contention == 0.2 and KNOWN.compile.contention == 0.5
    assert made.contention == pytest.approx(0.5, abs=0.05)
    for name, scale in KNOWN.compile.scale.items():
        assert made.scale[name] == pytest.approx(scale, rel=0.05)


def test_a_link_comes_back_within_a_tenth() -> None:
    """Small and large forwards, and few and many layers: latency and bandwidths apart."""
    many = [
        measured(scenario(P.NONE, tp=2, layers=layers, batch_sizes=sizes, max_tokens=2048), KNOWN)
        for layers in (2, 8) for sizes in (tuple(range(1, 25)), (512,), (2048,))
    ]  # fmt: skip
    link, known = (p.links["gloo"] for p in (fit_profile(many, base(), "mine").profile, KNOWN))
    assert link.latency == pytest.approx(known.latency, rel=0.1)
    assert link.bandwidth == pytest.approx(known.bandwidth, rel=0.1)
    assert link.gather_bandwidth == pytest.approx(known.gather_bandwidth, rel=0.1)
    assert link.queues is False


def test_start_up_comes_back_within_a_tenth() -> None:
    """Each layout measured four times."""
    seen = [measured(scenario(P.PREBUILT, pp=pp, tp=tp), KNOWN)
            for pp, tp in ((1, 1), (2, 1), (2, 2), (4, 2))]  # fmt: skip
    made = fit_profile(4 * seen, usual(), "mine").profile.start_up
    for ranks in (1, 2, 4, 8):
        for name in ("imports", "process_group", "weights"):
            phase, known = getattr(made, name), getattr(KNOWN.start_up, name)
            assert phase.of(ranks) == pytest.approx(known.of(ranks), rel=0.1), name


def test_imports_and_weights_follow_a_hosts_ranks() -> None:
    seen = [measured(scenario(P.PREBUILT, pp=2, tp=2, nodes=hosts), KNOWN, hosts=hosts)
            for hosts in (1, 2, 4)]  # fmt: skip
    made = fit_profile(4 * seen, usual(), "mine").profile.start_up
    for hosts in (1, 2, 4):
        for name in ("imports", "weights"):
            phase, known = getattr(made, name), getattr(KNOWN.start_up, name)
            assert phase.of(4 // hosts) == pytest.approx(known.of(4 // hosts), rel=0.1), name
    assert made.process_group.of(4) == pytest.approx(KNOWN.start_up.process_group.of(4), rel=0.1)


def test_what_no_run_tells_is_the_bases() -> None:
    prebuilt = fit_profile([runs()[2]], base(), "mine").profile
    assert (prebuilt.compile, prebuilt.builder) == (base().compile, base().builder)
    assert (prebuilt.gpu, prebuilt.num_sms) == (base().gpu, base().num_sms)
    assert prebuilt.cache.first_use == base().cache.first_use
    assert prebuilt.host.walk == base().host.walk
    assert prebuilt.links["nvlink"] == base().links["nvlink"]
    assert prebuilt.start_up.capture == base().start_up.capture


def test_a_link_is_fitted_to_runs_over_it() -> None:
    run = measured(scenario(P.NONE, pp=2, tp=2), KNOWN, link="nvlink")
    links = fit_profile([run], base(), "mine").profile.links
    assert links["gloo"] == base().links["gloo"] and links["nvlink"] != base().links["nvlink"]
    assert links["nvlink"].queues
    two_ranks = measured(scenario(P.NONE, tp=2), KNOWN)
    assert fit_profile([two_ranks], base(), "mine").profile.links == base().links, "too few ranks"


def test_the_profile_says_where_it_is_from() -> None:
    made = fit_profile(runs()[:2], replace(base(), estimate=True), "mine").profile
    assert made.name == "mine" and not made.estimate
    assert made.provenance == [
        "fitted to 2 measured runs (a GPU): none, dsv4-tiny 8 layers, pp 1 tp 2, 1 node(s), "
        "2026-11-22; planned, dsv4-tiny 8 layers, pp 1 tp 2, 1 node(s), 2026-11-22",
        "what they do not tell is from usual: " + " | ".join(usual().provenance),
    ]
    assert Profile.from_json(made.to_json()) == made


def test_every_fit_is_told_with_its_samples() -> None:
    lines = {line.name: line for line in fitted().fitted}
    assert (lines["builder start"].value, lines["builder start"].samples) == ("2.50 s", 1)
    assert lines["builder scale"].value == "1.900"
    assert lines["verify"].value == "0.90 ms a kernel"
    assert lines["host, one operation"].value == "2000 us"
    assert lines["host, one operation"].samples == 10
    assert lines["phase imports"].samples == len(runs())
    compiles = [s for run in runs() for s in take_samples(run, base()).compiles]
    assert lines["compile contention"].samples == len(compiles)
    for name in {template_of(sample.kernel) for sample in compiles}:
        of_name = sum(template_of(sample.kernel) == name for sample in compiles)
        assert lines[f"compile scale {name}"].samples == of_name


# -- how good it is -------------------------------------------------------------------------------


def test_a_fitted_profile_foretells_the_runs() -> None:
    for judged in judge(runs(), fitted().profile):
        assert abs(judged.error) < 0.03 and judged.counts_agree
    assert max(abs(judged.error) for judged in judge(runs(), base())) > 0.3


def test_each_run_is_foretold_by_a_profile_of_the_others() -> None:
    three = runs()[:3]
    judged = leave_one_out(three, base())
    assert [item.measured for item in judged] == list(three)
    for index, item in enumerate(judged):
        others = [run for run in three if run is not three[index]]
        (expected,) = judge([three[index]], fit_profile(others, base(), "others").profile)
        assert item.predicted.timeline.spans == expected.predicted.timeline.spans


def test_of_one_run_nothing_is_left_but_the_base() -> None:
    (judged,) = leave_one_out(runs()[:1], base())
    (expected,) = judge(runs()[:1], base())
    assert judged.predicted.timeline.spans == expected.predicted.timeline.spans
