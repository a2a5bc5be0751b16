"""Read steps that ``launch.steps`` measured, and validate predictions against them.

A measured step gives the time at which each operation of a forward ended. Recording the forward
again tells which operation that was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from runner.backend.forward_batch import ForwardMode
from runner.config.fields import field_types, read_plain
from runner.errors import UserError
from runner.files import parse_json
from runner.model.strategy import OverlapStrategy
from runner.schedule import Await, Begin, Collective
from sim.overlap.compare import Comparison
from sim.overlap.forward import Forward, Ops, Part
from sim.overlap.turns import Piece, Turns, without_half

Span = tuple[float, float]
"""Start and end in seconds."""

Row = dict[str, str | float]
"""A table row as plain data."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of the measurement, by option name."""

    model: str
    layers: int | None
    pp: int
    tp: int
    ep: bool
    mode: ForwardMode
    batch: int
    prompt_len: int


@dataclass(frozen=True)
class MeasuredStep:
    """A measured forward.

    Attributes:
        strategy: the overlap strategy; None is one batch.
        step_seconds: duration of a step without timing of single operations.
        ends: seconds at which each operation ended; the first value is the start, 0.
        link: start and end of every collective, ordered by start.
    """

    strategy: OverlapStrategy | None
    step_seconds: float
    ends: Sequence[float]
    link: Sequence[Span]


@dataclass(frozen=True)
class MeasuredSteps:
    """What one run of ``launch.steps`` wrote; the first step is the one without a strategy."""

    settings: StepSettings
    machine: dict[str, object]
    steps: Sequence[MeasuredStep]

    @property
    def strategies(self) -> list[OverlapStrategy]:
        return [step.strategy for step in self.steps if step.strategy is not None]


def read_steps(path: Path) -> MeasuredSteps:
    """Read a file that ``launch.steps`` wrote.

    Raises:
        UserError: the file cannot be read, or ``launch.steps`` did not write it.
    """
    try:
        data = parse_json(path.read_text())
        steps = [
            MeasuredStep(
                None if run["strategy"] is None else OverlapStrategy.from_json(run["strategy"]),
                float(run["step_seconds"]),
                [float(end) for end in run["ends"]],
                [(float(start), float(end)) for start, end in run["link"]],
            )
            for run in data["runs"]
        ]
        kinds = field_types(StepSettings)
        settings: Callable[..., StepSettings] = StepSettings
        its = {name: read_plain(kind, name, data["settings"]) for name, kind in kinds.items()}
        return MeasuredSteps(settings(**its), dict(data["machine"]), steps)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a file from launch.steps: {error!r}") from None


def measured_turns(forward: Forward, step: MeasuredStep) -> Turns:
    """Turn a measured step into what the GPU and its link did.

    Raises:
        UserError: the forward's operations are not those measured.
    """
    halves = forward.in_halves(0 if step.strategy is None else step.strategy.comm_sms, tuple)
    parts: Iterable[Part[Ops]] = (
        forward.whole(halves.layers, tuple)
        if step.strategy is None
        else halves.in_turns(step.strategy)
    )
    ops = [(part, op) for part in parts for op in part.content]
    if len(ops) != len(step.ends) - 1:
        raise UserError(
            f"{len(step.ends) - 1} operations were measured, but the forward has {len(ops)}: "
            "measure again with this version"
        )
    turns, link = Turns(seconds=step.ends[-1]), iter(step.link)
    for (part, op), ran in zip(ops, pairwise(step.ends), strict=True):
        waits = isinstance(op, Collective | Await)
        name = without_half(op.name) if isinstance(op, Begin | Collective | Await) else part.name
        lane, of = ("wait", name) if waits else ("compute", part.name)
        turns.pieces.append(Piece(*ran, lane, part.half, part.layer, of))
        if isinstance(op, Begin | Collective):
            turns.pieces.append(Piece(*next(link), "link", part.half, part.layer, name))
    return turns


def validate(forward: Forward, measured: MeasuredSteps, comparison: Comparison) -> list[Row]:
    """Compare each measured step with its prediction.

    Returns:
        One row per step: its strategy's name; the seconds of a step without timing of single
        operations; then total seconds and seconds waited, for the same step with every operation
        timed and for the profile's prediction.

    Raises:
        UserError: the forward's operations are not those measured.
    """
    rows: list[Row] = []
    runs = {run.strategy: run for run in comparison.runs}
    for step in measured.steps:
        turns = measured_turns(forward, step)
        run = runs[step.strategy]
        rows.append(
            {
                "name": run.name,
                "step_seconds": step.step_seconds,
                "noted_seconds": turns.seconds,
                "exposed_seconds": turns.exposed,
                "predicted_seconds": run.turns.seconds,
                "predicted_exposed_seconds": run.turns.exposed,
            }
        )
    return rows
