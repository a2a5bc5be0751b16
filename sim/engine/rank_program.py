"""A rank's operations as the engine runs them.

Operations that concern only the rank are summed up beforehand: between two points at which ranks
can meet there is one :class:`Run`. First uses of kernels are known beforehand too, since a process
keeps every kernel that it has loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall, expand
from runner.schedule import Await, Capture, Compute, KernelWork, Mark, Message, Op, Walk
from sim.costs.profile_costs import ProfileCosts, Seconds

LockKey = tuple[DeepGemmKernelType, int, int, int]
"""Type, n, k and number of groups of the GEMM whose first uses take turns on a node."""


@dataclass(frozen=True, slots=True)
class Run:
    """Work of this rank alone: seconds of its host and of its GPU, which overlap."""

    host: float
    device: float


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Kernels that this process loads for the first time, in order."""

    kernels: tuple[Kernel, ...]
    bulk: bool = False  # loaded on their own, not inside a call
    lock: LockKey | None = None  # held meanwhile; None where first uses do not take turns


@dataclass(frozen=True, slots=True)
class WalkRun:
    """A walk: kernels to load and then the seconds of the calls that run them, step by step."""

    name: str
    steps: tuple[tuple[tuple[Kernel, ...], float], ...]
    calls: tuple[tuple[int, float], ...]  # of each step but the first: number, GPU seconds of one
    lock: LockKey | None = None


Instruction = Run | FirstUse | WalkRun | Message | Await | KernelWork | Mark | Capture


def compile_program(
    ops: Sequence[Op], costs: ProfileCosts, table: KernelTable, *, locked: bool
) -> list[Instruction]:
    """Instructions of one rank.

    Args:
        ops: its operations. Each object is looked at once, however often it occurs.
        costs: how long they take.
        table: which kernels they run.
        locked: whether first uses take turns on a node.
    """
    keys = list(map(id, ops))
    first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
    seconds = {key: _own_seconds(ops[index], costs) for key, index in first.items()}
    host = {key: 0.0 if own is None else own.host for key, own in seconds.items()}
    device = {key: 0.0 if own is None else own.device for key, own in seconds.items()}
    shared = {key for key, own in seconds.items() if own is None}
    stops = [index for index, key in enumerate(keys) if key in shared]
    stops += [index for index in first.values() if isinstance(ops[index], KernelCall)]
    work = [index for index in first.values() if isinstance(ops[index], Compute | KernelCall)]
    warm = min(work, default=-1)
    loader = _Loader(costs, table, locked)
    program: list[Instruction] = []
    start = 0

    def sum_up(stop: int) -> None:
        on_host = sum(map(host.__getitem__, keys[start:stop]))
        on_device = sum(map(device.__getitem__, keys[start:stop]))
        if start <= warm < stop:
            on_host += costs.first_forward
        if on_host or on_device:
            program.append(Run(on_host, on_device))

    for stop in sorted(stops):
        instruction = loader.instruction(ops[stop])
        if instruction is not None:
            sum_up(stop)
            program.append(instruction)
            start = stop
    sum_up(len(ops))
    return program


def _own_seconds(op: Op, costs: ProfileCosts) -> Seconds | None:
    """Seconds of an operation that concerns only the rank; None for others."""
    if isinstance(op, Compute):
        return costs.compute_seconds(op)
    if isinstance(op, KernelCall):
        return costs.kernel_seconds(op)
    return Seconds(0.0) if isinstance(op, Mark) and op.kind not in ("phase", "forward") else None


class _Loader:
    """Finds first uses of kernels: one process loads each kernel once."""

    def __init__(self, costs: ProfileCosts, table: KernelTable, locked: bool) -> None:
        self._costs, self._table, self._locked = costs, table, locked
        self._loaded: set[Kernel] = set()

    def instruction(self, op: Op) -> Instruction | None:
        """What the engine does at this operation apart from the rank's own work."""
        if isinstance(op, KernelCall):
            kernels = self._new(self._table.kernels_of(op))
            return FirstUse(kernels, lock=self._lock(op)) if kernels else None
        if isinstance(op, Walk):
            return self._walk(op)
        if isinstance(op, KernelWork) and op.action == "load":
            kernels = self._new(op.kernels)
            return FirstUse(kernels, bulk=True) if kernels else None
        return None if isinstance(op, Compute) else op

    def _new(self, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
        new = tuple(kernel for kernel in kernels if kernel not in self._loaded)
        self._loaded.update(new)
        return new

    def _lock(self, gemm: KernelCall | GemmShape) -> LockKey | None:
        return (gemm.type, gemm.n, gemm.k, gemm.num_groups) if self._locked else None

    def _walk(self, walk: Walk) -> WalkRun:
        steps: list[tuple[tuple[Kernel, ...], float]] = [((), self._costs.walk_seconds())]
        calls = []
        for kernels, count, mean_m in _walk_parts(walk, self._table):
            one = self._costs.walk_call_seconds(walk.shape, mean_m, walk.steps[-1][1])
            steps.append((self._new(kernels), count * max(one)))
            calls.append((count, one.device))
        return WalkRun(walk.name, tuple(steps), tuple(calls), self._lock(walk.shape))


@lru_cache(maxsize=4096)
def _walk_parts(
    walk: Walk, table: KernelTable
) -> tuple[tuple[tuple[Kernel, ...], int, float], ...]:
    """A walk's calls cut where other kernels run: the kernels, number of calls, their mean M."""
    ms = expand(walk.steps)
    return tuple(
        (kernels, high - low, fmean((ms[low], ms[high - 1])))
        for kernels, low, high in table.parts(walk.shape, ms)
    )
