"""Measured steps beside predicted ones, and beside what the same parts take by the rules alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from runner.backend.forward_batch import ForwardBatch
from runner.errors import UserError
from runner.report.table import make_table
from runner.scenario import Scenario
from sim.overlap.compare import Comparison
from sim.overlap.measured import MeasuredStep, MeasuredSteps, measured_turns, measured_work
from sim.overlap.turns import Turns, run_in_turns


@dataclass(frozen=True)
class Judged:
    """A forward by one strategy; seconds.

    Attributes:
        name: the strategy, or one batch.
        step: of a step, measured without anything noted in between.
        measured: the same step with every operation's end noted.
        by_parts: what the rules make of the parts that another strategy's run measured; None of
            one batch, which has other parts.
        predicted: by the profile.
    """

    name: str
    step: float
    measured: Turns
    by_parts: Turns | None
    predicted: Turns

    def to_json(self) -> dict[str, Any]:
        """Plain data, in seconds."""
        parts = self.by_parts
        return {
            "name": self.name,
            "step_seconds": self.step,
            "noted_seconds": self.measured.seconds,
            "exposed_seconds": self.measured.exposed,
            "by_parts_seconds": None if parts is None else parts.seconds,
            "by_parts_exposed_seconds": None if parts is None else parts.exposed,
            "predicted_seconds": self.predicted.seconds,
            "predicted_exposed_seconds": self.predicted.exposed,
        }


def judge(
    scenario: Scenario,
    rank: int,
    batch: ForwardBatch,
    measured: MeasuredSteps,
    comparison: Comparison,
) -> list[Judged]:
    """Hold each measured step against its prediction.

    Raises:
        UserError: other operations than these were measured.
    """
    in_turns = [step for step in measured.steps if step.strategy is not None]
    rows = []
    for step in measured.steps:
        turns = measured_turns(scenario, rank, batch, step)
        run = next((run for run in comparison.runs if run.strategy == step.strategy), None)
        if run is None:
            raise UserError("a measured strategy is not among those compared")
        parts = _parts(scenario, rank, batch, step, in_turns)
        rows.append(Judged(run.name, step.step_seconds, turns, parts, run.turns))
    return rows


def _parts(
    scenario: Scenario,
    rank: int,
    batch: ForwardBatch,
    step: MeasuredStep,
    others: Sequence[MeasuredStep],
) -> Turns | None:
    """The step as it would be with the parts of another run that had as many SMs."""
    if step.strategy is None:
        return None
    sms = step.strategy.comm_sms
    alike = [one for one in others if one.strategy is not None and one.strategy.comm_sms == sms]
    other = next((one for one in alike if one is not step), step)
    return run_in_turns(measured_work(scenario, rank, batch, other), step.strategy)


def judged_table(rows: Sequence[Judged], machine: dict[str, object]) -> Table:
    """Tabulate milliseconds."""
    headers = ["step", "noted", "exposed", "by parts", "exposed", "predicted", "exposed"]
    title = f"Measured on {machine['gpu'] or 'CPU'}, {machine['date']}: ms"
    table = make_table(title, ["strategy"], headers)
    for row in rows:
        parts = row.by_parts
        cells = [
            row.step,
            row.measured.seconds,
            row.measured.exposed,
            None if parts is None else parts.seconds,
            None if parts is None else parts.exposed,
            row.predicted.seconds,
            row.predicted.exposed,
        ]
        shown = ["-" if seconds is None else f"{1e3 * seconds:.2f}" for seconds in cells]
        table.add_row(Text(row.name), *shown)
    return table
