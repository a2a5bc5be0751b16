"""A rank's operations as the engine runs them.

What concerns only the rank is summed up beforehand: between two points at which ranks can meet
there is one :class:`Run`. Which kernels are first uses is known beforehand too, since a process
keeps every kernel that it has used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import DeepGemmKernelType, KernelCall, expand
from runner.schedule import (
    Await,
    Begin,
    Capture,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Recv,
    Send,
    Walk,
)
from sim.costs.model import CostModel, Seconds

LockKey = tuple[DeepGemmKernelType, int, int, int]


@dataclass(frozen=True, slots=True)
class Run:
    """Work of this rank alone: seconds of its host and of its GPU, which overlap."""

    host: float
    device: float


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Kernels that come into this process for the first time, in order.

    Attributes:
        kernels: what is needed.
        bulk: whether they are loaded on their own, not by a call.
        lock: what ranks of the node take turns at, None where nothing is.
    """

    kernels: tuple[Kernel, ...]
    bulk: bool = False
    lock: LockKey | None = None


@dataclass(frozen=True, slots=True)
class WalkRun:
    """A walk: kernels that come in at some M, and the seconds of the calls from there on.

    ``calls`` is how many calls each step has, and ``device`` the seconds of one of them on the GPU.
    """

    name: str
    steps: tuple[tuple[tuple[Kernel, ...], float], ...]
    calls: tuple[tuple[int, float], ...]
    lock: LockKey | None = None


Instruction = (
    Run
    | FirstUse
    | WalkRun
    | Collective
    | Begin
    | Await
    | Send
    | Recv
    | KernelWork
    | Mark
    | Capture
)


def compile_program(
    ops: Sequence[Op],
    costs: CostModel,
    table: KernelTable,
    *,
    locked: bool,
    loaded: Iterable[Kernel] = (),
) -> list[Instruction]:
    """Sum up what needs no other rank.

    Args:
        ops: one rank's operations.
        costs: how long they take.
        table: which kernels they run.
        locked: whether first uses take turns on a node.
        loaded: kernels that the process has from the start.
    """
    seen = set(loaded)
    # Recorded operations that are equal are one object: what it costs is asked once.
    known: dict[int, Seconds] = {}
    program: list[Instruction] = []
    host = device = 0.0
    ready = False
    for op in ops:
        seconds = known.get(id(op))
        if seconds is None:
            before: list[Instruction] = []
            if isinstance(op, Compute):
                seconds = known[id(op)] = costs.compute_seconds(op)
            elif isinstance(op, KernelCall):
                seconds = known[id(op)] = costs.kernel_seconds(op)
                before += _first_use(op, table, seen, locked=locked)
            elif isinstance(op, Mark) and op.kind not in ("phase", "forward"):
                seconds = known[id(op)] = Seconds(0.0)
            else:
                before += _others(op, costs, table, seen, locked=locked)
            if before and (host or device):
                program.append(Run(host, device))
                host = device = 0.0
            program += before
            if seconds is None:
                continue
        if not ready and isinstance(op, Compute | KernelCall):
            host, ready = host + costs.first_forward, True
        host, device = host + seconds[0], device + seconds[1]
    if host or device:
        program.append(Run(host, device))
    return program


def _first_use(
    call: KernelCall, table: KernelTable, seen: set[Kernel], *, locked: bool
) -> Iterator[FirstUse]:
    new = tuple(kernel for kernel in table.kernels_of(call) if kernel not in seen)
    if new:
        seen.update(new)
        lock = (call.type, call.n, call.k, call.num_groups) if locked else None
        yield FirstUse(new, lock=lock)


def used_before(program: Iterable[Instruction], phase: str) -> Iterator[Kernel]:
    """Kernels that a rank brings in before a phase begins."""
    for item in program:
        if item == Mark("phase", phase):
            return
        if isinstance(item, FirstUse | KernelWork):
            yield from item.kernels
        elif isinstance(item, WalkRun):
            for kernels, _ in item.steps:
                yield from kernels


def _others(
    op: Op, costs: CostModel, table: KernelTable, seen: set[Kernel], *, locked: bool
) -> Iterator[Instruction]:
    if isinstance(op, Walk):
        shape = op.shape
        lock = (shape.type, shape.n, shape.k, shape.num_groups) if locked else None
        yield _walk_run(op, costs, table, seen, lock)
    elif isinstance(op, KernelWork) and op.action == "load":
        new = tuple(kernel for kernel in op.kernels if kernel not in seen)
        seen.update(new)
        if new:
            yield FirstUse(new, bulk=True)
    elif not isinstance(op, Compute | KernelCall):
        yield op


def _walk_run(
    walk: Walk, costs: CostModel, table: KernelTable, seen: set[Kernel], lock: LockKey | None
) -> WalkRun:
    """Parts of a walk: the kernels that each brings in, and the seconds of its calls."""
    steps: list[tuple[tuple[Kernel, ...], float]] = [((), costs.walk_seconds())]
    calls = []
    for kernels, count, mean_m in _walk_parts(walk, table):
        new = tuple(kernel for kernel in kernels if kernel not in seen)
        seen.update(new)
        one = costs.walk_call_seconds(walk.shape, mean_m, walk.steps[-1][1])
        steps.append((new, count * max(one)))
        calls.append((count, one.device))
    return WalkRun(walk.name, tuple(steps), tuple(calls), lock)


@lru_cache(maxsize=4096)
def _walk_parts(
    walk: Walk, table: KernelTable
) -> tuple[tuple[tuple[Kernel, ...], int, float], ...]:
    """M of a list cut where other kernels run: the kernels, the number of calls, their mean M."""
    ms = expand(walk.steps)
    return tuple(
        (kernels, high - low, fmean((ms[low], ms[high - 1])))
        for kernels, low, high in table.parts(walk.shape, ms)
    )
