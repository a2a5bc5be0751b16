"""Predictions of several policies side by side, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.driver.warmup import WarmupPolicy
from runner.report.console import make_console
from runner.report.outputs import print_bars
from runner.report.table import make_table, phase_summary
from sim.engine.timeout_diagnosis import CollectiveTimeout
from sim.simulate import Machine, Prediction
from sim.sweep.run import cpu_seconds


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
    """Which policy to take.

    Of those that survive, the one whose start-up and stalls together take the least time, a stall
    being a compile that traffic waits for. ``prebuilt`` wants a step before the deployment, so that
    the best of the others is named as well.
    """
    alive = [p for p in predictions if p.timeout is None]
    best = min(alive or predictions, key=_cost)
    words = [f"up after {best.timeline.up:.0f} s", f"leaves {_stalls(best)}"]
    if not alive:
        words.insert(0, f"no policy survives its longest wait{_remedy(best)}")
    others = [p for p in alive if not _is_prebuilt(p)]
    named = [best]
    if _is_prebuilt(best) and others:
        second = min(others, key=_cost)
        named.append(second)
        words.append(
            f"wants a cache that was built beforehand; without one take {second.timeline.policy}: "
            f"up after {second.timeline.up:.0f} s, leaves {_stalls(second)}"
        )
    quickest = min(alive or predictions, key=lambda p: (p.timeline.up, p.stalls))
    if quickest not in named and quickest.timeline.up < best.timeline.up:
        words.append(
            f"{quickest.timeline.policy} is up sooner, after {quickest.timeline.up:.0f} s, but "
            f"leaves {_stalls(quickest)}"
        )
    return Advice(best, "; ".join(words))


def _remedy(prediction: Prediction) -> str:
    lost = prediction.timeout
    return "" if lost is None or lost.of_hosts else ": raise --nccl-timeout"


def _cost(prediction: Prediction) -> tuple[float, float]:
    return prediction.timeline.up + prediction.stall_seconds, prediction.timeline.up


def _is_prebuilt(prediction: Prediction) -> bool:
    return prediction.timeline.policy == WarmupPolicy.PREBUILT.value


def _stalls(prediction: Prediction) -> str:
    if not prediction.stalls:
        return "no kernel to compile in traffic"
    return f"{prediction.stalls} kernels ({prediction.stall_seconds:.0f} s) to compile in traffic"


def print_predictions(
    predictions: Sequence[Prediction], machine: Machine, kernels: str, *, bars: bool
) -> None:
    """Print what was simulated, the policies in one table, what dies, and the advice.

    ``kernels`` says whose kernels they are; ``bars`` draws every rank and says where the time of
    the last one goes.
    """
    _print_title(predictions[0], machine)
    print(f"kernels: {kernels}")
    validation = machine.profile.validation
    if validation is not None:
        print(
            f"predictions of {machine.profile.name} were within {validation.median_error:.0%} "
            f"(median), {validation.worst_error:.0%} (worst) of {validation.runs} measured runs"
        )
    print()
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
        console.print(f"take {advice.prediction.timeline.policy}: {advice.reason}")


def _print_title(prediction: Prediction, machine: Machine) -> None:
    meta = prediction.timeline.meta
    sizes = meta["batch_sizes"][:1] + meta["stream"] if meta["stream"] else meta["batch_sizes"]
    replicas = f"{meta['replicas']} x " if meta["replicas"] > 1 else ""
    estimate = " (an estimate from public figures)" if machine.profile.estimate else ""
    phases = ", ".join(machine.start.included) or "none"
    print(
        f"{meta['model']}, {meta['layers']} layers: {replicas}pp {meta['pp']} x tp {meta['tp']} on "
        f"{meta['nodes']} node(s), {machine.profile.name}{estimate}, "
        f"{meta['cores_per_node']} cores {_cores_of(meta)}\n"
        f"cold caches; first request {sizes[0]}, then {','.join(map(str, sizes[1:])) or 'none'}\n"
        f"before the warm-up: {phases}"
    )


def _cores_of(meta: dict[str, Any]) -> str:
    shared = meta["nodes"] // meta["hosts"]
    return "a node" if shared == 1 else f"for each {shared} nodes"


def advice_table(predictions: Sequence[Prediction]) -> Table:
    """One policy a row.

    ``up`` is the time until the first request is answered, ``served`` until all are; stalls are
    kernels that traffic can still need once the server is up.
    """
    headers = [
        "up s",
        "served\ns",
        "com-\npiles",
        "dupli-\ncates",
        "CPU s",
        "covered",
        "stalls",
        "stall\ns",
        "longest\nwait s",
        "dies\nat s",
    ]
    table = make_table("Policies", ["policy"], headers)
    for prediction in predictions:
        timeline, lost = prediction.timeline, prediction.timeout
        table.add_row(
            Text(timeline.policy),
            _reached(timeline.up, lost),
            _reached(timeline.wall, lost),
            str(timeline.kernels_compiled),
            str(timeline.duplicates),
            f"{cpu_seconds(timeline, timeline.meta['cores_per_node']):.0f}",
            f"{_covered(prediction):.0%}",
            str(prediction.stalls),
            f"{prediction.stall_seconds:.0f}",
            f"{prediction.longest_wait:.1f}",
            "-" if lost is None else f"{lost.time:.0f}",
        )
    return table


def _reached(seconds: float, lost: CollectiveTimeout | None) -> str:
    """A time, in brackets where the run dies before."""
    return f"({seconds:.1f})" if lost is not None and lost.time < seconds else f"{seconds:.1f}"


def _covered(prediction: Prediction) -> float:
    """Share of the kernels that the worst node holds of those it can need, once up."""
    nodes = prediction.timeline.meta["coverage_up"]
    return float(min(node["present"] / node["planned"] for node in nodes))


def _print_death(prediction: Prediction, console: Console) -> None:
    lost = prediction.timeout
    if lost is None:
        return
    # Hosts that talk to each other have a limit that no option sets.
    who, remedy = (
        ("its hosts' limit ends", f"its hosts would have to wait {ceil(lost.needed)} s")
        if lost.of_hosts
        else ("the watchdog ends", f"--nccl-timeout {ceil(lost.needed)} would survive")
    )
    words = (
        f"{prediction.timeline.policy}: {who} this run at {lost.time:.0f} s: rank {lost.rank} "
        f"waits for rank {lost.waiting_for} in {lost.operation} while that does "
        f"{lost.busy_with}; {remedy}"
    )
    console.print(Text(words))
