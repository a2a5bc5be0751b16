"""A hardware profile fitted to measured runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean

from runner.build.estimates import makespan
from runner.build.units import split_into_units
from runner.config.model import ModelConfig
from runner.config.presets import PRESETS
from runner.timeline import Timeline
from sim.calibration.data import RankSample, Samples, take_samples
from sim.calibration.fit_compiles import fit_compiles, fit_probe
from sim.calibration.fitting import Fitted, minimum, near_known, non_negative
from sim.calibration.validation import Judged, judge
from sim.costs.profile import (
    Builder,
    Cache,
    Gpu,
    Host,
    Link,
    Phase,
    Profile,
    StartUp,
)

_GPU_BOUND = 2.0
"""Seconds of GPU work in a walk from which on its rate is told by it."""

_FP8_WALKS, _BF16_WALKS = "walk gemm_nt_f8f8bf16:", "walk gemm_nt_bf16bf16f32:"
_SLOWEST_CALL = 0.1
_MANY_CALLS = 1000
_KNOWN_SECONDS = 0.3


@dataclass(frozen=True)
class Calibration:
    """A fitted profile, with what is in it."""

    profile: Profile
    fitted: tuple[Fitted, ...]


def fit_profile(
    measured: Sequence[Timeline],
    base: Profile,
    name: str,
    models: Mapping[str, ModelConfig] = PRESETS,
) -> Calibration:
    """Fit a profile; what no run tells is taken from ``base``.

    Args:
        measured: the runs.
        base: the profile before.
        name: the profile's name.
        models: see :func:`sim.calibration.validation.scenario_of`.

    Raises:
        UserError: a Timeline that does not say what it was of.
    """
    fitted: list[Fitted] = []
    base = replace(base, probe=fit_probe(measured, base, models, fitted))
    # What the GPU takes tells the host's part apart, so its rates come first.
    before = [take_samples(timeline, base, models) for timeline in measured]
    base = replace(base, gpu=_gpu(before, base.gpu, fitted))
    samples = [take_samples(timeline, base, models) for timeline in measured]
    compile_times = fit_compiles([one.compiles for one in samples], base, fitted)
    builder = _builder(samples, base.builder, fitted)
    cache = _cache(samples, base.cache, fitted)
    profile = replace(
        base,
        name=name,
        compile=compile_times,
        builder=builder,
        cache=cache,
        # Loads in walks are taken off their time, as what they have just been fitted to.
        host=_host(samples, replace(base, cache=cache), fitted),
        links=_links(samples, base.links, fitted),
        start_up=_start_up(samples, base.start_up, fitted),
        provenance=_provenance(measured, base),
        estimate=False,
    )
    return Calibration(profile, tuple(fitted))


def leave_one_out(
    measured: Sequence[Timeline], base: Profile, on_step: Callable[[int, int], None] | None = None
) -> list[Judged]:
    """Each run predicted by a profile that is fitted to the others.

    Args:
        measured: the runs.
        base: see :func:`fit_profile`.
        on_step: told how many runs are done, and of how many.
    """
    found = []
    for index, timeline in enumerate(measured):
        others = [*measured[:index], *measured[index + 1 :]]
        profile = fit_profile(others, base, base.name).profile if others else base
        found += judge([timeline], profile)
        if on_step is not None:
            on_step(index + 1, len(measured))
    return found


def _builder(samples: Sequence[Samples], base: Builder, fitted: list[Fitted]) -> Builder:
    builds = [one.build for one in samples if one.build is not None]
    if not builds:
        return base
    start = fmean(build[1] for build in builds)
    scales = []
    for kernels, _, seconds, workers in builds:
        units = split_into_units(kernels, workers)
        scales.append(seconds / makespan(units, workers))
    # One build tells little of others': what was known counts as one more.
    scale = exp(fmean(map(log, [*scales, base.scale])))
    fitted += [
        Fitted("builder start", f"{start:.2f} s", len(builds)),
        Fitted("builder scale", f"{scale:.3f}", len(builds)),
    ]
    return Builder(round(start, 3), round(scale, 4))


def _cache(samples: Sequence[Samples], base: Cache, fitted: list[Fitted]) -> Cache:
    def mean(name: str, pairs: Iterable[tuple[int, float]], known: float) -> float:
        pairs = list(pairs)
        count = sum(number for number, _ in pairs)
        if not count:
            return known
        value = sum(seconds for _, seconds in pairs) / count
        fitted.append(Fitted(name, f"{1000 * value:.2f} ms a kernel", count))
        return round(value, 6)

    return Cache(
        verify=mean("verify", (one.verified for one in samples), base.verify),
        load=mean("load in bulk", (one.loads for one in samples), base.load),
        first_use=mean("load at first use", (one.first_uses for one in samples), base.first_use),
    )


# -- GPU, hosts, links, start-up -----------------------------------------------------------------


def _gpu(samples: Sequence[Samples], base: Gpu, fitted: list[Fitted]) -> Gpu:
    """Rates from walks that the GPU is what they wait for."""

    def rate(name: str, types: str, known: float) -> float:
        pairs = [
            (sum(count * device for count, device in run.calls), seconds)
            for one in samples
            for run, seconds in one.walks
            if run.name.startswith(types)
        ]
        slow = [(device, seconds) for device, seconds in pairs if device > _GPU_BOUND]
        if not slow:
            return known
        found = known * sum(device for device, _ in slow) / sum(seconds for _, seconds in slow)
        fitted.append(Fitted(name, f"{found / 1e12:.0f} TFLOPS", len(slow)))
        return float(f"{found:.4g}")

    return replace(
        base,
        fp8_flops=rate("GPU, FP8 GEMMs", _FP8_WALKS, base.fp8_flops),
        bf16_flops=rate("GPU, bf16 GEMMs", _BF16_WALKS, base.bf16_flops),
    )


def _host(samples: Sequence[Samples], base: Profile, fitted: list[Fitted]) -> Host:
    known = base.host
    walk, walk_call = _walk_host(samples, base, fitted)

    calls, firsts = {}, []
    for name, shared, value in (
        ("host, one operation", False, known.call),
        ("host, one operation on a shared GPU", True, known.shared_call),
    ):
        calls[shared] = value
        ranks = [
            rank
            for one in samples
            for rank in one.ranks
            if rank.operations and (one.timeline.meta["ranks_per_gpu"] > 1) == shared
        ]
        if ranks:
            found, first = _call(ranks, value, known.first_forward)
            calls[shared] = round(found, 8)
            firsts += [first] * len(ranks)
            fitted.append(Fitted(name, f"{1e6 * found:.0f} us", len(ranks)))
    first = fmean(firsts) if firsts else known.first_forward
    if firsts:
        fitted.append(Fitted("host, first forward", f"{first:.2f} s", len(firsts)))
    return Host(
        call=calls[False],
        shared_call=calls[True],
        first_forward=round(first, 4),
        walk=walk,
        walk_call=walk_call,
    )


def _call(ranks: Sequence[RankSample], known: float, known_first: float) -> tuple[float, float]:
    """Seconds of an operation, and those of a first forward besides, near what was known.

    Of the operations each stretch takes as many as its host or its GPU needs.
    """

    def left(call: float) -> list[float]:
        return [
            rank.compute - sum(max(count * call, gpu) for count, gpu in rank.runs) for rank in ranks
        ]

    def first(values: list[float]) -> float:
        return max(0.0, fmean(values))

    def disagreement(call: float) -> float:
        values = left(call)
        more = first(values)
        off = [value - more for value in values]
        off += [
            _KNOWN_SECONDS * (found / before - 1)
            for found, before in ((call, known), (more, known_first))
            if before
        ]
        return sum(value * value for value in off)

    call = minimum(disagreement, 0.0, _SLOWEST_CALL)
    return call, first(left(call))


def _walk_host(
    samples: Sequence[Samples], base: Profile, fitted: list[Fitted]
) -> tuple[float, float]:
    """Seconds of a walk and of each of its calls, where the host is what they wait for."""
    walks = [(one, *pair) for one in samples for pair in one.walks if pair[1] > 0]
    if not walks:
        return base.host.walk, base.host.walk_call
    known = base.host.walk_call
    rows, targets = [], []
    for _, run, seconds in walks:
        waited = sum(count * device for count, device in run.calls if device > known)
        loads = base.cache.first_use * sum(len(kernels) for kernels, _ in run.steps)
        calls = sum(count for count, device in run.calls if device <= known)
        rows.append((1.0, float(calls)))
        targets.append(seconds - waited - loads)
    if max(row[1] for row in rows) < _MANY_CALLS:
        # Short walks do not tell their calls' part from the rest.
        walk = max(fmean(t - known * row[1] for row, t in zip(rows, targets, strict=True)), 0.0)
        call = known
    else:
        walk, call = non_negative(rows, targets)
    fitted += [
        Fitted("host, one walk", f"{1e3 * walk:.1f} ms", len(walks)),
        Fitted("host, one call of a walk", f"{1e6 * call:.0f} us", len(walks)),
    ]
    return round(walk, 6), round(call or known, 8)


def _links(
    samples: Sequence[Samples], base: Mapping[str, Link], fitted: list[Fitted]
) -> dict[str, Link]:
    links = dict(base)
    for name, meta in (("gloo", "gloo"), ("nvlink", "nccl")):
        ranks = [
            rank
            for one in samples
            if _tells_link(one.timeline, meta)
            for rank in one.ranks
            if rank.messages
        ]
        if len(ranks) >= 3:
            links[name] = _link(ranks, base[name])
            found = links[name]
            words = f"{1e6 * found.latency:.0f} us, {found.bandwidth / 1e9:.2f} GB/s"
            fitted.append(Fitted(f"link {name}", words, len(ranks)))
    return links


def _tells_link(timeline: Timeline, link: str) -> bool:
    """Whether a run's communication is that link's: over NCCL ranks of a GPU wait for turns."""
    shared = link == "nccl" and timeline.meta["ranks_per_gpu"] > 1
    return timeline.meta["link"] == link and not shared


def _link(ranks: Sequence[RankSample], base: Link) -> Link:
    rows = [(float(rank.messages), rank.moved, rank.gathered) for rank in ranks]
    known = (base.latency, 1 / base.bandwidth, 1 / (base.gather_bandwidth or base.bandwidth))
    latency, per_byte, per_gathered = near_known(rows, [rank.comm for rank in ranks], known)
    return replace(
        base,
        latency=latency,
        bandwidth=1 / (per_byte or known[1]),
        gather_bandwidth=1 / (per_gathered or known[2]),
    )


def _start_up(samples: Sequence[Samples], base: StartUp, fitted: list[Fitted]) -> StartUp:
    def phase(name: str, known: Phase, *, on_host: bool = True) -> Phase:
        seen = [
            (one.ranks_on_host if on_host else one.timeline.world_size, one.phases[name])
            for one in samples
            if name in one.phases
        ]
        if not seen:
            return known
        found = _phase(seen, known)
        words = f"{found.seconds:.2f} s + {found.per_rank:.3f} s a rank"
        fitted.append(Fitted(f"phase {name}", words, len(seen)))
        return found

    weights, made = _weights(samples, base, fitted)
    return replace(
        base,
        imports=phase("imports", base.imports),
        process_group=phase("process group", base.process_group, on_host=False),
        weights=weights,
        weights_made=made,
    )


def _weights(
    samples: Sequence[Samples], base: StartUp, fitted: list[Fitted]
) -> tuple[Phase, float]:
    """Set-up of a rank: a constant, and its GPU's share in elements that are made up."""
    known = (base.weights.seconds, 1 / base.weights_made)
    seen = [one for one in samples if "weights" in one.phases]
    if not seen:
        return base.weights, base.weights_made
    rows = [(1.0, float(one.made_elements)) for one in seen]
    seconds, per_element = near_known(rows, [one.phases["weights"] for one in seen], known)
    rate = 1 / (per_element or known[1])
    words = f"{seconds:.2f} s, {rate / 1e9:.1f} G elements/s made up"
    fitted.append(Fitted("phase weights", words, len(rows)))
    return Phase(round(seconds, 3)), float(f"{rate:.4g}")


def _phase(seen: Sequence[tuple[int, float]], known: Phase) -> Phase:
    """A line through (ranks, seconds)."""
    rows = [(1.0, float(ranks)) for ranks, _ in seen]
    base = (known.seconds, known.per_rank)
    seconds, per_rank = near_known(rows, [seconds for _, seconds in seen], base)
    return Phase(round(seconds, 3), round(per_rank, 4))


def _provenance(measured: Sequence[Timeline], base: Profile) -> list[str]:
    runs = [
        f"{t.policy}, {t.meta['model']} {t.meta['layers']} layers, pp {t.meta['pp']} tp "
        f"{t.meta['tp']}, {t.meta['nodes']} node(s), {t.meta['machine']['date']}"
        for t in measured
    ]
    gpus = sorted({str(t.meta["machine"]["gpu"]) for t in measured})
    return [
        f"fitted to {len(runs)} measured runs ({', '.join(gpus)}): " + "; ".join(runs),
        f"what they do not tell is from {base.name}: " + " | ".join(base.provenance),
    ]
