"""A forward as one batch, by each strategy, and by the best placement that there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.backend.forward_batch import ForwardBatch
from runner.model.strategy import OverlapStrategy
from runner.scenario import Scenario
from sim.costs.profile_costs import ProfileCosts
from sim.overlap.turns import Turns, run_in_turns, run_whole
from sim.overlap.work import Work, record_plain, record_work

if TYPE_CHECKING:
    from sim.overlap.search import Found, Progress


@dataclass(frozen=True)
class Run:
    """A forward by a strategy; None is the whole batch as one."""

    strategy: OverlapStrategy | None
    turns: Turns

    @property
    def name(self) -> str:
        """For reports."""
        return "one batch" if self.strategy is None else self.strategy.name

    def to_json(self) -> dict[str, Any]:
        """Plain data, in seconds."""
        turns = self.turns
        return {
            "name": self.name,
            "strategy": None if self.strategy is None else self.strategy.to_json(),
            "step_seconds": turns.seconds,
            "compute_seconds": turns.compute,
            "communication_seconds": turns.communication,
            "exposed_seconds": turns.exposed,
            "idle_share": turns.exposed / turns.seconds,
            "layers": [vars(part) for part in turns.by_layer()],
        }


@dataclass(frozen=True)
class Comparison:
    """Forwards side by side.

    Attributes:
        layers: numbers of the layers that overlap.
        runs: the whole batch, then the strategies in the order asked for, then the best found.
        found: result of the search; None where none was asked for.
        reference: the strategy that the search has to beat: the fastest of those asked for.
    """

    layers: range
    runs: tuple[Run, ...]
    found: Found | None
    reference: Run

    @property
    def best(self) -> Run:
        """The last run: what the search found, or the last strategy."""
        return self.runs[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "first_layer": self.layers[0],
            "overlapped_layers": len(self.layers),
            "runs": [run.to_json() for run in self.runs],
            "reference": self.reference.name,
            "placements_searched": None if self.found is None else self.found.placements,
        }


def compare(
    scenario: Scenario,
    rank: int,
    batch: ForwardBatch,
    costs: ProfileCosts,
    strategies: Sequence[OverlapStrategy],
    progress: Progress | None,
) -> Comparison:
    """Run a forward by each strategy, and search for the best placement.

    The search keeps the SMs of the fastest of the strategies.

    Args:
        scenario: model and layout.
        rank: whose stage.
        batch: what is run.
        costs: how long it takes.
        strategies: at least one, all of the batch's mode.
        progress: see :func:`sim.overlap.search.search`; None is no search.

    Raises:
        UserError: there is nothing to overlap.
    """
    work = {
        sms: record_work(scenario, rank, batch, costs, sms)
        for sms in {strategy.comm_sms for strategy in strategies}
    }
    runs = [_run(work, strategy) for strategy in strategies]
    reference = min(runs, key=lambda run: run.turns.seconds)
    assert reference.strategy is not None
    its = work[reference.strategy.comm_sms]
    found = None
    if progress is not None:
        # It needs numpy, and comparing does not.
        from sim.overlap.search import search

        found = search(its, reference.strategy, progress)
        runs.append(_run(work, found.best))
    whole = Run(None, run_whole(*record_plain(scenario, rank, batch, costs, its.layers)))
    return Comparison(its.layers, (whole, *runs), found, reference)


def _run(work: dict[int, Work], strategy: OverlapStrategy) -> Run:
    return Run(strategy, run_in_turns(work[strategy.comm_sms], strategy))
