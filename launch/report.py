"""What rank 0 does with a finished run."""

from __future__ import annotations

from pathlib import Path

from launch.gather import RunResult
from launch.options import LaunchOptions
from runner.files import write_json
from runner.report.outputs import print_timelines, write_reports
from runner.timeline import write_timelines


def finish(options: LaunchOptions, outcome: RunResult, result: Path | None) -> None:
    """Write what was asked for; print the report unless a parent process will.

    Args:
        options: the launch.
        outcome: the run.
        result: where the process that started the ranks wants the Timeline.
    """
    if options.schedule is not None:
        write_json(options.schedule, outcome.schedule.to_json())
    if result is not None:
        write_timelines(result, [outcome.timeline])
        return
    print_timelines([outcome.timeline])
    write_reports([outcome.timeline], **vars(options.files))
