"""What the Python API refuses, where a command line cannot give such values."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import pytest

from runner.api import (
    MachineOptions,
    Timeline,
    UserError,
    compile,  # noqa: A004  # the API's name
    find_target,
    plan,
    read_timelines,
)
from runner.timeline import write_timelines
from tests.unit.tiny_runs import scenario


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"skip_phase": ("bogus",)},
            "skip_phase 'bogus' must be one of imports, process-group, weights",
        ),
        ({"skip_phase": ["imports"]}, "skip_phase=['imports'] must be a tuple"),
        ({"host_factor": -1.0}, "host_factor=-1.0 must be a finite number above 0"),
        ({"nccl_timeout": -1.0}, "nccl_timeout=-1.0 must be a finite number above 0"),
        ({"nccl_timeout": nan}, "nccl_timeout=nan must be a finite number above 0"),
        ({"cores": -4}, "cores=-4 must be at least 1"),
        ({"ranks_per_gpu": 0}, "ranks_per_gpu=0 must be at least 1"),
    ],
)
def test_machine_that_cannot_exist_is_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        MachineOptions(**values)
    assert str(caught.value) == line


@pytest.mark.parametrize("jobs", [-1, 0])
def test_compile_needs_at_least_one_job(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        compile(plan(scenario()), find_target(), tmp_path, jobs=jobs)
    assert str(caught.value) == f"jobs={jobs} must be at least 1"


def test_timelines_are_read_from_a_path_given_as_text(tmp_path: Path) -> None:
    timeline = Timeline("none", "measured", 1, ())
    write_timelines(tmp_path / "runs.json", [timeline])
    assert read_timelines(str(tmp_path / "runs.json")) == [timeline]
