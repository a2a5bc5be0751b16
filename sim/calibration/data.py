"""What a measured Timeline holds for a calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.config.model import ModelConfig
from runner.config.presets import PRESETS
from runner.driver.warmup import WarmupPolicy
from runner.kernels.kernel import Kernel
from runner.scenario import Scenario, record
from runner.schedule import Collective, KernelWork, Recv
from runner.timeline import Span, Timeline
from sim.calibration.run_metadata import told_by
from sim.calibration.validation import machine_of
from sim.costs.profile import Profile
from sim.costs.profile_costs import ProfileCosts
from sim.costs.start_up import made_elements
from sim.engine.rank_program import FirstUse, Instruction, Run, WalkRun, compile_program


@dataclass(frozen=True)
class CompileSample:
    """A compile of one nvcc process: when, how long, and how many ran on average meanwhile."""

    kernel: Kernel
    start: float
    seconds: float
    company: float
    cores: int


@dataclass(frozen=True)
class RankSample:
    """Sums of one rank: what it did, and what that took.

    Attributes:
        runs: (host operations, GPU seconds) of each stretch without other ranks, in order; empty
            where they were not a GPU's work.
        compute: seconds measured in them.
        moved: bytes that its all-reduces move on a ring, and that it receives.
        gathered: bytes of its other collectives.
        messages: number of its collectives and receives.
        comm: seconds measured in them, without waits.
    """

    runs: tuple[tuple[int, float], ...]
    compute: float
    moved: float
    gathered: float
    messages: int
    comm: float

    @property
    def operations(self) -> int:
        """Operations of its host."""
        return sum(count for count, _ in self.runs)

    @property
    def device(self) -> float:
        """Seconds of its GPU."""
        return sum(seconds for _, seconds in self.runs)


@dataclass
class Samples:
    """Everything that one measured run tells."""

    timeline: Timeline
    scenario: Scenario
    compiles: list[CompileSample] = field(default_factory=list)
    ranks: list[RankSample] = field(default_factory=list)
    first_uses: tuple[int, float] = (0, 0.0)
    loads: tuple[int, float] = (0, 0.0)
    verified: tuple[int, float] = (0, 0.0)
    walks: list[tuple[WalkRun, float]] = field(default_factory=list)
    build: tuple[tuple[Kernel, ...], float, float, int] | None = None
    phases: dict[str, float] = field(default_factory=dict)
    made_elements: int = 0

    @property
    def ranks_on_host(self) -> int:
        """Ranks that share a machine."""
        return self.timeline.world_size // int(self.timeline.meta["hosts"])


def take_samples(
    timeline: Timeline, profile: Profile, models: Mapping[str, ModelConfig] = PRESETS
) -> Samples:
    """Read one measured run, its seconds as if the host had been as fast as the profile's.

    Runs whose forwards are not a GPU's work tell nothing of one, nor of the host beside it.

    Args:
        timeline: the run.
        profile: its rates of the GPU tell a rank's work apart from its waiting for it.
        models: see :func:`sim.calibration.validation.scenario_of`.

    Raises:
        UserError: the Timeline does not say what it was of.
    """
    told = told_by(timeline, models)
    scenario = told.scenario
    schedule = record(scenario)
    machine = machine_of(timeline, profile, models)
    if machine.host_factor != 1.0:
        timeline = timeline.moved(lambda seconds: seconds / machine.host_factor)
    cores = machine.cores_per_node or 1
    # Operations are counted by what they cost, so that nothing else may be among it.
    counting = replace(profile, host=replace(profile.host, first_forward=0.0))
    costs = ProfileCosts(counting, profile.links[machine.link], cores, machine.ranks_per_gpu)
    programs = [compile_program(ops, costs, scenario.table, locked=False) for ops in schedule.ranks]
    samples = Samples(
        timeline,
        scenario,
        phases=timeline.phases(),
        made_elements=made_elements(scenario.model, scenario.parallel, machine.ranks_per_gpu),
    )
    kernels = {kernel.identity: kernel for program in programs for kernel in _brought_in(program)}
    if scenario.warmup.policy is WarmupPolicy.PLANNED:
        samples.build = _build(timeline, scenario, cores)
    else:
        samples.compiles = _compiles(timeline, kernels, cores)
    _take_loads(samples, programs)
    for rank, program in enumerate(programs):
        samples.ranks.append(_rank_sample(timeline, rank, program, costs.host_call))
    if not told.on_gpu:
        # A walk launches nothing there, and a host does the work itself or none.
        samples.walks.clear()
        samples.ranks = [replace(one, runs=()) for one in samples.ranks]
        samples.made_elements = 0
    return samples


def _brought_in(program: Iterable[Instruction]) -> Iterable[Kernel]:
    for item in program:
        if isinstance(item, FirstUse):
            yield from item.kernels
        elif isinstance(item, WalkRun):
            for kernels, _ in item.steps:
                yield from kernels


def _compiles(timeline: Timeline, kernels: dict[str, Kernel], cores: int) -> list[CompileSample]:
    spans = [span for span in timeline.spans if span.is_kernel]
    return [
        CompileSample(kernels[span.key], span.start, span.seconds, _company(span, spans), cores)
        for span in spans
        if span.key in kernels and span.seconds > 0
    ]


def _company(span: Span, spans: Sequence[Span]) -> float:
    """Mean number of compiles that ran during a compile, itself included."""
    shared = sum(
        max(0.0, min(span.end, other.end) - max(span.start, other.start)) for other in spans
    )
    return shared / span.seconds


def _build(
    timeline: Timeline, scenario: Scenario, cores: int
) -> tuple[tuple[Kernel, ...], float, float, int] | None:
    """Kernels of the largest share, seconds until the first compile, and of all; workers."""
    spans = [span for span in timeline.spans if span.kind == "compile"]
    begun = [s.start for s in timeline.spans if s.kind == "phase" and s.name == "warm-up"]
    if not spans or not begun:
        return None
    parallel = scenario.parallel
    workers = max(1, cores * timeline.meta["hosts"] // parallel.nodes)
    shares = [
        scenario.kernel_set(node * parallel.ranks_per_node).share for node in range(parallel.nodes)
    ]
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    return max(shares, key=len), first - max(begun), last - first, workers


def _take_loads(samples: Samples, programs: Sequence[Sequence[Instruction]]) -> None:
    """Loads by what they were for: walks, bulk loads, verifications, first uses."""
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for span in samples.timeline.spans:
        if span.kind == "load":
            seconds[(span.rank, span.name)] += span.seconds
    for rank, program in enumerate(programs):
        for item in program:
            if isinstance(item, WalkRun):
                samples.walks.append((item, seconds.pop((rank, item.name), 0.0)))
        _take_rank_loads(samples, rank, program, seconds)


def _take_rank_loads(
    samples: Samples,
    rank: int,
    program: Sequence[Instruction],
    seconds: dict[tuple[int, str], float],
) -> None:
    own = {name: spent for (at, name), spent in seconds.items() if at == rank}
    verified = sum(spent for name, spent in own.items() if name.startswith("verify "))
    bulk = sum(spent for name, spent in own.items() if name.startswith("load "))
    first = sum(own.values()) - verified - bulk
    count = sum(len(i.kernels) for i in program if isinstance(i, FirstUse) and not i.bulk)
    loaded = sum(len(i.kernels) for i in program if isinstance(i, FirstUse) and i.bulk)
    checked = sum(
        len(i.kernels) for i in program if isinstance(i, KernelWork) and i.action == "verify"
    )
    samples.first_uses = _plus(samples.first_uses, count, first)
    samples.loads = _plus(samples.loads, loaded, bulk)
    samples.verified = _plus(samples.verified, checked, verified)


def _plus(sum_: tuple[int, float], count: int, seconds: float) -> tuple[int, float]:
    return sum_[0] + count, sum_[1] + seconds


def _rank_sample(
    timeline: Timeline, rank: int, program: Sequence[Instruction], call: float
) -> RankSample:
    totals = timeline.totals()[rank]
    runs = [item for item in program if isinstance(item, Run)]
    collectives = [item for item in program if isinstance(item, Collective)]
    sums = [c for c in collectives if c.name.startswith("all_reduce")]
    gathers = [c for c in collectives if not c.name.startswith("all_reduce")]
    received = [item for item in program if isinstance(item, Recv)]
    return RankSample(
        runs=tuple((round(run.host / call), run.device) for run in runs),
        compute=totals.compute,
        moved=sum(2 * (len(c.group) - 1) / len(c.group) * c.bytes for c in sums)
        + sum(float(item.bytes) for item in received),
        gathered=sum((len(c.group) - 1) * float(c.bytes) for c in gathers),
        messages=len(sums) + len(gathers) + len(received),
        comm=totals.comm,
    )
