"""Simulate many scenarios in several processes, and reduce each to a few figures."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from multiprocessing import active_children, get_context, parent_process

from runner.errors import UserError, WorkFailedError
from runner.scenario import Scenario
from runner.timeline import Timeline
from sim.machine import Machine
from sim.simulate import simulate
from sim.sweep.points import Point, Result, Skipped

Ended = Result | Skipped


@dataclass(frozen=True)
class Case:
    """A point with the scenario and machine to simulate."""

    point: Point
    scenario: Scenario
    machine: Machine


def simulate_case(case: Case) -> Ended:
    """Simulate one point; skip it if its options do not fit the model or machine."""
    try:
        prediction = simulate(case.scenario, case.machine)
    except UserError as error:
        return Skipped(case.point, str(error))
    timeline, timeout = prediction.timeline, prediction.timeout
    nodes = timeline.meta["coverage_up"]
    worst = min(nodes, key=lambda node: Fraction(node["present"], node["planned"]))
    return Result(
        point=case.point,
        up_seconds=round(timeline.up, 6),
        kernels_compiled=timeline.kernels_compiled,
        duplicates=timeline.duplicates,
        cpu_seconds=round(cpu_seconds(timeline, case.point.cores), 6),
        present=worst["present"],
        planned=worst["planned"],
        timeout_seconds=None if timeout is None else round(timeout.time, 6),
    )


def cpu_seconds(timeline: Timeline, cores: int) -> float:
    """Core-seconds that compiles used: at each time one core per compile, or all of a machine's.

    Nodes that share a machine share its cores. The result is less than the sum of the compiles'
    spans if more of them run at a time than there are cores.
    """
    edges: dict[int, list[tuple[float, int]]] = defaultdict(list)
    meta = timeline.meta
    nodes_per_host = meta["nodes"] // meta["hosts"]
    for span in timeline.compiles:
        host = meta["ranks"][span.rank]["node"] // nodes_per_host
        edges[host] += [(span.start, 1), (span.end, -1)]
    total = 0.0
    for of_host in edges.values():
        running = 0
        for (time, step), (until, _) in pairwise(sorted(of_host)):
            running += step
            total += min(running, cores) * (until - time)
    return total


def run_cases(cases: Sequence[Case], *, jobs: int, on_end: Callable[[Ended], None]) -> None:
    """Simulate all cases in ``jobs`` processes; ``on_end`` gets each result as it comes.

    Raises:
        WorkFailedError: a process died.
        KeyboardInterrupt: Ctrl-C was pressed; the processes have been stopped.
    """
    jobs = min(jobs, len(cases))
    if jobs <= 1:
        for case in cases:
            on_end(simulate_case(case))
        return
    with _processes(jobs) as pool:
        # Ctrl-C reaches every process of a terminal, so those started here ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # One by one, so that each result is known at once. Neighbours that share a plan then
            # compute it several times, which is quicker than waiting for one process to do it.
            futures = [pool.submit(simulate_case, case) for case in cases]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            on_end(future.result())


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are stopped at once if an exception leaves the block."""
    others = set(active_children())
    # Not by fork: our thread that draws the progress could hold a lock at that moment.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BaseException as error:
        for process in set(active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise WorkFailedError(
                "a process of the sweep died, perhaps because memory ran out: try fewer --jobs"
            ) from None
        raise
    pool.shutdown()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the sweep is killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
