"""Compare measured runs with the simulator's predictions of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from runner.errors import UserError
from runner.timeline import Timeline, read_timelines
from sim.calibration.run_metadata import read_metadata
from sim.costs.profile import Profile
from sim.simulate import Prediction, simulate


@dataclass(frozen=True)
class ValidatedRun:
    """A measured run and its prediction."""

    measured: Timeline
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative error of the predicted wall time, from process start to the last answer."""
        return self.predicted.timeline.wall / self.measured.wall - 1

    @property
    def counts_agree(self) -> bool:
        """Whether the predicted numbers of compiles and duplicates are exact."""
        measured, predicted = self.measured, self.predicted.timeline
        return (measured.kernels_compiled, measured.duplicates) == (
            predicted.kernels_compiled,
            predicted.duplicates,
        )

    @property
    def name(self) -> str:
        """Model, layout and policy."""
        meta = self.measured.meta
        nodes = f", {meta['nodes']} nodes" if meta["nodes"] > 1 else ""
        lock = ", locked" if meta["compile_lock"] else ""
        return (
            f"{meta['model']} {meta['layers']} layers, pp {meta['pp']} tp {meta['tp']}{nodes}"
            f"{lock}, {self.measured.policy}"
        )


def validate(measured: Sequence[Timeline], profile: Profile) -> list[ValidatedRun]:
    """Predict every measured run on its own machine, with its cores, link and probe.

    Raises:
        UserError: a Timeline's metadata cannot be read.
    """
    validated = []
    for timeline in measured:
        run = read_metadata(timeline)
        validated.append(ValidatedRun(timeline, simulate(run.scenario, run.machine(profile))))
    return validated


def error_summary(runs: Sequence[ValidatedRun]) -> str:
    """Median and worst error, and how many counts are exact, as one line."""
    errors = [abs(run.error) for run in runs]
    exact = sum(run.counts_agree for run in runs)
    return (
        f"{len(runs)} runs: median absolute error {median(errors):.1%}, worst {max(errors):.1%}; "
        f"compiles and duplicates exact in {exact}"
    )


def read_measured(paths: Sequence[Path]) -> list[Timeline]:
    """Read the measured Timelines in several files, in order.

    Raises:
        UserError: an unreadable file, a predicted Timeline, or no Timeline at all.
    """
    found = [timeline for path in paths for timeline in read_timelines(path)]
    for timeline in found:
        if timeline.source != "measured":
            raise UserError(
                f"{timeline.policy} is a {timeline.source} Timeline, not a measured one"
            )
    if not found:
        raise UserError("the files hold no Timeline")
    return found
