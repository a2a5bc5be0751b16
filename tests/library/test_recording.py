"""Recorded calls of ``launch`` on a stand-in GPU, and plans of them.

DEEPGEMM_COLDSTART_LIBRARY_PYTHON names an interpreter with the library and a CUDA build of torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from runner.recording.recording import Recording, read_recording
from tests.recorded_calls import recorded_calls, scheduled_calls

PYTHON = os.environ.get("DEEPGEMM_COLDSTART_LIBRARY_PYTHON", "")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.library,
    pytest.mark.skipif(not PYTHON, reason="DEEPGEMM_COLDSTART_LIBRARY_PYTHON is not set"),
]

STANDIN = ["-m", "runner", "standin", "--gpu", "h200", "--no-compile", "--", PYTHON]
LAUNCH = ["-m", "launch", "--model", "dsv4", "--layers", "3", "--pp", "2", "--device", "cuda"]
LAUNCH += ["--batch-sizes", "1,70", "--max-tokens", "512", "--warmup", "none"]


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [PYTHON, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "xdg"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a launch, and the Schedule that it wrote."""
    folder = tmp_path_factory.mktemp("recording")
    record = ["-m", "runner", "record", "--json", str(folder / "calls.json"), "--", PYTHON]
    written = ["--schedule", str(folder / "schedule.json")]
    run(folder, *STANDIN, *record, *LAUNCH, *written)
    return folder


@pytest.fixture
def recording(folder: Path) -> Recording:
    return read_recording(folder / "calls.json")


def test_recorded_calls_are_those_of_the_schedule(folder: Path, recording: Recording) -> None:
    expected = scheduled_calls(folder / "schedule.json")
    assert expected
    assert recorded_calls(recording) == expected


def test_every_recorded_call_is_general(recording: Recording) -> None:
    assert [group.title for group in recording.groups if group.reason] == []


def test_plan_of_the_calls_has_every_kernel_that_the_launch_compiled(
    folder: Path, recording: Recording
) -> None:
    plan = folder / "plan.json"
    run(
        folder,
        *("-m", "runner", "plan", "--calls", str(folder / "calls.json"), "--gpu", "h200"),
        *("--max-tokens", "512", "--json", str(plan)),
    )
    keys = {kernel["cache_key"] for kernel in json.loads(plan.read_text())["kernels"]}
    compiled = set(recording.entries())
    assert compiled
    assert compiled <= keys
