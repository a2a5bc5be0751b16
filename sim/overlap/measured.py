"""Steps that ``launch.steps`` measured, as :class:`sim.overlap.turns.Turns` and as Work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.errors import UserError
from runner.model.strategy import OverlapStrategy
from runner.scenario import Scenario
from runner.schedule import Await, Begin, Collective, Op
from sim.overlap.turns import Owner, Piece, Turns, order_of, short_name
from sim.overlap.work import Cut, LayerSteps, Step, StepKind, Work, cut_forward, cut_plain

MEASURED_SETTINGS: dict[str, type | UnionType] = {
    "model": str,
    "layers": int | None,
    "pp": int,
    "tp": int,
    "ep": bool,
    "mode": str,
    "batch": int,
    "prompt_len": int,
}
"""Settings of measured steps, named as the options, and their types."""


@dataclass(frozen=True)
class MeasuredStep:
    """A forward by a strategy, None as one batch.

    Attributes:
        strategy: which.
        step_seconds: of a step, where nothing was noted in between.
        ends: seconds at which each operation ended, after those of its start, 0.
        link: start and end of every collective, in the order in which they were begun.
    """

    strategy: OverlapStrategy | None
    step_seconds: float
    ends: Sequence[float]
    link: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class MeasuredSteps:
    """What one run of ``launch.steps`` wrote.

    Attributes:
        settings: model, layout and batch, by the names of the options.
        machine: where it ran.
        steps: one batch first.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    steps: Sequence[MeasuredStep]

    @property
    def strategies(self) -> list[OverlapStrategy]:
        """What was measured beside one batch."""
        return [step.strategy for step in self.steps if step.strategy is not None]


def read_steps(path: Path) -> MeasuredSteps:
    """Read a file of ``launch.steps``.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text())
        steps = [
            MeasuredStep(
                None if run["strategy"] is None else OverlapStrategy.from_json(run["strategy"]),
                float(run["step_seconds"]),
                [float(end) for end in run["ends"]],
                [(float(start), float(end)) for start, end in run["link"]],
            )
            for run in data["runs"]
        ]
        return MeasuredSteps(_settings(data["settings"]), dict(data["machine"]), steps)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a file of launch.steps: {error!r}") from None


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    """Those that are known.

    Raises:
        KeyError, TypeError, ValueError: one is missing, or is none.
    """
    for name, kind in MEASURED_SETTINGS.items():
        if not isinstance(data[name], kind):
            raise TypeError(f"{name} is {data[name]!r}")
    ForwardMode(data["mode"])
    return {name: data[name] for name in MEASURED_SETTINGS}


def measured_turns(scenario: Scenario, rank: int, batch: ForwardBatch, step: MeasuredStep) -> Turns:
    """What the GPU and its link did.

    Raises:
        UserError: the forward has other operations than were measured.
    """
    turns, owners = Turns(), list(_owned(scenario, rank, batch, step))
    link = iter(step.link)
    for (op, owner), start, end in zip(owners, step.ends[:-1], step.ends[1:], strict=True):
        waits = isinstance(op, Collective | Await)
        lane = "wait" if waits else "compute"
        name = short_name(op.name) if isinstance(op, Collective | Await) else owner.operation
        turns.pieces.append(Piece(start, end, lane, owner.half, owner.layer, name))
        if isinstance(op, Begin | Collective):
            ran = next(link)
            turns.pieces.append(Piece(*ran, "link", owner.half, owner.layer, short_name(op.name)))
    turns.seconds = step.ends[-1]
    return turns


def measured_work(scenario: Scenario, rank: int, batch: ForwardBatch, step: MeasuredStep) -> Work:
    """What its operations took, whatever waited for what: to be run by other strategies.

    Raises:
        UserError: one batch, or other operations than were measured.
    """
    if step.strategy is None:
        raise UserError("a batch that ran as one tells nothing of its halves")
    before: list[Step] = []
    after: list[Step] = []
    halves: tuple[dict[int, LayerSteps], dict[int, LayerSteps]] = ({}, {})
    link = iter(step.link)
    owners = list(_owned(scenario, rank, batch, step))
    for (op, owner), start, end in zip(owners, step.ends[:-1], step.ends[1:], strict=True):
        made = _step(op, end - start, link)
        if owner.half < 0:
            (before if owner.operation == "before" else after).append(made)
        else:
            layer = halves[owner.half].setdefault(owner.layer, {})
            layer[owner.operation] = (*layer.get(owner.operation, ()), made)
    first, second = (tuple(its[layer] for layer in sorted(its)) for its in halves)
    cut = cut_forward(scenario, rank, batch, step.strategy.comm_sms)
    return Work(
        batch.mode, step.strategy.comm_sms, tuple(before), (first, second), tuple(after), cut.layers
    )


def _step(op: Op, seconds: float, link: Iterator[tuple[float, float]]) -> Step:
    if isinstance(op, Await):
        return Step(StepKind.AWAIT, op.name, 0.0)
    if isinstance(op, Begin | Collective):
        start, end = next(link)
        kind = StepKind.BEGIN if isinstance(op, Begin) else StepKind.BLOCK
        return Step(kind, op.name, end - start)
    return Step(StepKind.COMPUTE, "", seconds)


def _owned(
    scenario: Scenario, rank: int, batch: ForwardBatch, step: MeasuredStep
) -> Iterator[tuple[Op, Owner]]:
    """Every operation of the forward as it ran, and whose it is."""
    sms = 0 if step.strategy is None else step.strategy.comm_sms
    cut = cut_forward(scenario, rank, batch, sms)
    if step.strategy is None:
        owned = list(_owned_plain(scenario, rank, batch, cut))
    else:
        owned = list(_owned_in_turns(cut, step.strategy))
    if len(owned) != len(step.ends) - 1:
        raise UserError(
            f"{len(step.ends) - 1} operations were measured and the forward has {len(owned)}: "
            "another version measured them"
        )
    yield from owned


def _owned_plain(
    scenario: Scenario, rank: int, batch: ForwardBatch, cut: Cut
) -> Iterator[tuple[Op, Owner]]:
    before, layers, after = cut_plain(scenario, rank, batch, cut.layers)
    yield from ((op, Owner(-1, -1, "before")) for op in before)
    for index, ops in enumerate(layers):
        yield from ((op, Owner(-1, index, "layer")) for op in ops)
    yield from ((op, Owner(-1, -1, "after")) for op in after)


def _owned_in_turns(cut: Cut, strategy: OverlapStrategy) -> Iterator[tuple[Op, Owner]]:
    yield from ((op, Owner(-1, -1, "before")) for op in cut.before)
    for half, stage in order_of(len(cut.layers), strategy):
        for layer, name in stage:
            yield from ((op, Owner(half, layer, name)) for op in cut.halves[half][layer][name])
    yield from ((op, Owner(-1, -1, "after")) for op in cut.after)
