"""When a process began."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.process import process_start

PRINT = "from launch.process import process_start; print(process_start())"


def test_it_began_before_now_and_does_not_move() -> None:
    first = process_start()
    time.sleep(0.05)
    assert process_start() == pytest.approx(first, abs=0.02)
    assert first < time.time()


@pytest.mark.parametrize("name", ["plain", "a name) with (S 1 2 brackets"])
def test_a_childs_start_is_when_it_was_started(name: str, tmp_path: Path) -> None:
    """Whatever the program is called: its name is in the middle of what the kernel tells."""
    program = tmp_path / name
    program.symlink_to(Path(sys.executable).resolve())
    before = time.time()
    done = subprocess.run(
        [program, "-c", PRINT],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    after = time.time()
    assert before - 0.02 <= float(done.stdout) < after
