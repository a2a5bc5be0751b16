"""Helpers that run ``runner cache`` in this process and check its output."""

import json
from pathlib import Path
from typing import Any

import pytest

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
