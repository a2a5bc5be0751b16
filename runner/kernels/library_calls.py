"""Worker processes that call an installed library with every M of many GEMMs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from itertools import count
from pathlib import Path

from runner.errors import UserError, WorkFailedError
from runner.kernels.installed import Library
from runner.kernels.table import Demand

_FIRST_CALLS = 200
"""Cost of a GEMM's buffers and first compiles, counted in calls."""


EntryRuns = list[tuple[int, int, list[str]]]
"""What a library ran for one GEMM: (first M, last M, names of the cache entries) for each run."""


def call_library(
    library: Library,
    demands: Sequence[Demand],
    environment: Mapping[str, str],
    *,
    jobs: int,
    progress: Callable[[int, int], None],
) -> list[tuple[Demand, EntryRuns]]:
    """Call the library with every M of the demands, in up to ``jobs`` processes at a time.

    Args:
        environment: the processes' environment, which sets their GPU, cache and compiler.
        progress: called with (GEMMs done, total).

    Returns:
        Each demand with what it ran, in any order; on a real GPU the runs are empty.

    Raises:
        UserError: the library cannot be imported here, or refuses a GEMM.
        WorkFailedError: the library crashed.
    """
    done = count(1)

    def call_share(share: Sequence[Demand]) -> list[tuple[Demand, EntryRuns]]:
        worker = _run_worker(library, share, environment, lambda: progress(next(done), total))
        return list(zip(share, worker, strict=True))

    total = len(demands)
    progress(0, total)
    shares = _split_evenly(demands, jobs)
    with ThreadPoolExecutor(len(shares)) as pool:
        return [result for results in pool.map(call_share, shares) for result in results]


def _split_evenly(demands: Sequence[Demand], jobs: int) -> list[list[Demand]]:
    """Split demands into shares with about the same number of calls."""
    shares: list[list[Demand]] = [[] for _ in range(max(1, min(jobs, len(demands))))]
    loads = [0] * len(shares)
    for demand in sorted(demands, key=lambda demand: -len(demand.ms)):
        least = loads.index(min(loads))
        shares[least].append(demand)
        loads[least] += len(demand.ms) + _FIRST_CALLS
    return shares


def _run_worker(
    library: Library,
    demands: Sequence[Demand],
    environment: Mapping[str, str],
    report_done: Callable[[], None],
) -> list[EntryRuns]:
    request = {
        "library": str(library.root),
        "demands": [(astuple(each.shape), each.shape.m_step, list(each.ms)) for each in demands],
    }
    path = environment.get("PYTHONPATH")
    lines = []
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as here:
        # The library's Python may be another one: it gets this package, and nothing beside it.
        Path(here, "runner").symlink_to(Path(__file__).parents[1])
        worker = subprocess.Popen(
            [library.python, "-m", "runner.deep_gemm_wrapper.walk_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment, "PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here},
        )
        assert worker.stdin is not None and worker.stdout is not None
        with worker, suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(request).encode())
            worker.stdin.close()
            for line in worker.stdout:
                lines.append(line)
                report_done()
        errors.seek(0)
        printed = errors.read().decode(errors="replace").strip().splitlines()
    code, failed = worker.returncode, f"{library.title} could not be called"
    if code == 1 and printed:  # The library refused, and the worker's last line says why.
        raise UserError(f"{failed}: {printed[-1]}")
    if code or len(lines) != len(demands):
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        last = f": {printed[-1]}" if printed else ""
        raise WorkFailedError(f"{failed}: its process died with {how}{last}")
    return [_entry_runs(**json.loads(line)) for line in lines]


def _entry_runs(runs: list[tuple[int, int, list[int]]], kernels: list[str]) -> EntryRuns:
    """A worker's answer, with the names of cache entries in place of kernel numbers."""
    entries = [Path(path).parent.name for path in kernels]
    return [(first, last, [entries[number] for number in numbers]) for first, last, numbers in runs]
