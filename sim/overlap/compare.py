"""Run a forward as one batch, with each strategy, and with the best placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.model.strategy import OverlapStrategy
from sim.costs.profile_costs import ProfileCosts
from sim.overlap.forward import Forward, Ops, Steps, to_steps
from sim.overlap.turns import Turns, run

if TYPE_CHECKING:
    from sim.overlap.search import Found, Progress


@dataclass(frozen=True)
class Run:
    """A forward run with a strategy; None runs the whole batch as one."""

    strategy: OverlapStrategy | None
    turns: Turns

    @property
    def name(self) -> str:
        return "one batch" if self.strategy is None else self.strategy.name


@dataclass(frozen=True)
class Comparison:
    """Runs of one forward.

    Attributes:
        layers: the model's layers that overlap.
        runs: the whole batch, then the strategies in the order asked for, then the best found.
        found: the search's result; None without a search.
        reference: the fastest of the strategies asked for, which the search has to beat.
    """

    layers: range
    runs: tuple[Run, ...]
    found: Found | None
    reference: Run

    @property
    def best(self) -> Run:
        """The last run: what the search found, or the last strategy."""
        return self.runs[-1]


def compare(
    forward: Forward,
    costs: ProfileCosts,
    strategies: Sequence[OverlapStrategy],
    progress: Progress | None,
) -> Comparison:
    """Run a forward with each strategy (at least one), and search for the best placement.

    The search uses the SMs of the fastest strategy; without ``progress`` there is no search.

    Raises:
        UserError: there is nothing to overlap.
    """

    def timed(ops: Ops) -> Steps:
        return to_steps(ops, costs)

    work = {sms: forward.in_halves(sms, timed) for sms in {its.comm_sms for its in strategies}}
    runs = [Run(its, run(work[its.comm_sms].in_turns(its))) for its in strategies]
    reference = min(runs, key=lambda run: run.turns.seconds)
    assert reference.strategy is not None
    its_work = work[reference.strategy.comm_sms]
    found = None
    if progress is not None:
        # Only the search needs numpy.
        from sim.overlap.search import search

        found = search(its_work, reference.strategy, progress)
        runs.append(Run(found.best, run(its_work.in_turns(found.best))))
    whole = Run(None, run(forward.whole(its_work.layers, timed)))
    return Comparison(its_work.layers, (whole, *runs), found, reference)
