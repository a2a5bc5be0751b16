"""Processes that call an installed library with many M, and what they answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.recorded import step_of
from runner.kernels.table import Demand

_WORKER = "runner.deep_gemm_wrapper.walk_worker"

_FIRST_CALLS = 200
"""What a GEMM's buffers and first compiles cost, in calls."""


def shared_out(demands: Sequence[Demand], jobs: int) -> list[list[Demand]]:
    """Shares of about the same number of calls."""
    shares: list[list[Demand]] = [[] for _ in range(max(1, min(jobs, len(demands))))]
    loads = [0] * len(shares)
    for demand in sorted(demands, key=lambda demand: -len(demand.ms)):
        least = loads.index(min(loads))
        shares[least].append(demand)
        loads[least] += len(demand.ms) + _FIRST_CALLS
    return [share for share in shares if share]


def ask(
    library: Library,
    demands: Sequence[Demand],
    environment: Mapping[str, str],
    words: Path,
    note: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Call the library with every M of the demands, in a process of its own.

    Args:
        library: the library.
        demands: GEMMs with their M.
        environment: what the process runs in: its GPU, its cache, its compiler.
        words: file for what it prints.
        note: told after each GEMM.

    Returns:
        A value for each demand, as :mod:`runner.deep_gemm_wrapper.walk_worker` writes them.

    Raises:
        UserError: it failed; the message has its last words.
    """
    orders = {"library": str(library.root), "demands": [_order(demand) for demand in demands]}
    answers = []
    with words.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_finding_us(environment),
        )
        assert child.stdin is not None
        assert child.stdout is not None
        with child, suppress(BrokenPipeError):
            child.stdin.write(json.dumps(orders).encode())
            child.stdin.close()
            for line in child.stdout:
                answers.append(json.loads(line))
                note()
    if child.returncode or len(answers) != len(demands):
        said = words.read_bytes().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else f"exit {child.returncode}"
        raise UserError(f"{library.title} could not be called: {last}")
    return answers


def _finding_us(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a child finds this package, wherever it was started."""
    ours = str(Path(__file__).resolve().parents[2])
    given = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": f"{ours}{os.pathsep}{given}" if given else ours}


def _order(demand: Demand) -> list[Any]:
    shape = demand.shape
    ranges = list(_ranges(demand.ms, step_of(shape.type)))
    return [shape.type.name, shape.n, shape.k, shape.num_groups, shape.num_sms, ranges]


def _ranges(ms: Sequence[int], step: int) -> Iterator[tuple[int, int, int]]:
    """Ascending M as (first, last, step)."""
    first = last = ms[0]
    for m in ms[1:]:
        if m != last + step:
            yield first, last, step
            first = m
        last = m
    yield first, last, step
