"""Helpers that run ``runner cache`` in this process and check its output."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runner.cache.lock import locked
from runner.cli import main
from runner.kernels.installed import Library
from runner.planning.plan import plan_to_json
from tests.unit.small_cache import INCLUDE, keys_for, small_plan

Capture = pytest.CaptureFixture[str]
ROOT = str(INCLUDE.parent)
ELSEWHERE = Path("/opt/other/deep_gemm")


def plan_file(path: Path, library: Library | None, max_m: int = 64, **values: Any) -> Path:
    keys = None if library is None else keys_for(library, **values)
    path.write_text(json.dumps({**plan_to_json(small_plan(max_m), keys), "for": "a plan"}))
    return path


def cache(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["cache", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def assert_prints(capsys: Capture, *lines: str, err: str = "") -> None:
    captured = capsys.readouterr()
    assert (captured.out.splitlines(), captured.err) == (list(lines), err)


def assert_refused(capsys: Capture, line: str) -> None:
    assert_prints(capsys, err=f"error: {line}\n")


def assert_progress(captured: str, what: str, total: int) -> None:
    (line,) = captured.splitlines()
    assert line.startswith(f"{what}: {total} of {total}, ")


def assert_says_waiting(capsys: Capture, directory: Path, work: Callable[[], object]) -> None:
    """Run ``work`` while another builder holds the lock; it must say so, then go on."""
    said, deadline = "", time.monotonic() + 20
    with ThreadPoolExecutor(1) as pool:
        with locked(directory):
            done = pool.submit(work)
            while not (said or done.done()) and time.monotonic() < deadline:
                time.sleep(0.01)
                said = capsys.readouterr().err
        done.result()
    assert said == f"another builder is at work in {directory}: waiting for it\n"
