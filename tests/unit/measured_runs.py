"""Timelines in the form that launch writes, simulated with a known profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.timeline import Span, Timeline
from sim.costs.profile import Builder, Cache, CompileTimes, Gpu, Host, Link, Phase, Probe, Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.machine import Machine
from sim.simulate import simulate
from tests.unit.tiny_runs import h200

LINKS = {"gloo": "gloo", "nvlink": "nccl"}


def measured(
    scenario: Scenario,
    profile: Profile,
    *,
    cores: int = 16,
    hosts: int = 1,
    ranks_per_gpu: int = 1,
    link: str = "gloo",
    factor: float | None = None,
) -> Timeline:
    """A run with the profile's costs; ``factor`` slows the CPUs and is recorded as the probe."""
    machine = Machine(
        profile=profile,
        host_factor=factor or 1.0,
        cores_per_node=cores,
        hosts=hosts,
        link=link,
        ranks_per_gpu=ranks_per_gpu,
        run_ahead=False,
        nccl_timeout=float("inf"),
        start=StartPhases(PHASES, Weights.DUMMY),
    )
    predicted = simulate(scenario, machine).timeline
    facts: dict[str, Any] = {
        "device": "cuda",
        "link": LINKS[link],
        "compute": "real",
        "jit": "a library",
        "hosts": hosts,
        "ranks_per_gpu": ranks_per_gpu,
        "machine": {
            "date": "2026-11-22",
            "gpu": "a GPU",
            "cores": cores,
            "torch": "2",
            "python": "3",
            "deepgemm_coldstart": "0",
        },
        "coverage": predicted.meta["coverage"],
        "stalls": [],
    }
    if factor is not None:
        facts["machine"]["probe"] = factor * profile.probe.seconds
    meta = {**scenario.timeline_meta(), **facts}
    spans = tuple(_as_launch_names(predicted.spans, scenario))
    return replace(predicted, source="measured", spans=spans, meta=meta)


def _as_launch_names(spans: Sequence[Span], scenario: Scenario) -> Iterator[Span]:
    """Name the loads of bulk loads and walks after their operation, as launch does."""
    planning = scenario.policy.plans
    name = f"load {len(plan_of(scenario).kernels)} kernels"
    walk = ""
    for span in spans:
        if span.kind == "load" and span.name.startswith("walk "):
            walk = span.name
        elif span.kind not in ("load", "compile"):
            # A first use is followed by a call; a load in a walk is not.
            walk = ""
        if span.kind == "load" and not span.name.startswith("verify"):
            yield span._replace(name=walk or (name if planning else span.name))
        else:
            yield span


@cache
def usual_profile() -> Profile:
    """A profile that does not change when the shipped one is fitted again."""
    base = h200()
    return replace(
        base,
        name="usual",
        probe=Probe(2.0),
        compile=CompileTimes(
            {},
            {"sm90_bf16_gemm": 1.09, "sm90_tf32_hc_prenorm_gemm": 1.04, "sm90_fp8_gemm_1d2d": 1.15},
            1.1,
            0.2,
        ),
        builder=Builder(1.2, 1.23),
        cache=Cache(0.0003, 0.0012, 0.008),
        host=Host(
            call=0.00055, shared_call=0.00055, first_forward=0.25, walk=0.02, walk_call=0.00005
        ),
        gpu=Gpu(150e9, kernel=0.0, memory_bandwidth=4.3e12, fp8_flops=1e15, bf16_flops=6e14),
        links={"nvlink": Link(2e-5, 2e11, queues=True), "gloo": Link(0.001, 7e8, 2.1e8)},
        start_up=replace(
            base.start_up,
            imports=Phase(3.5, 0.1),
            process_group=Phase(0.5, 0.02),
            weights=Phase(0.3),
            weight_bandwidth={"disk": 2e9, "page-cache": 1e10},
            weights_made=1e7,
        ),
        provenance=["made up", "for tests"],
    )


@cache
def other_profile() -> Profile:
    """A profile that differs from ``usual_profile`` in every constant that calibration fits."""
    base = usual_profile()
    times = base.compile
    return replace(
        base,
        name="another",
        compile=CompileTimes(
            {},
            {name: 1.6 * scale for name, scale in times.scale.items()},
            1.6 * times.default_scale,
            0.5,
        ),
        builder=Builder(2.5, 1.9),
        cache=Cache(0.0009, 0.004, 0.02),
        host=Host(call=0.002, shared_call=0.002, first_forward=0.75, walk=0.05, walk_call=0.0002),
        links={**base.links, "gloo": Link(0.003, 4e6, 1e6)},
        start_up=replace(
            base.start_up,
            imports=Phase(6.0, 0.3),
            process_group=Phase(1.5, 0.06),
            weights=Phase(1.0),
            weights_made=4e6,
        ),
    )
