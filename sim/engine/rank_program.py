"""Compile a rank's operations into a program for the engine.

Operations that concern only one rank are summed up in advance: between two points at which ranks
can meet, there is one :class:`Run`. The first uses of kernels are also known in advance, since a
process keeps every kernel that it has loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall, expand
from runner.schedule import (
    Await,
    Capture,
    Compute,
    Forward,
    KernelWork,
    Mark,
    Message,
    Op,
    Part,
    Walk,
)
from sim.costs.profile_costs import ProfileCosts, Seconds

LockKey = tuple[DeepGemmKernelType, int, int, int]
"""Type, n, k and number of groups of a GEMM; its first uses on a node take turns."""


@dataclass(frozen=True, slots=True)
class Run:
    """Work of one rank alone: overlapping seconds of its host and of its GPU."""

    host: float
    device: float


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Kernels that the process loads for the first time, in order."""

    kernels: tuple[Kernel, ...]
    bulk: bool = False  # loaded on their own, not inside a call
    lock: LockKey | None = None  # held meanwhile; None if first uses do not take turns


@dataclass(frozen=True, slots=True)
class WalkRun:
    """A walk: in each step, kernels to load and then the time of the calls that run them."""

    name: str
    steps: tuple[tuple[tuple[Kernel, ...], float], ...]
    calls: tuple[tuple[int, float], ...]  # per step after the first: number, GPU seconds each
    lock: LockKey | None = None


Instruction = Run | FirstUse | WalkRun | Message | Await | KernelWork | Mark | Capture


class ProgramCompiler:
    """Compiles the programs of one run's ranks.

    Args:
        costs: how long operations take.
        table: which kernels the operations run.
        locked: whether first uses on a node take turns.
        walkers_per_gpu: how many of the ranks on a GPU walk at a time.
    """

    def __init__(
        self,
        costs: ProfileCosts,
        table: KernelTable,
        *,
        locked: bool = False,
        walkers_per_gpu: int = 1,
    ) -> None:
        self.costs, self.table = costs, table
        self.locked, self.walkers_per_gpu = locked, walkers_per_gpu

    def program(self, parts: Iterable[Part]) -> list[Instruction]:
        """Instructions for the rank that runs these parts."""
        rank = _RankProgram(self)
        for part in parts:
            if isinstance(part, Forward):
                rank.add_forward(part)
            else:
                rank.add(part)
        rank.end_work()
        return rank.instructions


class _RankProgram:
    """A rank's instructions in the making; its process loads each kernel once."""

    def __init__(self, compiler: ProgramCompiler) -> None:
        self.instructions: list[Instruction] = []
        self._compiler, self._costs = compiler, compiler.costs
        self._host = self._device = 0.0  # work since the last instruction
        self._has_computed = False
        self._loaded: set[Kernel] = set()

    def add(self, op: Op) -> None:
        self._add_meeting(op)
        if not self._has_computed and isinstance(op, Compute | KernelCall):
            self._host += self._costs.first_forward
            self._has_computed = True
        self._work(_own_seconds(op, self._costs))

    def add_forward(self, forward: Forward) -> None:
        if not self._has_computed:
            for op in forward.ops:
                self.add(op)
            return
        for op, after in stops_of(forward, self._costs):
            self._add_meeting(op)
            self._work(after)

    def end_work(self) -> None:
        """Turn the work since the last instruction into an instruction."""
        if self._host or self._device:
            self.instructions.append(Run(self._host, self._device))
        self._host = self._device = 0.0

    def _work(self, seconds: Seconds) -> None:
        self._host += seconds.host
        self._device += seconds.device

    def _add_meeting(self, op: Op) -> None:
        """Add what the engine does at an operation, besides the rank's own work."""
        instruction = self._instruction(op)
        if instruction is not None:
            self.end_work()
            self.instructions.append(instruction)

    def _instruction(self, op: Op) -> Instruction | None:
        if isinstance(op, KernelCall):
            kernels = self._new(self._compiler.table.kernels_of(op))
            return FirstUse(kernels, lock=self._lock(op)) if kernels else None
        if isinstance(op, Walk):
            return self._walk(op)
        if isinstance(op, KernelWork) and op.action == "load":
            kernels = self._new(op.kernels)
            return FirstUse(kernels, bulk=True) if kernels else None
        return None if isinstance(op, Compute) or not _is_shared(op) else op

    def _new(self, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
        new = tuple(kernel for kernel in kernels if kernel not in self._loaded)
        self._loaded.update(new)
        return new

    def _lock(self, gemm: KernelCall | GemmShape) -> LockKey | None:
        return (gemm.type, gemm.n, gemm.k, gemm.num_groups) if self._compiler.locked else None

    def _walk(self, walk: Walk) -> WalkRun:
        steps: list[tuple[tuple[Kernel, ...], float]] = [((), self._costs.walk_seconds())]
        calls = []
        for kernels, count, mean_m in _walk_parts(walk, self._compiler.table):
            one = self._costs.walk_call_seconds(walk.shape, mean_m, walk.steps[-1][1])
            device = one.device * self._compiler.walkers_per_gpu
            steps.append((self._new(kernels), count * max(one.host, device)))
            calls.append((count, device))
        return WalkRun(walk.name, tuple(steps), tuple(calls), self._lock(walk.shape))


def _is_shared(op: Op) -> bool:
    """Whether an operation concerns other ranks, or the engine's view of this one."""
    if isinstance(op, Mark):
        return op.kind in ("phase", "forward")
    return not isinstance(op, Compute | KernelCall)


def _own_seconds(op: Op, costs: ProfileCosts) -> Seconds:
    if isinstance(op, Compute):
        return costs.compute_seconds(op)
    return costs.kernel_seconds(op) if isinstance(op, KernelCall) else Seconds(0.0)


@lru_cache(maxsize=4096)
def stops_of(forward: Forward, costs: ProfileCosts) -> tuple[tuple[Op, Seconds], ...]:
    """Operations of a forward at which a rank may meet others or load a kernel.

    Each comes with the rank's own work from there to the next one.
    """
    first_calls = {index for index, _ in forward.calls}
    stops: list[tuple[Op, Seconds]] = []
    seconds: dict[int, Seconds] = {}  # layers share their operations
    for index, op in enumerate(forward.ops):
        own = seconds.get(id(op))
        if own is None:
            own = seconds[id(op)] = _own_seconds(op, costs)
        if not stops or index in first_calls or _is_shared(op):
            stops.append((op, own))
        else:
            stop, (host, device) = stops[-1]
            stops[-1] = stop, Seconds(host + own.host, device + own.device)
    return tuple(stops)


@lru_cache(maxsize=4096)
def _walk_parts(
    walk: Walk, table: KernelTable
) -> tuple[tuple[tuple[Kernel, ...], int, float], ...]:
    """Split a walk's calls where kernels change: the kernels, number of calls, their mean M."""
    ms = expand(walk.steps)
    return tuple(
        (kernels, high - low, fmean((ms[low], ms[high - 1])))
        for kernels, low, high in table.parts(walk.shape, ms)
    )
