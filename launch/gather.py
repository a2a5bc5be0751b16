"""What a run leaves: one Timeline and one Schedule of all ranks, on rank 0, and the logits."""

from __future__ import annotations

import datetime
import platform
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import runner
from launch.options import LaunchOptions
from runner.config.environ import available_cores
from runner.config.parallel import ParallelConfig
from runner.errors import UserError
from runner.files import write_json
from runner.report.outputs import print_timelines, write_reports
from runner.scenario import Scenario
from runner.schedule import Op, Schedule
from runner.timeline import Span, Timeline, merge, write_timelines


@dataclass(frozen=True)
class RunResult:
    """What rank 0 has after a run; the other ranks have None."""

    timeline: Timeline
    schedule: Schedule

    def write(self, options: LaunchOptions, result: Path | None) -> None:
        """Write the files that were asked for; print the report, or leave it to the process that
        started the ranks and reads the Timeline from ``result``.
        """
        if options.schedule is not None:
            write_json(options.schedule, self.schedule.to_json())
        if result is not None:
            write_timelines(result, [self.timeline])
            return
        print_timelines([self.timeline])
        write_reports([self.timeline], **vars(options.files))


@dataclass(frozen=True)
class RankRecord:
    """What one rank hands over.

    Attributes:
        started: when its process began, in seconds since the epoch, as all times here.
        coverage: its node's, from the node's first rank.
        stalls: compiles in requests after the first: [forward, its name, rank, kernel].
        walk_memory: fewest bytes of GPU memory that were free before a walk, None without one.
    """

    started: float
    spans: Sequence[Span]
    ops: Sequence[Op]
    coverage: Mapping[str, object] | None
    stalls: list[list[Any]] = field(default_factory=list)
    walk_memory: float | None = None


def find_stalls(spans: Sequence[Span], served: Sequence[tuple[float, str]]) -> list[list[Any]]:
    """A rank's compiles in requests after the first one, by the forward that they held up.

    ``served`` holds start and name of each forward, in order.
    """
    starts = [start for start, _ in served]
    found = []
    for span in spans:
        index = bisect_right(starts, span.start) - 1
        if span.is_kernel and index >= 0:
            found.append([index, served[index][1], span.rank, span.key])
    return found


def gather(mine: RankRecord, scenario: Scenario, facts: Mapping[str, object]) -> RunResult | None:
    """Bring all ranks' records to rank 0; None on the others.

    ``facts`` is what the Timeline's metadata holds besides the scenario.
    """
    world_size = scenario.parallel.world_size
    everyone: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return None if everyone is None else assemble(everyone, scenario, facts)


def assemble(
    everyone: Sequence[RankRecord], scenario: Scenario, facts: Mapping[str, object]
) -> RunResult:
    """The run's Timeline, which begins with the first process, and its Schedule."""
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


def machine_facts(device: torch.device) -> dict[str, object]:
    """Where and with what a run was made."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "cores": available_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "deepgemm_coldstart": runner.__version__,
    }


class Logits:
    """The logits of each forward in order, kept by the last stage's first rank, which has all.

    Without a path none are kept.
    """

    def __init__(self, path: Path | None, parallel: ParallelConfig, rank: int) -> None:
        at = parallel.coordinates(rank)
        has_all = at.pp_rank == parallel.pp - 1 and at.tp_rank == 0
        self._path = path if has_all else None
        self._kept: list[torch.Tensor] = []

    def keep(self, logits: object) -> None:
        """Copy a forward's logits to the host, as fp32; shapes alone are not kept."""
        if self._path is not None and isinstance(logits, torch.Tensor):
            self._kept.append(logits.float().cpu())

    def save(self) -> None:
        """Write the file if there are logits; UserError if it cannot be written."""
        if not self._kept or self._path is None:
            return
        try:
            torch.save(self._kept, self._path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self._path}: {error}") from None
