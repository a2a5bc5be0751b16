"""``runner record`` around ``launch``: the library's calls are those of the Schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.recording.recording import read_recording
from tests.recorded_calls import recorded_calls, scheduled_calls

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_recorded_calls_are_those_of_the_schedule(tmp_path: Path) -> None:
    recording, schedule = tmp_path / "recording.json", tmp_path / "schedule.json"
    launch = [sys.executable, "-m", "launch", "--model", "dsv4", "--layers", "4", "--pp", "2"]
    launch += ["--device", "cuda", "--batch-sizes", "1,200", "--max-tokens", "4096"]
    launch += ["--warmup", "none", "--schedule", str(schedule)]
    record = [sys.executable, "-m", "runner", "record", "--json", str(recording), "--"]
    done = subprocess.run([*record, *launch], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = scheduled_calls(schedule)
    assert expected
    assert recorded_calls(read_recording(recording)) == expected
