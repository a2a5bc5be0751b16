"""Steps that ``launch.steps`` measured, as :class:`sim.overlap.turns.Turns`, and their validation.

A measured step says when each operation of a forward ended. The forward, recorded again, says which
operation that was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from runner.backend.forward_batch import ForwardMode
from runner.config.fields import field_types, read_plain
from runner.errors import UserError
from runner.model.strategy import OverlapStrategy
from runner.schedule import Await, Begin, Collective, Op
from sim.overlap.compare import Comparison
from sim.overlap.forward import (
    Forward,
    Ops,
    Part,
    Step,
    StepKind,
    Steps,
    Work,
    communication_step,
)
from sim.overlap.turns import Piece, Turns, run_in_turns, without_half

Span = tuple[float, float]
"""Start and end in seconds."""

Row = dict[str, str | float | None]
"""A line of a table as plain data."""


@dataclass(frozen=True)
class StepSettings:
    """What was measured, by the names of the options."""

    model: str
    layers: int | None
    pp: int
    tp: int
    ep: bool
    mode: ForwardMode
    batch: int
    prompt_len: int

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> StepSettings:
        """Take the settings out of a file's; KeyError or ValueError where one is not there."""
        make: Callable[..., StepSettings] = cls
        return make(
            **{name: read_plain(kind, name, data) for name, kind in field_types(cls).items()}
        )


@dataclass(frozen=True)
class MeasuredStep:
    """A forward by a strategy; None is one batch.

    Attributes:
        strategy: which.
        step_seconds: of a step in which nothing was timed in between.
        ends: seconds at which each operation ended; the first is the start, 0.
        link: start and end of every collective, in the order in which they began.
    """

    strategy: OverlapStrategy | None
    step_seconds: float
    ends: Sequence[float]
    link: Sequence[Span]


@dataclass(frozen=True)
class MeasuredSteps:
    """What one run of ``launch.steps`` wrote: where, and its steps, one batch first."""

    settings: StepSettings
    machine: dict[str, object]
    steps: Sequence[MeasuredStep]

    @property
    def strategies(self) -> list[OverlapStrategy]:
        return [step.strategy for step in self.steps if step.strategy is not None]


def read_steps(path: Path) -> MeasuredSteps:
    """Read a file that ``launch.steps`` wrote.

    Raises:
        UserError: it cannot be read, or is not such a file.
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
        settings = StepSettings.from_json(data["settings"])
        return MeasuredSteps(settings, dict(data["machine"]), steps)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a file of launch.steps: {error!r}") from None


def measured_turns(forward: Forward, step: MeasuredStep) -> Turns:
    """What the GPU and its link did.

    Raises:
        UserError: the forward has other operations than were measured.
    """
    halves = forward.in_halves(0 if step.strategy is None else step.strategy.comm_sms)
    parts: Iterable[Part[Ops]] = (
        forward.whole(halves.layers) if step.strategy is None else halves.in_turns(step.strategy)
    )
    turns = Turns(seconds=step.ends[-1])
    for part, op, ran, on_link in _timed(parts, step):
        waits = isinstance(op, Collective | Await)
        name = without_half(op.name) if isinstance(op, Begin | Collective | Await) else part.name
        lane, of = ("wait", name) if waits else ("compute", part.name)
        turns.pieces.append(Piece(*ran, lane, part.half, part.layer, of))
        if isinstance(op, Begin | Collective):
            turns.pieces.append(Piece(*on_link, "link", part.half, part.layer, name))
    return turns


def measured_work(forward: Forward, step: MeasuredStep) -> Work:
    """How long each part took, apart from waits: to be run by other strategies.

    Raises:
        UserError: the step ran as one batch, or has other operations than were measured.
    """
    if step.strategy is None:
        raise UserError("a batch that ran as one says nothing about its halves")
    halves = forward.in_halves(step.strategy.comm_sms)
    steps: defaultdict[tuple[int, int, str], Steps] = defaultdict(tuple)
    for part, op, (start, end), (begun, done) in _timed(halves.in_turns(step.strategy), step):
        if isinstance(op, Begin | Collective | Await):
            made = communication_step(op, done - begun)
        else:
            made = Step(StepKind.COMPUTE, "", end - start)
        steps[part.half, part.layer, part.name] += (made,)
    return halves.map(lambda part: steps[part.half, part.layer, part.name])


def _timed(
    parts: Iterable[Part[Ops]], step: MeasuredStep
) -> Iterator[tuple[Part[Ops], Op, Span, Span]]:
    """Every operation and the part it belongs to, when it ran, and when its collective did.

    Raises:
        UserError: there are more or fewer operations than were measured.
    """
    ops = [(part, op) for part in parts for op in part.content]
    if len(ops) != len(step.ends) - 1:
        raise UserError(
            f"{len(step.ends) - 1} operations were measured and the forward has {len(ops)}: "
            "another version measured them"
        )
    link = iter(step.link)
    for (part, op), ran in zip(ops, pairwise(step.ends), strict=True):
        yield part, op, ran, next(link) if isinstance(op, Begin | Collective) else (0.0, 0.0)


def validate(forward: Forward, measured: MeasuredSteps, comparison: Comparison) -> list[Row]:
    """Compare each measured step with its prediction.

    Returns:
        A row a step: its strategy's name; seconds of a step in which nothing was timed in between;
        then seconds, and those that the GPU only waited, of the same step with every operation
        timed, of what the rules make of the parts that another strategy's run measured (None for
        one batch, which has other parts), and of the profile's prediction.

    Raises:
        UserError: the forward has other operations than were measured.
    """
    rows: list[Row] = []
    for step in measured.steps:
        turns = measured_turns(forward, step)
        run = next((run for run in comparison.runs if run.strategy == step.strategy), None)
        if run is None:
            raise UserError("a measured strategy is not among those compared")
        by_parts = None
        if step.strategy is not None:
            source = _another(step.strategy, measured.steps)
            by_parts = run_in_turns(measured_work(forward, source), step.strategy)
        row: Row = {"name": run.name, "step_seconds": step.step_seconds}
        kinds = {"noted": turns, "by_parts": by_parts, "predicted": run.turns}
        for kind, its in kinds.items():
            prefix = "" if kind == "noted" else f"{kind}_"
            row[f"{kind}_seconds"] = None if its is None else its.seconds
            row[f"{prefix}exposed_seconds"] = None if its is None else its.exposed
        rows.append(row)
    return rows


def _another(strategy: OverlapStrategy, steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """Another strategy's step with as many SMs; the strategy's own if there is none."""
    sms = strategy.comm_sms
    alike = [s for s in steps if s.strategy is not None and s.strategy.comm_sms == sms]
    return next((step for step in alike if step.strategy != strategy), alike[0])
