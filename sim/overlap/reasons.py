"""Why one placement waits less than another: where each waits, and what it computes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sim.overlap.turns import Piece, Turns


@dataclass(frozen=True)
class Waits:
    """Of one kind of collective, over all layers and both halves.

    Attributes:
        name: the collective.
        seconds: on the link.
        waited: of the reference and of the other: how long the GPU waited for it.
        beside: of both: what ran on the GPU while it was on the link, in a layer in the middle.
    """

    name: str
    seconds: float
    waited: tuple[float, float]
    beside: tuple[str, str]


def why(reference: Turns, other: Turns) -> list[Waits]:
    """One for each kind of collective of the layers that overlap, in the order of a layer."""
    kinds = dict.fromkeys(p.name for p in _inside(reference) if p.lane == "link")
    return [
        Waits(
            name,
            _total(other, "link", name),
            (_total(reference, "wait", name), _total(other, "wait", name)),
            (_beside(reference, name), _beside(other, name)),
        )
        for name in kinds
    ]


def _inside(turns: Turns) -> Iterator[Piece]:
    return (piece for piece in turns.pieces if piece.layer >= 0)


def _total(turns: Turns, lane: str, name: str) -> float:
    return sum(p.seconds for p in _inside(turns) if p.lane == lane and p.name == name)


def _beside(turns: Turns, name: str) -> str:
    """Operations of either half beside the first half's collective in the middle layer."""
    middle = max(piece.layer for piece in turns.pieces) // 2
    under_way = [
        piece
        for piece in _inside(turns)
        if (piece.lane, piece.name, piece.half, piece.layer) == ("link", name, 0, middle)
    ]
    found: dict[str, None] = {}
    for piece in _inside(turns):
        if piece.lane == "compute" and any(
            piece.start < its.end and its.start < piece.end for its in under_way
        ):
            found[piece.name if piece.half else f"own {piece.name}"] = None
    return ", ".join(found) or "nothing"
