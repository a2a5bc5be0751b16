"""Results of a run: rank 0 gathers one Timeline and one Schedule of all ranks; logits are saved."""

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
    """The results of a run, which only rank 0 has."""

    timeline: Timeline
    schedule: Schedule

    def write(self, options: LaunchOptions, result: Path | None) -> None:
        """Write the files that were asked for and print the report.

        With ``result``, write the Timeline there and let the process that started the ranks report.
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
    """What one rank sends to rank 0.

    Attributes:
        started: when the process began, in seconds since the epoch, like all times here.
        coverage: coverage of the rank's node; only the node's first rank sends it.
        stalls: compiles in requests after the first: [forward index, its name, rank, kernel key].
        walk_memory: least GPU memory, in bytes, that was free before a walk; None without walks.
    """

    started: float
    spans: Sequence[Span]
    ops: Sequence[Op]
    coverage: Mapping[str, object] | None
    stalls: list[list[Any]] = field(default_factory=list)
    walk_memory: float | None = None


def find_stalls(spans: Sequence[Span], served: Sequence[tuple[float, str]]) -> list[list[Any]]:
    """A rank's compiles in requests after the first one, each with the forward that it held up.

    ``served`` has the start and name of each of these forwards, in order.
    """
    starts = [start for start, _ in served]
    found = []
    for span in spans:
        index = bisect_right(starts, span.start) - 1
        if span.is_kernel and index >= 0:
            found.append([index, served[index][1], span.rank, span.key])
    return found


def gather(mine: RankRecord, scenario: Scenario, facts: Mapping[str, object]) -> RunResult | None:
    """Gather all ranks' records on rank 0; other ranks get None.

    ``facts`` are added to the scenario in the Timeline's metadata.
    """
    world_size = scenario.parallel.world_size
    everyone: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return None if everyone is None else assemble(everyone, scenario, facts)


def assemble(
    everyone: Sequence[RankRecord], scenario: Scenario, facts: Mapping[str, object]
) -> RunResult:
    """The run's Timeline, whose time 0 is the start of the first process, and its Schedule."""
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
    """The hardware and software versions of a run."""
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
    """The logits of each forward in order; the last stage's first rank keeps them, having all.

    Without a path, nothing is kept.
    """

    def __init__(self, path: Path | None, parallel: ParallelConfig, rank: int) -> None:
        at = parallel.coordinates(rank)
        has_all = at.pp_rank == parallel.pp - 1 and at.tp_rank == 0
        self._path = path if has_all else None
        self._kept: list[torch.Tensor] = []

    def keep(self, logits: object) -> None:
        """Copy a forward's logits to the host as fp32; does nothing in a run on shapes."""
        if self._path is not None and isinstance(logits, torch.Tensor):
            self._kept.append(logits.float().cpu())

    def save(self) -> None:
        """Write the file if there are logits; raise UserError if that fails."""
        if not self._kept or self._path is None:
            return
        try:
            torch.save(self._kept, self._path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self._path}: {error}") from None
