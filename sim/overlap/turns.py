"""Run the parts of a forward on one GPU and its link, in virtual time.

All ranks of a group do the same at the same time, so one of them represents all. Work is queued on
the GPU before it is needed, as in a CUDA graph. The rules are the engine's: the GPU does one thing
at a time, the link runs one collective at a time in the order in which they began, and a wait lasts
until its collective is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sim.overlap.forward import Part, Step, StepKind, Steps


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing that a GPU or its link did.

    Attributes:
        start: seconds since the forward's start.
        end: seconds since the forward's start.
        lane: ``compute``, ``link``, or ``wait`` while the GPU waits for a collective.
        half: see :class:`sim.overlap.forward.Part`.
        layer: see there.
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
        return self.end - self.start


@dataclass(frozen=True)
class LayerTotals:
    """Seconds of one layer, summed over both halves."""

    compute: float
    communication: float
    exposed: float


@dataclass
class Turns:
    """The course of a forward.

    Attributes:
        pieces: what the GPU and its link did, ordered by start.
        seconds: when the GPU was done.
    """

    pieces: list[Piece] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds in which the GPU computed."""
        return self._total("compute")

    @property
    def communication(self) -> float:
        """Seconds in which the link was busy."""
        return self._total("link")

    @property
    def exposed(self) -> float:
        """Seconds in which the GPU only waited for communication."""
        return self._total("wait")

    def by_layer(self) -> list[LayerTotals]:
        """Totals of each layer that overlaps or could overlap."""
        layers = 1 + max((piece.layer for piece in self.pieces), default=-1)
        sums = [{"compute": 0.0, "link": 0.0, "wait": 0.0} for _ in range(layers)]
        for piece in self.pieces:
            if piece.layer >= 0:
                sums[piece.layer][piece.lane] += piece.seconds
        return [LayerTotals(*lanes.values()) for lanes in sums]

    def _total(self, lane: str) -> float:
        return sum((piece.seconds for piece in self.pieces if piece.lane == lane), 0.0)


def run(parts: Iterable[Part[Steps]]) -> Turns:
    """Run parts one after the other on one GPU and its link."""
    gpu = _Gpu()
    for part in parts:
        for step in part.content:
            gpu.run(step, part)
    return gpu.turns


class _Gpu:
    """A GPU's pieces and clock, when its link is free, and when each collective ends."""

    def __init__(self) -> None:
        self.turns = Turns()
        self._link_free = 0.0
        self._ends: dict[str, float] = {}

    def run(self, step: Step, part: Part[Steps]) -> None:
        if step.kind is StepKind.COMPUTE:
            self._go_on(self.turns.seconds + step.seconds, "compute", part, part.name)
            return
        if step.kind is not StepKind.AWAIT:
            start = max(self.turns.seconds, self._link_free)
            self._ends[step.name] = self._link_free = start + step.seconds
            self._note(start, self._link_free, "link", part, step.name)
        if step.kind is not StepKind.BEGIN:
            self._go_on(self._ends.pop(step.name), "wait", part, step.name)

    def _go_on(self, end: float, lane: str, part: Part[Steps], name: str) -> None:
        self._note(self.turns.seconds, end, lane, part, name)
        self.turns.seconds = max(self.turns.seconds, end)

    def _note(self, start: float, end: float, lane: str, part: Part[Steps], name: str) -> None:
        if end > start:
            piece = Piece(start, end, lane, part.half, part.layer, without_half(name))
            self.turns.pieces.append(piece)


def without_half(name: str) -> str:
    """Strip the half from a collective's name."""
    return name.partition(" of ")[0]


@dataclass(frozen=True)
class Waits:
    """Waits for one kind of collective, over all layers and both halves.

    Attributes:
        name: the collective.
        seconds: its time on the link in the other run.
        waited: how long the GPU waited for it, in the reference and in the other run.
        meanwhile: what the GPU computed during it in a middle layer, in both runs.
    """

    name: str
    seconds: float
    waited: tuple[float, float]
    meanwhile: tuple[str, str]


def explain_waits(reference: Turns, other: Turns) -> list[Waits]:
    """Show why a run waits less: each kind of collective in a layer, in the layer's order."""
    first, second = (
        [piece for piece in turns.pieces if piece.layer >= 0] for turns in (reference, other)
    )
    return [
        Waits(
            name,
            _total(second, "link", name),
            (_total(first, "wait", name), _total(second, "wait", name)),
            (_computed_during(first, name), _computed_during(second, name)),
        )
        for name in dict.fromkeys(piece.name for piece in first if piece.lane == "link")
    ]


def _total(pieces: list[Piece], lane: str, name: str) -> float:
    return sum(piece.seconds for piece in pieces if (piece.lane, piece.name) == (lane, name))


def _computed_during(pieces: list[Piece], name: str) -> str:
    """Operations of both halves during the first half's collective in the middle layer."""
    middle = max(piece.layer for piece in pieces) // 2
    where = ("link", name, 0, middle)
    under_way = [p for p in pieces if (p.lane, p.name, p.half, p.layer) == where]
    names = dict.fromkeys(
        piece.name if piece.half else f"own {piece.name}"
        for piece in pieces
        if piece.lane == "compute"
        and any(max(piece.start, its.start) < min(piece.end, its.end) for its in under_way)
    )
    return ", ".join(names) or "nothing"
