"""Several policies' predictions in one table, and advice on which policy to take."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.config.warmup import WarmupPolicy
from runner.report.console import counted, make_console, make_table
from runner.report.outputs import print_ranks
from runner.report.timelines import phase_summary
from sim.engine.timeout_diagnosis import CollectiveTimeout
from sim.machine import Machine
from sim.simulate import Prediction
from sim.sweep.run import cpu_seconds


def advise(predictions: Sequence[Prediction]) -> tuple[Prediction, str]:
    """The policy to take, and why, on one line.

    Among the runs that survive, it is the one with the least total of start-up and stalls; a stall
    is a compile that requests wait for. Since ``prebuilt`` needs a step before the deployment, the
    reason then also names the best other policy.
    """
    alive = [p for p in predictions if p.timeout is None]
    best = min(alive or predictions, key=_cost)
    words = [f"up after {best.timeline.up:.0f} s", f"leaves {_stalls(best)}"]
    if not alive:
        by_option = best.timeout is not None and not best.timeout.of_hosts
        remedy = ": raise --nccl-timeout" if by_option else ""
        words.insert(0, f"no policy survives its longest wait{remedy}")
    prebuilt = WarmupPolicy.PREBUILT.value
    others = [p for p in alive if p.timeline.policy != prebuilt]
    named = [best]
    if best.timeline.policy == prebuilt and others:
        second = min(others, key=_cost)
        named.append(second)
        words.append(
            f"needs a prebuilt cache; without one use {second.timeline.policy}: "
            f"up after {second.timeline.up:.0f} s, leaves {_stalls(second)}"
        )
    quickest = min(alive or predictions, key=lambda p: (p.timeline.up, p.stalls))
    if quickest not in named and quickest.timeline.up < best.timeline.up:
        words.append(
            f"{quickest.timeline.policy} is up sooner, after {quickest.timeline.up:.0f} s, but "
            f"leaves {_stalls(quickest)}"
        )
    return best, "; ".join(words)


def _cost(prediction: Prediction) -> tuple[float, float]:
    return prediction.timeline.up + prediction.stall_seconds, prediction.timeline.up


def _stalls(prediction: Prediction) -> str:
    if not prediction.stalls:
        return "no kernel to compile in traffic"
    return f"{prediction.stalls} kernels ({prediction.stall_seconds:.0f} s) to compile in traffic"


def print_predictions(
    predictions: Sequence[Prediction], machine: Machine, kernels: str, *, bars: bool
) -> None:
    """Print what was simulated, the policies in one table, which runs die, and the advice.

    With ``bars``, also draw every rank, and break down the time of the rank that ends last.
    """
    print(_title(predictions[0], machine))
    print(f"kernels: {kernels}")
    validation = machine.profile.validation
    if validation is not None:
        print(
            f"errors of profile {machine.profile.name} on {validation.runs} measured runs: "
            f"{validation.median_error:.0%} (median), {validation.worst_error:.0%} (worst)"
        )
    print()
    console = make_console()
    if bars:
        print_ranks([its.timeline for its in predictions], console, tables=False)
        for prediction in predictions:
            console.print(phase_summary(prediction.timeline))
    console.print(advice_table(predictions))
    for prediction in predictions:
        if prediction.timeout is not None:
            _print_death(prediction.timeline.policy, prediction.timeout, console)
    if len(predictions) > 1:
        best, reason = advise(predictions)
        console.print(f"use {best.timeline.policy}: {reason}")


def _title(prediction: Prediction, machine: Machine) -> str:
    meta = prediction.timeline.meta
    sizes = meta["batch_sizes"][:1] + meta["stream"] if meta["stream"] else meta["batch_sizes"]
    replicas = f"{meta['replicas']} x " if meta["replicas"] > 1 else ""
    estimate = " (an estimate from public figures)" if machine.profile.estimate else ""
    nodes_per_host = meta["nodes"] // meta["hosts"]
    whose = "a node" if nodes_per_host == 1 else f"for each {nodes_per_host} nodes"
    return (
        f"{meta['model']}, {counted(meta['layers'], 'layer')}: "
        f"{replicas}pp {meta['pp']} x tp {meta['tp']} on "
        f"{counted(meta['nodes'], 'node')}, {machine.profile.name}{estimate}, "
        f"{meta['cores_per_node']} cores {whose}\n"
        f"cold caches; first request {sizes[0]}, then {','.join(map(str, sizes[1:])) or 'none'}\n"
        f"before the warm-up: {', '.join(machine.start.included) or 'none'}"
    )


def advice_table(predictions: Sequence[Prediction]) -> Table:
    """A table with one policy per row.

    ``up`` is the time until the first request is answered, ``served`` until all are; stalls are
    kernels that requests can still need once the server is up.
    """
    headers = ["up s", "served\ns", "com-\npiles", "dupli-\ncates", "CPU s", "covered"]
    headers += ["stalls", "stall\ns", "longest\nwait s", "dies\nat s"]
    table = make_table("Policies", ["policy"], headers)
    for prediction in predictions:
        timeline, lost = prediction.timeline, prediction.timeout
        nodes = timeline.meta["coverage_up"]
        covered = min(node["present"] / node["planned"] for node in nodes)
        table.add_row(
            Text(timeline.policy),
            _reached(timeline.up, lost),
            _reached(timeline.wall, lost),
            str(timeline.kernels_compiled),
            str(timeline.duplicates),
            f"{cpu_seconds(timeline, timeline.meta['cores_per_node']):.0f}",
            f"{covered:.0%}",
            str(prediction.stalls),
            f"{prediction.stall_seconds:.0f}",
            f"{prediction.longest_wait:.1f}",
            "-" if lost is None else f"{lost.time:.0f}",
        )
    return table


def _reached(seconds: float, lost: CollectiveTimeout | None) -> str:
    """A time, in brackets if the run dies before it."""
    return f"({seconds:.1f})" if lost is not None and lost.time < seconds else f"{seconds:.1f}"


def _print_death(policy: str, lost: CollectiveTimeout, console: Console) -> None:
    if lost.of_hosts:  # No option sets the limit of hosts that wait for each other.
        who, remedy = "its hosts' limit", f"its hosts would have to wait {ceil(lost.needed)} s"
    else:
        who, remedy = "the watchdog", f"--nccl-timeout {ceil(lost.needed)} would survive"
    words = (
        f"{policy}: {who} ends this run at {lost.time:.0f} s: rank {lost.rank} waits for rank "
        f"{lost.waiting_for} in {lost.operation} while that does {lost.busy_with}; {remedy}"
    )
    console.print(Text(words))
