"""From every rank's spans and operations to one Timeline and one Schedule on rank 0."""

from __future__ import annotations

import datetime
import platform
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import runner
from runner.config.environ import available_cores
from runner.planning.residency import SERVING
from runner.scenario import Scenario
from runner.schedule import Op, Schedule
from runner.timeline import Span, Timeline, merge
from runner.watch.shim import CompileRecord


@dataclass(frozen=True)
class RunResult:
    """What rank 0 has after a run; the other ranks have None."""

    timeline: Timeline
    schedule: Schedule


@dataclass(frozen=True)
class RankRecord:
    """What one rank hands over.

    Attributes:
        started: when its process began, in seconds since the epoch, as all times here.
        spans: what it did.
        ops: its operations.
        coverage: its node's proof, from the node's first rank.
        stalls: compiles in requests after the first: [forward, its name, rank, kernel].
        walk_memory: least bytes of GPU memory that were free before a walk, None without one.
    """

    started: float
    spans: Sequence[Span]
    ops: Sequence[Op]
    coverage: dict[str, Any] | None
    stalls: list[list[Any]] = field(default_factory=list)
    walk_memory: float | None = None


def find_stalls(
    records: Sequence[CompileRecord],
    forwards: Sequence[tuple[float, str, str]],
    names: Sequence[str],
    rank: int,
) -> list[list[Any]]:
    """Compiles in requests after the first one, by the forward that they held up.

    Args:
        records: this rank's compiles.
        forwards: (start, phase, name) of each of its forwards, in order.
        names: identity of each record's kernel.
        rank: world rank.
    """
    served = [(start, name) for start, phase, name in forwards if phase == SERVING]
    starts = [start for start, _ in served]
    found = []
    for record, identity in zip(records, names, strict=True):
        index = bisect_right(starts, record.start) - 1
        if index >= 0:
            found.append([index, served[index][1], rank, identity])
    return found


def gather(mine: RankRecord, scenario: Scenario, facts: dict[str, Any]) -> RunResult | None:
    """Bring all ranks' records to rank 0; None on the others.

    Args:
        mine: this rank's.
        scenario: what was run.
        facts: what else the Timeline should say of the run.
    """
    world_size = scenario.parallel.world_size
    everyone: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return None if everyone is None else assemble(everyone, scenario, facts)


def assemble(
    everyone: Sequence[RankRecord], scenario: Scenario, facts: dict[str, Any]
) -> RunResult:
    """The run's Timeline, its origin where the first process began."""
    origin = min(record.started for record in everyone)
    spans = [
        Span(s.rank, max(0.0, s.start - origin), s.end - origin, s.kind, s.name, s.key)
        for record in everyone
        for s in record.spans
    ]
    walks = [record.walk_memory for record in everyone if record.walk_memory is not None]
    timeline = Timeline(
        policy=scenario.policy.value,
        source="measured",
        world_size=scenario.parallel.world_size,
        spans=merge(spans),
        meta={
            **scenario.timeline_meta(),
            **facts,
            "walk_memory": min(walks, default=scenario.walk_memory),
            "coverage": [record.coverage for record in everyone if record.coverage],
            "stalls": sorted(stall for record in everyone for stall in record.stalls),
        },
    )
    return RunResult(timeline, Schedule(tuple(tuple(record.ops) for record in everyone)))


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made: the provenance of its figures."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "cores": available_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "deepgemm_coldstart": runner.__version__,
    }
