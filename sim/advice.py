"""Predictions of several policies side by side, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.report.console import make_console
from runner.report.outputs import print_bars
from runner.report.table import make_table, phase_summary
from runner.warmup import WarmupPolicy
from sim.simulate import Machine, Prediction


@dataclass(frozen=True)
class Advice:
    """The policy to take.

    Attributes:
        prediction: the policy's.
        reason: why, in a line.
    """

    prediction: Prediction
    reason: str


def advise(predictions: Sequence[Prediction]) -> Advice:
    """Of the policies that survive, those that leave the fewest stalls, and of these the fastest.

    ``prebuilt`` wants a step before the deployment, so it is only taken where nothing else is at
    hand.
    """
    cold = [p for p in predictions if p.timeline.policy != WarmupPolicy.PREBUILT.value]
    candidates = [p for p in cold or predictions if p.timeout is None] or list(predictions)
    best = min(candidates, key=lambda p: (p.stalls, p.timeline.up))
    quickest = min(candidates, key=lambda p: (p.timeline.up, p.stalls))
    survives = "survives its longest wait, " if best.timeout is None else "no policy survives; "
    words = f"{survives}leaves {_stalls(best)}"
    if quickest is not best:
        words += (
            f"; {quickest.timeline.policy} is up after {quickest.timeline.up:.0f} s and leaves "
            f"{_stalls(quickest)}"
        )
    return Advice(best, words)


def _stalls(prediction: Prediction) -> str:
    if not prediction.stalls:
        return "no kernel to compile in traffic"
    return f"{prediction.stalls} kernels ({prediction.stall_seconds:.0f} s) to compile in traffic"


def print_predictions(predictions: Sequence[Prediction], machine: Machine, *, bars: bool) -> None:
    """Print what was simulated, the policies in one table, what dies, and the advice.

    ``bars`` draws every rank and says where the time of the last one goes.
    """
    _print_title(predictions[0], machine)
    console = make_console()
    if bars:
        print_bars([prediction.timeline for prediction in predictions], console)
        for prediction in predictions:
            console.print(phase_summary(prediction.timeline))
    console.print(advice_table(predictions))
    for prediction in predictions:
        _print_death(prediction, console)
    if len(predictions) > 1:
        advice = advise(predictions)
        console.print(f"take {advice.prediction.timeline.policy}: it {advice.reason}")


def _print_title(prediction: Prediction, machine: Machine) -> None:
    meta = prediction.timeline.meta
    sizes = meta["batch_sizes"][:1] + meta["stream"] if meta["stream"] else meta["batch_sizes"]
    replicas = f"{meta['replicas']} x " if meta["replicas"] > 1 else ""
    estimate = " (an estimate from public figures)" if machine.profile.estimate else ""
    phases = ", ".join(machine.start.included) or "none"
    print(
        f"{meta['model']}, {meta['layers']} layers: {replicas}pp {meta['pp']} x tp {meta['tp']} on "
        f"{meta['nodes']} node(s), {machine.profile.name}{estimate}, "
        f"{meta['cores_per_node']} cores a node\n"
        f"cold caches; first request {sizes[0]}, then {','.join(map(str, sizes[1:])) or 'none'}\n"
        f"before the warm-up: {phases}\n"
    )


def advice_table(predictions: Sequence[Prediction]) -> Table:
    """One policy a row.

    ``up`` is the time until the first request is answered, ``served`` until all are; stalls are
    kernels that traffic can still need once the server is up.
    """
    headers = ["up s", "served\ns", "com-\npiles", "dupli-\ncates", "CPU s", "covered", "stalls",
               "stall\ns", "longest\nwait s", "dies\nat s"]  # fmt: skip
    table = make_table("Policies", ["policy"], headers)
    for prediction in predictions:
        timeline, lost = prediction.timeline, prediction.timeout
        table.add_row(
            Text(timeline.policy),
            f"{timeline.up:.1f}",
            f"{timeline.wall:.1f}",
            str(timeline.kernels_compiled),
            str(timeline.duplicates),
            f"{timeline.compile_seconds:.0f}",
            f"{_covered(prediction):.0%}",
            str(prediction.stalls),
            f"{prediction.stall_seconds:.0f}",
            f"{prediction.longest_wait:.1f}",
            "-" if lost is None else f"{lost.time:.0f}",
        )
    return table


def _covered(prediction: Prediction) -> float:
    """Share of the kernels that the worst node holds of those it can need, once up."""
    nodes = prediction.timeline.meta["coverage_up"]
    return float(min(node["present"] / node["planned"] for node in nodes))


def _print_death(prediction: Prediction, console: Console) -> None:
    lost = prediction.timeout
    if lost is not None:
        words = (
            f"{prediction.timeline.policy}: the watchdog ends this run at {lost.time:.0f} s: "
            f"rank {lost.rank} waits for rank {lost.waiting_for} in {lost.operation} while "
            f"that does {lost.busy_with}; --nccl-timeout {ceil(lost.needed)} would survive"
        )
        console.print(Text(words))
