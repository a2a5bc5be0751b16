"""Two halves of a batch in turns on one GPU and its link, in virtual time.

All ranks of a group do the same at the same time, so one stands for all; and what is launched is
queued on the GPU before it is needed, as in a CUDA graph. The rules are those of the engine: the
GPU does one thing at a time, the link moves one collective at a time in the order in which they
were begun, and a wait lasts until its collective is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from runner.model.operations import overlapped_order
from runner.model.strategy import MARK, OverlapStrategy
from sim.overlap.work import Step, StepKind, Steps, Work

LANES = ("compute", "link", "wait")
"""The GPU at work, a collective, the GPU waiting for one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that a GPU or its link did.

    Attributes:
        start: seconds since the forward's start.
        end: the same.
        lane: one of :data:`LANES`.
        half: which half of the batch; -1 is the whole.
        layer: index among the layers that overlap; -1 is outside of them.
        name: the operation, or the collective.
    """

    start: float
    end: float
    lane: str
    half: int
    layer: int
    name: str

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.start


@dataclass(frozen=True)
class LayerTotals:
    """Seconds of one layer, of both halves: the GPU at work, collectives, the GPU waiting."""

    compute: float
    communication: float
    exposed: float


@dataclass
class Turns:
    """A forward as it ran.

    Attributes:
        pieces: what the GPU and its link did, in the order in which it was begun.
        seconds: until the GPU was done.
    """

    pieces: list[Piece] = field(default_factory=list)
    seconds: float = 0.0

    def total(self, lane: str) -> float:
        """Seconds of a lane."""
        return sum((piece.seconds for piece in self.pieces if piece.lane == lane), 0.0)

    @property
    def compute(self) -> float:
        """Seconds that the GPU was at work."""
        return self.total("compute")

    @property
    def communication(self) -> float:
        """Seconds that the link was at work."""
        return self.total("link")

    @property
    def exposed(self) -> float:
        """Seconds that the GPU waited for communication, and did nothing else."""
        return self.total("wait")

    def by_layer(self) -> list[LayerTotals]:
        """What each layer that overlaps, or could, took."""
        layers = 1 + max((piece.layer for piece in self.pieces), default=-1)
        sums = [dict.fromkeys(LANES, 0.0) for _ in range(layers)]
        for piece in self.pieces:
            if piece.layer >= 0:
                sums[piece.layer][piece.lane] += piece.seconds
        return [LayerTotals(*lanes.values()) for lanes in sums]


@dataclass(frozen=True)
class Owner:
    """Whose steps are run; see :class:`Piece`."""

    half: int
    layer: int
    operation: str


class _Gpu:
    """One GPU and its link."""

    def __init__(self) -> None:
        self.turns = Turns()
        self._now = self._free = 0.0
        self._ends: dict[str, float] = {}

    def run(self, steps: Iterable[Step], owner: Owner) -> None:
        """Queue steps behind what was queued before."""
        for step in steps:
            if step.kind is StepKind.COMPUTE:
                self._note(self._now, self._now + step.seconds, "compute", owner, owner.operation)
                self._now += step.seconds
            elif step.kind is StepKind.AWAIT:
                self._wait(self._ends.pop(step.name), owner, step.name)
            else:
                start = max(self._now, self._free)
                self._free = start + step.seconds
                self._note(start, self._free, "link", owner, step.name)
                if step.kind is StepKind.BEGIN:
                    self._ends[step.name] = self._free
                else:
                    self._wait(self._free, owner, step.name)
        self.turns.seconds = self._now

    def _wait(self, end: float, owner: Owner, name: str) -> None:
        self._note(self._now, end, "wait", owner, name)
        self._now = max(self._now, end)

    def _note(self, start: float, end: float, lane: str, owner: Owner, name: str) -> None:
        if end > start:
            piece = Piece(start, end, lane, owner.half, owner.layer, short_name(name))
            self.turns.pieces.append(piece)


def short_name(name: str) -> str:
    """A collective's name without the half that it is of."""
    return name.partition(" of ")[0]


def run_whole(before: Steps, layers: Sequence[Steps], after: Steps) -> Turns:
    """The batch as one; what is beside its own communication is its own."""
    gpu = _Gpu()
    gpu.run(before, Owner(-1, -1, "before"))
    for index, steps in enumerate(layers):
        gpu.run(steps, Owner(-1, index, "layer"))
    gpu.run(after, Owner(-1, -1, "after"))
    return gpu.turns


def run_in_turns(work: Work, strategy: OverlapStrategy) -> Turns:
    """Both halves by a strategy.

    Raises:
        UserError: its ``delta_stages`` is more than there are stages.
    """
    gpu = _Gpu()
    gpu.run(work.before, Owner(-1, -1, "before"))
    for half, stage in order_of(len(work.layers), strategy):
        for layer, name in stage:
            gpu.run(work.halves[half][layer][name], Owner(half, layer, name))
    gpu.run(work.after, Owner(-1, -1, "after"))
    return gpu.turns


def order_of(
    layers: int, strategy: OverlapStrategy
) -> Iterator[tuple[int, Sequence[tuple[int, str]]]]:
    """Halves in turns, each with the operations of a stage: index of the layer, and name.

    Raises:
        UserError: the strategy's ``delta_stages`` is more than there are stages.
    """
    stages: list[list[tuple[int, str]]] = [[]]
    for layer in range(layers):
        for step in strategy.steps:
            if step != MARK:
                stages[-1].append((layer, step))
            elif stages[-1]:
                stages.append([])
    stages = [stage for stage in stages if stage]
    strategy.check_lead(len(stages))
    for half, index in overlapped_order(len(stages), strategy.delta_stages):
        yield half, stages[index]
