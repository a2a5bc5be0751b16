"""A hardware profile fitted to measured runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import exp, log
from statistics import fmean

from runner.jit.builder.costs import plain_seconds
from runner.jit.builder.cut import cut_units, makespan
from runner.jit.builder.unit import Job
from runner.timeline import Timeline
from sim.compile_time import config_key, slowdown, template_of
from sim.fit import bisect_root, minimum, non_negative
from sim.judge import Judged, judge
from sim.profile import Builder, Cache, CompileTimes, Host, Link, Phase, Profile, StartUp
from sim.profile_costs import walk_calls_seconds
from sim.samples import CompileSample, RankSample, Samples, take_samples

_MOST_CONTENTION = 4.0


@dataclass(frozen=True)
class Fitted:
    """One line of what was fitted: its name, its value, and out of how many samples."""

    name: str
    value: str
    samples: int


@dataclass(frozen=True)
class Calibration:
    """A fitted profile, with what is in it."""

    profile: Profile
    fitted: tuple[Fitted, ...]


def fit_profile(measured: Sequence[Timeline], base: Profile, name: str) -> Calibration:
    """Fit a profile; what no run tells is taken from ``base``.

    Raises:
        UserError: a Timeline that does not say what it was of.
    """
    samples = [take_samples(timeline, base) for timeline in measured]
    fitted: list[Fitted] = []
    compile_times = _compile_times([s for one in samples for s in one.compiles], base, fitted)
    profile = replace(
        base,
        name=name,
        compile=compile_times,
        builder=_builder(samples, base.builder, fitted),
        cache=_cache(samples, base.cache, fitted),
        host=_host(samples, base, fitted),
        links=_links(samples, base.links, fitted),
        start_up=_start_up(measured, base.start_up, fitted),
        provenance=_provenance(measured, base),
        estimate=False,
    )
    return Calibration(profile, tuple(fitted))


def leave_one_out(measured: Sequence[Timeline], base: Profile) -> list[Judged]:
    """Each run predicted by a profile that is fitted to the others."""
    found = []
    for index, timeline in enumerate(measured):
        others = [*measured[:index], *measured[index + 1 :]]
        profile = fit_profile(others, base, base.name).profile if others else base
        found += judge([timeline], profile)
    return found


# -- compiles -------------------------------------------------------------------------------------


def _compile_times(
    samples: Sequence[CompileSample], base: Profile, fitted: list[Fitted]
) -> CompileTimes:
    if not samples:
        return base.compile
    contention = _contention(samples, base.compile.contention)
    alone = [_alone(sample, contention) for sample in samples]
    by_config: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    for sample, seconds in zip(samples, alone, strict=True):
        by_config[config_key(sample.kernel)].append(seconds)
        ratios[template_of(sample.kernel)].append(seconds / plain_seconds(sample.kernel))
    scale = {**base.compile.scale, **_means(ratios)}
    fitted += [
        Fitted("compile contention", f"{contention:.3f}", len(samples)),
        Fitted("compile seconds, by configuration", f"{len(by_config)} of them", len(samples)),
        *(Fitted(f"compile scale {name}", f"{scale[name]:.3f}", len(found))
          for name, found in sorted(ratios.items())),
    ]  # fmt: skip
    default = fmean(chain.from_iterable(ratios.values()))
    return CompileTimes(_means(by_config), scale, round(default, 4), round(contention, 4))


def _contention(samples: Sequence[CompileSample], known: float) -> float:
    """What makes one configuration's times agree best; ``known`` where all had like company."""
    spread = max(s.company for s in samples) - min(s.company for s in samples)
    if spread < 1.0:
        return known
    groups: dict[str, list[CompileSample]] = defaultdict(list)
    for sample in samples:
        groups[config_key(sample.kernel)].append(sample)

    def disagreement(contention: float) -> float:
        total = 0.0
        for group in groups.values():
            logs = [log(_alone(sample, contention)) for sample in group]
            middle = fmean(logs)
            total += sum((value - middle) ** 2 for value in logs)
        return total

    return minimum(disagreement, 0.0, _MOST_CONTENTION)


def _alone(sample: CompileSample, contention: float) -> float:
    """Seconds that the compile would have taken without company."""
    times = CompileTimes({}, {}, 1.0, contention)
    low = int(sample.company)
    share = sample.company - low
    slow = (1 - share) * slowdown(times, max(low, 1), sample.cores)
    slow += share * slowdown(times, low + 1, sample.cores)
    return sample.seconds / slow


def _means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Geometric means, rounded: a few slow compiles should not count for many."""
    return {
        key: round(exp(fmean(map(log, values))), 4) for key, values in sorted(found.items())
    }


def _builder(samples: Sequence[Samples], base: Builder, fitted: list[Fitted]) -> Builder:
    builds = [one.build for one in samples if one.build is not None]
    if not builds:
        return base
    start = fmean(build[1] for build in builds)
    scales = []
    for kernels, _, seconds, workers in builds:
        units = cut_units([Job("", kernel, "") for kernel in kernels], workers)
        scales.append(seconds / makespan(units, workers))
    fitted += [Fitted("builder start", f"{start:.2f} s", len(builds)),
               Fitted("builder scale", f"{fmean(scales):.3f}", len(builds))]  # fmt: skip
    return Builder(round(start, 3), round(fmean(scales), 4))


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


# -- hosts, links, start-up -----------------------------------------------------------------------


def _host(samples: Sequence[Samples], base: Profile, fitted: list[Fitted]) -> Host:
    ranks = [rank for one in samples for rank in one.ranks if rank.operations]
    call = base.host.call
    if ranks:
        # Host and GPU overlap: what the GPU alone needs is not the host's.
        call = sum(max(rank.compute - rank.device, 0.0) for rank in ranks)
        call /= sum(rank.operations for rank in ranks)
        fitted.append(Fitted("host, one operation", f"{1e6 * call:.0f} us", len(ranks)))
    walks = [pair for one in samples for pair in one.walks if pair[1] > 0]
    walk_call = base.host.walk_call
    if walks:
        spent = sum(seconds for _, seconds in walks)

        def excess(seconds: float) -> float:
            first = base.cache.first_use
            return sum(walk_calls_seconds(run, seconds, first) for run, _ in walks) - spent

        walk_call = bisect_root(excess, 0.0, 0.1)
        fitted.append(Fitted("host, one call of a walk", f"{1e6 * walk_call:.0f} us", len(walks)))
    return replace(base.host, call=call, walk_call=walk_call)


def _links(
    samples: Sequence[Samples], base: Mapping[str, Link], fitted: list[Fitted]
) -> dict[str, Link]:
    links = dict(base)
    for name, meta in (("gloo", "gloo"), ("nvlink", "nccl")):
        ranks = [rank for one in samples if one.timeline.meta["link"] == meta
                 for rank in one.ranks if rank.messages]  # fmt: skip
        if len(ranks) >= 3:
            links[name] = _link(ranks, base[name])
            found = links[name]
            words = f"{1e6 * found.latency:.0f} us, {found.bandwidth / 1e9:.2f} GB/s"
            fitted.append(Fitted(f"link {name}", words, len(ranks)))
    return links


def _link(ranks: Sequence[RankSample], base: Link) -> Link:
    rows = [(float(rank.messages), rank.reduced, rank.gathered) for rank in ranks]
    latency, per_byte, per_gathered = non_negative(rows, [rank.comm for rank in ranks])
    bandwidth = 1 / per_byte if per_byte > 0 else base.bandwidth
    gather = 1 / per_gathered if per_gathered > 0 else base.gather_bandwidth
    return replace(base, latency=latency, bandwidth=bandwidth, gather_bandwidth=gather)


def _start_up(measured: Sequence[Timeline], base: StartUp, fitted: list[Fitted]) -> StartUp:
    def phase(name: str, known: Phase) -> Phase:
        seen = [(t.world_size, t.phases()[name]) for t in measured if name in t.phases()]
        if not seen:
            return known
        found = _phase(seen, known)
        words = f"{found.seconds:.2f} s + {found.per_rank:.3f} s a rank"
        fitted.append(Fitted(f"phase {name}", words, len(seen)))
        return found

    bandwidth = {**base.weight_bandwidth, "dummy": 1e15}
    return replace(
        base,
        imports=phase("imports", base.imports),
        process_group=phase("process group", base.process_group),
        weights=phase("weights", base.weights),
        weight_bandwidth=bandwidth,
    )


def _phase(seen: Sequence[tuple[int, float]], known: Phase) -> Phase:
    """A line through (ranks, seconds), or a constant where all had the same number of ranks."""
    if len({ranks for ranks, _ in seen}) < 2:
        mean = fmean(seconds for _, seconds in seen)
        return Phase(round(mean - known.per_rank * seen[0][0], 3), known.per_rank)
    rows = [(1.0, float(ranks)) for ranks, _ in seen]
    base, slope = non_negative(rows, [seconds for _, seconds in seen])
    return Phase(round(base, 3), round(slope, 4))


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
