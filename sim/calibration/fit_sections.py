"""Fit the sections of a hardware profile, except compile times, to measured runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, log
from statistics import fmean
from typing import NamedTuple

from runner.build.estimates import makespan
from runner.build.units import split_into_units
from sim.calibration.data import CalibrationData, RankSample
from sim.calibration.fitting import KNOWN_SECONDS, minimum, near_known, non_negative
from sim.costs.profile import Builder, Cache, Gpu, Host, Link, Phase, Profile, StartUp

_GPU_BOUND = 2.0
"""A walk's time gives the GPU's rate only if the GPU works for at least this many seconds."""

_SLOWEST_CALL = 0.1
"""Upper bound on the seconds of one host operation."""

_MANY_CALLS = 1000
"""Calls that the longest walk needs for separate fits of the time per call and per walk."""

_FEWEST_RANKS = 3
"""Smallest number of ranks that a link is fitted to."""


class FittedLine(NamedTuple):
    """One fitted figure."""

    name: str
    value: str
    samples: int


@dataclass(frozen=True)
class SectionFits:
    """Fits sections of a profile to runs; values that no run gives come from ``base``.

    Each fitted figure adds a line.
    """

    base: Profile
    data: Sequence[CalibrationData]
    lines: list[FittedLine] = field(default_factory=list)

    def note(self, name: str, value: str, samples: int) -> None:
        self.lines.append(FittedLine(name, value, samples))

    def gpu(self) -> Gpu:
        """Rates from the walks that the GPU dominates."""

        def rate(name: str, walk: str, known: float) -> float:
            walks = [
                (sum(count * device for count, device in item.calls), seconds)
                for run in self.data
                for item, seconds in run.walks
                if item.name.startswith(f"walk {walk}:")
            ]
            slow = [pair for pair in walks if pair[0] > _GPU_BOUND]
            if not slow:
                return known
            found = known * sum(pair[0] for pair in slow) / sum(pair[1] for pair in slow)
            self.note(name, f"{found / 1e12:.0f} TFLOPS", len(slow))
            return float(f"{found:.4g}")

        gpu = self.base.gpu
        return replace(
            gpu,
            fp8_flops=rate("GPU, FP8 GEMMs", "gemm_nt_f8f8bf16", gpu.fp8_flops),
            bf16_flops=rate("GPU, bf16 GEMMs", "gemm_nt_bf16bf16f32", gpu.bf16_flops),
        )

    def builder(self) -> Builder:
        builds = [run.build for run in self.data if run.build is not None]
        if not builds:
            return self.base.builder
        # One build says little about others, so the known value counts as one more.
        logs = [log(self.base.builder.scale)]
        for build in builds:
            units = split_into_units(build.kernels, build.workers)
            logs.append(log(build.seconds / makespan(units, build.workers)))
        start, scale = fmean(build.start for build in builds), exp(fmean(logs))
        self.note("builder start", f"{start:.2f} s", len(builds))
        self.note("builder scale", f"{scale:.3f}", len(builds))
        return Builder(round(start, 3), round(scale, 4))

    @cached_property
    def cache(self) -> Cache:
        def mean(name: str, purpose: str, known: float) -> float:
            kernels = sum(run.loads[purpose][0] for run in self.data)
            if not kernels:
                return known
            value = sum(run.loads[purpose][1] for run in self.data) / kernels
            self.note(name, f"{1000 * value:.2f} ms a kernel", kernels)
            return round(value, 6)

        cache = self.base.cache
        return Cache(
            verify=mean("verify", "verify", cache.verify),
            load=mean("load in bulk", "load", cache.load),
            first_use=mean("load at first use", "first_use", cache.first_use),
        )

    def host(self) -> Host:
        known = self.base.host
        walk, walk_call = self._walks()
        calls, firsts = {False: known.call, True: known.shared_call}, []
        for shared, name in ((False, ""), (True, " on a shared GPU")):
            ranks = [
                (rank, run.host_factor)
                for run in self.data
                for rank in run.ranks
                if rank.runs and (run.metadata.ranks_per_gpu > 1) == shared
            ]
            if ranks:
                found, first = _fit_call(ranks, calls[shared], known.first_forward)
                calls[shared] = round(found, 8)
                firsts += [first] * len(ranks)
                self.note(f"host, one operation{name}", f"{1e6 * found:.0f} us", len(ranks))
        first = fmean(firsts) if firsts else known.first_forward
        if firsts:
            self.note("host, first forward", f"{first:.2f} s", len(firsts))
        return Host(calls[False], calls[True], round(first, 4), walk, walk_call)

    def _walks(self) -> tuple[float, float]:
        """Seconds of a walk, and of each call that the GPU finishes before the host."""
        host = self.base.host
        rows, targets = [], []
        for run in self.data:
            for item, seconds in run.walks:
                if seconds <= 0:
                    continue
                gpu = sum(count * device for count, device in item.calls if device > host.walk_call)
                calls = sum(count for count, device in item.calls if device <= host.walk_call)
                loads = self.cache.first_use * sum(len(kernels) for kernels, _ in item.steps)
                rows.append((1.0, float(calls)))
                targets.append((seconds - gpu) / run.host_factor - loads)
        if not rows:
            return host.walk, host.walk_call
        if max(calls for _, calls in rows) < _MANY_CALLS:
            call = host.walk_call
            walk = fmean(t - call * calls for t, (_, calls) in zip(targets, rows, strict=True))
            walk = max(walk, 0.0)
        else:
            walk, call = non_negative(rows, targets)
        self.note("host, one walk", f"{1e3 * walk:.1f} ms", len(rows))
        self.note("host, one call of a walk", f"{1e6 * call:.0f} us", len(rows))
        return round(walk, 6), round(call or host.walk_call, 8)

    def links(self) -> dict[str, Link]:
        links = dict(self.base.links)
        for name, backend in (("gloo", "gloo"), ("nvlink", "nccl")):
            ranks = [
                rank
                for run in self.data
                if run.metadata.backend == backend
                # Over NCCL, ranks that share a GPU wait for their turns on it.
                and not (backend == "nccl" and run.metadata.ranks_per_gpu > 1)
                for rank in run.ranks
                if rank.messages
            ]
            if len(ranks) >= _FEWEST_RANKS:
                link = links[name] = _fit_link(ranks, links[name])
                words = f"{1e6 * link.latency:.0f} us, {link.bandwidth / 1e9:.2f} GB/s"
                self.note(f"link {name}", words, len(ranks))
        return links

    def start_up(self) -> StartUp:
        base = self.base.start_up
        weights, weights_made = self._weights()
        return replace(
            base,
            imports=self._phase("imports", base.imports, per_host=True),
            process_group=self._phase("process group", base.process_group),
            weights=weights,
            weights_made=weights_made,
        )

    def _phase(self, name: str, known: Phase, *, per_host: bool = False) -> Phase:
        """Fit a phase as a line through (ranks, seconds)."""
        runs = [run for run in self.data if name in run.phases]
        if not runs:
            return known
        hosts = [run.metadata.hosts if per_host else 1 for run in runs]
        rows = [(1.0, float(len(run.ranks) // n)) for run, n in zip(runs, hosts, strict=True)]
        targets = [run.phases[name] / run.host_factor for run in runs]
        seconds, per_rank = near_known(rows, targets, (known.seconds, known.per_rank))
        self.note(f"phase {name}", f"{seconds:.2f} s + {per_rank:.3f} s a rank", len(runs))
        return Phase(round(seconds, 3), round(per_rank, 4))

    def _weights(self) -> tuple[Phase, float]:
        """Fit a rank's set-up: constant host time, and the GPU's rate of making up elements."""
        base = self.base.start_up
        known = (base.weights.seconds, 1 / base.weights_made)
        runs = [run for run in self.data if "weights" in run.phases]
        if not runs:
            return base.weights, base.weights_made
        rows = [(run.host_factor, float(run.made_elements)) for run in runs]
        seconds, per_element = near_known(rows, [run.phases["weights"] for run in runs], known)
        rate = 1 / (per_element or known[1])
        words = f"{seconds:.2f} s, {rate / 1e9:.1f} G elements/s made up"
        self.note("phase weights", words, len(runs))
        return Phase(round(seconds, 3)), float(f"{rate:.4g}")


def _fit_call(
    ranks: Sequence[tuple[RankSample, float]], known: float, known_first: float
) -> tuple[float, float]:
    """Fit seconds of an operation, and extra seconds of a first forward, near the known values.

    Each stretch takes as long as the slower of its host and its GPU. ``ranks`` come with their
    run's host factor.
    """

    def left(call: float) -> list[float]:
        return [
            (rank.compute - sum(max(count * call * factor, gpu) for count, gpu in rank.runs))
            / factor
            for rank, factor in ranks
        ]

    def disagreement(call: float) -> float:
        values = left(call)
        first = max(0.0, fmean(values))
        off = [value - first for value in values]
        off += [
            KNOWN_SECONDS * (found / before - 1)
            for found, before in ((call, known), (first, known_first))
            if before
        ]
        return sum(value * value for value in off)

    call = minimum(disagreement, 0.0, _SLOWEST_CALL)
    return call, max(0.0, fmean(left(call)))


def _fit_link(ranks: Sequence[RankSample], base: Link) -> Link:
    rows = [(float(rank.messages), rank.ring_bytes, rank.gather_bytes) for rank in ranks]
    known = (base.latency, 1 / base.bandwidth, 1 / (base.gather_bandwidth or base.bandwidth))
    latency, per_byte, per_gathered = near_known(rows, [rank.comm for rank in ranks], known)
    return replace(
        base,
        latency=latency,
        bandwidth=1 / (per_byte or known[1]),
        gather_bandwidth=1 / (per_gathered or known[2]),
    )
