"""Read calibration data from a measured Timeline: compiles, loads, walks, and rank totals.

A run's host factor, its probe time over the profile's, is the relative slowness of its CPUs. Times
that depend on CPUs alone are divided by it here; where the GPU plays a part, the fit applies it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from runner.build.estimates import plain_seconds
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_parts
from runner.driver.warmup import node_shares
from runner.kernels.kernel import Kernel
from runner.planning.plan import table_of
from runner.schedule import Collective, KernelWork, Recv
from runner.timeline import RankTotals, Span, Timeline
from sim.calibration.run_metadata import RunMetadata, read_metadata
from sim.costs.profile import Profile
from sim.costs.profile_costs import ProfileCosts, config_key, template_of
from sim.costs.start_up import made_elements
from sim.engine.rank_program import FirstUse, Instruction, ProgramCompiler, Run, WalkRun


@dataclass(frozen=True)
class CompileSample:
    """A compile by one nvcc process."""

    kernel: Kernel
    seconds: float  # divided by the host factor
    concurrency: float  # mean number of compiles that ran at the same time, including this one
    cores: int  # CPU cores of the machine

    @cached_property
    def template(self) -> str:
        return template_of(self.kernel)

    @cached_property
    def config(self) -> str:
        return config_key(self.kernel)

    @cached_property
    def plain(self) -> float:
        """Seconds estimated from the kernel's code size alone."""
        return plain_seconds(self.kernel)


class BuildSample(NamedTuple):
    """A build under the policy ``planned``; seconds are divided by the host factor."""

    kernels: tuple[Kernel, ...]  # the largest share of any node
    start: float  # from the warm-up's start to the first compile
    seconds: float  # from there to the last compile's end
    workers: int  # compiles at a time


class RankSample(NamedTuple):
    """Totals of one rank."""

    runs: tuple[tuple[int, float], ...]  # host operations, GPU seconds between communications
    compute: float  # seconds measured in these runs
    ring_bytes: float  # bytes that all-reduces move around a ring, and bytes received
    gather_bytes: float  # bytes that other collectives move
    messages: int  # number of collectives and receives
    comm: float  # seconds measured in them, without waits


@dataclass(frozen=True)
class CalibrationData:
    """Everything that calibration needs from one measured run."""

    metadata: RunMetadata
    host_factor: float  # its CPUs' time relative to the profile's
    compiles: list[CompileSample]
    build: BuildSample | None
    ranks: list[RankSample]
    loads: dict[str, tuple[int, float]]  # kernels and seconds / host factor, by field of Cache
    walks: list[tuple[WalkRun, float]]  # with their seconds
    phases: dict[str, float]  # seconds
    made_elements: int  # of dummy weights that a GPU makes


def read_calibration_data(timeline: Timeline, profile: Profile) -> CalibrationData:
    """Read one measured run.

    Args:
        timeline: the run.
        profile: its probe gives the host factor, and its GPU rates the operations' GPU seconds.

    Raises:
        UserError: the Timeline's metadata cannot be read, or the profile lacks the run's link.
    """
    run = read_metadata(timeline)
    scenario, link = run.scenario, profile.links[run.machine(profile).link]
    # Operations are counted by their cost, so that cost may include nothing else.
    counting = replace(profile, host=replace(profile.host, first_forward=0.0))
    costs = ProfileCosts(counting, link, run.cores, run.ranks_per_gpu)
    compiler = ProgramCompiler(costs, table_of(scenario))
    programs = [compiler.program(parts) for parts in record_parts(scenario)]
    factor = run.host_factor(profile)
    walks, loads = _walks_and_loads(timeline, programs, factor)
    ranks = [
        _rank_sample(totals, program, costs.host_call)
        for totals, program in zip(timeline.totals(), programs, strict=True)
    ]
    elements = made_elements(scenario.model, scenario.parallel, run.ranks_per_gpu)
    return CalibrationData(
        metadata=run,
        host_factor=factor,
        compiles=_compiles(timeline, programs, run, factor),
        build=_build(timeline, run, factor),
        # Without a GPU, forwards and walks are host work, or take no time at all.
        ranks=ranks if run.on_gpu else [rank._replace(runs=()) for rank in ranks],
        loads=loads,
        walks=walks if run.on_gpu else [],
        phases=timeline.phases(),
        made_elements=elements if run.on_gpu else 0,
    )


def _compiles(
    timeline: Timeline,
    programs: Sequence[Sequence[Instruction]],
    run: RunMetadata,
    factor: float,
) -> list[CompileSample]:
    if run.scenario.policy is WarmupPolicy.PLANNED:
        return []
    kernels = {
        kernel.identity: kernel
        for program in programs
        for item in program
        for kernel in _first_used(item)
    }
    spans = [span for span in timeline.spans if span.is_kernel]
    return [
        CompileSample(
            kernels[span.key],
            span.seconds / factor,
            _overlap(span, spans) / span.seconds,
            run.cores,
        )
        for span in spans
        if span.key in kernels and span.seconds > 0
    ]


def _first_used(item: Instruction) -> Iterable[Kernel]:
    if isinstance(item, FirstUse):
        return item.kernels
    if isinstance(item, WalkRun):
        return [kernel for kernels, _ in item.steps for kernel in kernels]
    return ()


def _overlap(span: Span, spans: Sequence[Span]) -> float:
    """Seconds of ``spans`` that lie within ``span``."""
    return sum(max(0.0, min(span.end, other.end) - max(span.start, other.start)) for other in spans)


def _build(timeline: Timeline, run: RunMetadata, factor: float) -> BuildSample | None:
    spans = timeline.compiles
    begun = [s.start for s in timeline.spans if s.kind == "phase" and s.name == "warm-up"]
    scenario, parallel = run.scenario, run.scenario.parallel
    if scenario.policy is not WarmupPolicy.PLANNED or not spans or not begun:
        return None
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    return BuildSample(
        kernels=max(node_shares(scenario), key=len),
        start=(first - max(begun)) / factor,
        seconds=(last - first) / factor,
        workers=max(1, run.cores * run.hosts // parallel.nodes),
    )


def _walks_and_loads(
    timeline: Timeline, programs: Sequence[Sequence[Instruction]], factor: float
) -> tuple[list[tuple[WalkRun, float]], dict[str, tuple[int, float]]]:
    """Walks with their seconds; and the number and seconds of all other loads by purpose."""
    spent: dict[tuple[int, str], float] = defaultdict(float)
    for span in timeline.spans:
        if span.kind == "load":
            spent[span.rank, span.name] += span.seconds
    walks = []
    counts, seconds = (dict.fromkeys(("verify", "load", "first_use"), zero) for zero in (0, 0.0))
    for rank, program in enumerate(programs):
        for item in program:
            if isinstance(item, WalkRun):
                walks.append((item, spent.pop((rank, item.name), 0.0)))
            elif isinstance(item, FirstUse):
                counts["load" if item.bulk else "first_use"] += len(item.kernels)
            elif isinstance(item, KernelWork) and item.action == "verify":
                counts["verify"] += len(item.kernels)
    for (_, name), value in spent.items():
        verb = name.partition(" ")[0]
        seconds[verb if verb in ("verify", "load") else "first_use"] += value / factor
    return walks, {name: (int(counts[name]), seconds[name]) for name in counts}


def _rank_sample(totals: RankTotals, program: Sequence[Instruction], call: float) -> RankSample:
    collectives = [item for item in program if isinstance(item, Collective)]
    reductions = [c for c in collectives if c.name.startswith("all_reduce")]
    gathers = [c for c in collectives if not c.name.startswith("all_reduce")]
    received = [item for item in program if isinstance(item, Recv)]
    return RankSample(
        runs=tuple((round(i.host / call), i.device) for i in program if isinstance(i, Run)),
        compute=totals.compute,
        ring_bytes=sum(2 * (len(c.group) - 1) / len(c.group) * c.bytes for c in reductions)
        + sum(float(item.bytes) for item in received),
        gather_bytes=sum((len(c.group) - 1) * float(c.bytes) for c in gathers),
        messages=len(collectives) + len(received),
        comm=totals.comm,
    )
