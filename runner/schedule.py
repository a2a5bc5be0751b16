"""The Schedule: for each rank, the ordered operations of a run, with shapes but without times.

A Schedule is a value: serialisable, comparable and hashable. The driver records one from shapes, a
real run records one as it goes, and the simulator replays one in virtual time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from runner.kernels.kernel import Kernel
from runner.kernels.types import GemmShape, KernelCall, MSteps


@dataclass(frozen=True, slots=True)
class Compute:
    """Work outside DeepGEMM's kernels: ``flops`` operations and ``bytes`` of memory traffic."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective among ``group`` (world ranks); ``bytes`` is the size of one rank's input."""

    name: str
    group: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Send:
    """Point-to-point send of ``bytes`` to world rank ``peer``; ``name`` says what is sent."""

    name: str
    peer: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Recv:
    """Point-to-point receive of ``bytes`` from world rank ``peer``; waits until they are there."""

    name: str
    peer: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Start of an asynchronous collective among ``group``, which runs until its :class:`Await`.

    ``bytes`` is the size of one rank's input. Collectives in flight have different names.
    """

    name: str
    group: tuple[int, ...]
    bytes: int


Message = Collective | Begin | Send | Recv
"""Communication with other ranks."""


def message_name(op: Message) -> str:
    """Name of a message in spans and errors."""
    prefix = {Send: "send ", Recv: "recv "}.get(type(op), "")
    return f"{prefix}{op.name}"


class MessageKeys:
    """Keys of one rank's messages, in order; all ranks in a message compute the same key for it.

    A key has the ranks and the message's number among these ranks: ``0,1 #3``, ``0>1 #1``.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._counts: Counter[str] = Counter()

    def next_key(self, op: Message) -> str:
        if isinstance(op, Send):
            among = f"{self._rank}>{op.peer}"
        elif isinstance(op, Recv):
            among = f"{op.peer}>{self._rank}"
        else:
            among = _join(op.group)
        self._counts[among] += 1
        return f"{among} #{self._counts[among]}"


@lru_cache(maxsize=1024)
def _join(group: tuple[int, ...]) -> str:
    return ",".join(map(str, group))


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for the last :class:`Begin` of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the run, without work. ``kind`` is phase, forward, layer, yield or batch."""

    kind: str
    name: str


EXCHANGE = "exchange kernels"
"""Name of the collective after which every node has the kernels that any node built."""

BARRIER = "barrier"
"""Name of the collective that only waits for all ranks."""

OF_HOSTS = frozenset({EXCHANGE, BARRIER})
"""Collectives among all ranks on the host side, which need no GPU."""


@dataclass(frozen=True, slots=True)
class KernelWork:
    """Work on kernels outside any call.

    ``action`` is ``build`` (compile into the node's cache), ``verify`` (check that they are there)
    or ``load`` (load into this process).
    """

    action: str
    kernels: tuple[Kernel, ...]

    @property
    def name(self) -> str:
        """Short text for reports."""
        return f"{self.action} {len(self.kernels)} kernels"


@dataclass(frozen=True, slots=True)
class Walk:
    """Calls of one GEMM with every M of a list, after which their kernels are ready.

    ``steps`` are the M in ascending order, as (first, last, step) runs.
    """

    shape: GemmShape
    steps: MSteps

    @property
    def name(self) -> str:
        """Short text for reports."""
        return f"walk {self.shape.describe()}"


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture of a CUDA graph of a forward that has ``operations`` operations."""

    name: str
    operations: int


Op = (
    KernelCall
    | Compute
    | Collective
    | Begin
    | Await
    | Send
    | Recv
    | Mark
    | KernelWork
    | Walk
    | Capture
)


@dataclass(frozen=True, eq=False)
class Forward:
    """Operations of one forward of a stage; all runs that contain it share this object."""

    ops: tuple[Op, ...]

    @cached_property
    def calls(self) -> tuple[tuple[int, KernelCall], ...]:
        """Each distinct kernel call, with the index where it first appears."""
        first: dict[KernelCall, int] = {}
        for index, op in enumerate(self.ops):
            if isinstance(op, KernelCall):
                first.setdefault(op, index)
        return tuple((index, call) for call, index in first.items())


Part = Op | Forward
"""A rank's run is a sequence of parts: forwards, and single operations between them."""


def flatten(parts: Iterable[Part]) -> tuple[Op, ...]:
    """The operations of all parts, in order."""
    return tuple(
        op for part in parts for op in (part.ops if isinstance(part, Forward) else (part,))
    )


_TAGS: dict[str, type] = {
    "kernel": KernelCall,
    "compute": Compute,
    "collective": Collective,
    "begin": Begin,
    "await": Await,
    "send": Send,
    "recv": Recv,
    "mark": Mark,
    "kernels": KernelWork,
    "walk": Walk,
    "capture": Capture,
}
_TAG_OF = {cls: tag for tag, cls in _TAGS.items()}


@dataclass(frozen=True)
class Schedule:
    """Operations of every rank of a run; ``ranks[i]`` is what world rank ``i`` does, in order."""

    ranks: tuple[tuple[Op, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": 1, "ranks": [[_encode(op) for op in ops] for ops in self.ranks]}


def _encode(op: Op) -> list[Any]:
    values = [getattr(op, item.name) for item in fields(op)]
    plain = [list(v) if isinstance(v, tuple) else v for v in values]
    if isinstance(op, KernelCall):
        plain[0] = op.type.name
    elif isinstance(op, KernelWork):
        plain[1] = [[k.name, k.header, k.entry, list(k.arguments)] for k in op.kernels]
    elif isinstance(op, Walk):
        shape = op.shape
        plain[0] = [shape.type.name, shape.n, shape.k, shape.num_groups, shape.num_sms]
        plain[1] = [list(run) for run in op.steps]
    return [_TAG_OF[type(op)], *plain]
