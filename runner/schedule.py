"""The Schedule: per rank, the ordered operations of a run, with shapes and without a clock.

A Schedule is a value: serialisable, comparable and hashable. The record backend makes one from
shapes alone; a real run records one as it goes; the simulator replays one in virtual time.
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
    """Work that is not a DeepGEMM kernel: ``flops`` operations over ``bytes`` of memory traffic."""

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
    """Point-to-point receive of ``bytes`` from world rank ``peer``; blocks until it is there."""

    name: str
    peer: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Begin:
    """The start of a collective among ``group`` that goes on beside what follows.

    ``bytes`` is the size of one rank's input. No two that are under way have one name.
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
    """Keys of one rank's messages, in order; ranks that take part in a message agree on its key.

    A key says which ranks take part and how many messages these had before: ``0,1 #3``, ``0>1 #1``.
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
    """Wait for the collective of that name that was begun last."""

    name: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point without work. ``kind`` is phase, forward, layer, yield or batch."""

    kind: str
    name: str


EXCHANGE = "exchange kernels"
"""Name of the collective after which every node has what any of them built."""

BARRIER = "barrier"
"""Name of the collective that only waits for everyone."""

OF_HOSTS = frozenset({EXCHANGE, BARRIER})
"""Collectives of all ranks' hosts, which need no GPU."""


@dataclass(frozen=True, slots=True)
class KernelWork:
    """Work on kernels themselves, apart from any call.

    ``action`` is ``build`` (compile them into the node's cache), ``verify`` (they must be there) or
    ``load`` (bring them into this process).
    """

    action: str
    kernels: tuple[Kernel, ...]

    @property
    def name(self) -> str:
        """Short text for reports."""
        return f"{self.action} {len(self.kernels)} kernels"


@dataclass(frozen=True, slots=True)
class Walk:
    """Calls of one GEMM with every M of a list, so that their kernels are there afterwards.

    ``steps`` are ascending M as (first, last, step) runs.
    """

    shape: GemmShape
    steps: MSteps

    @property
    def name(self) -> str:
        """Short text for reports."""
        return f"walk {self.shape.describe()}"


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture of a CUDA graph of a forward of ``operations`` operations."""

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
    """Operations of one forward of a stage, one object for all runs that contain it."""

    ops: tuple[Op, ...]

    @cached_property
    def calls(self) -> tuple[tuple[int, KernelCall], ...]:
        """Index and call of each distinct kernel call, where it comes first."""
        first: dict[KernelCall, int] = {}
        for index, op in enumerate(self.ops):
            if isinstance(op, KernelCall):
                first.setdefault(op, index)
        return tuple((index, call) for call, index in first.items())


Part = Op | Forward
"""A rank's run is a sequence of parts: whole forwards, and operations between them."""


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
