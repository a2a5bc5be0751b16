"""Reports on narrow terminals and in pipes."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from runner.cli import cli
from runner.config.warmup import WarmupPolicy
from runner.errors import run_guarded
from runner.report.console import PIPED_WIDTH, make_console, make_table
from runner.timeline import write_timelines
from tests.unit.measured_runs import measured, other_profile
from tests.unit.tiny_runs import scenario

Capture = pytest.CaptureFixture[str]
Shown = Callable[..., list[str]]
TINY = "--model dsv4-tiny --layers 4 --batch-sizes 1 --max-tokens 64"
HEADERS = ["measured\ns", "predicted\ns", "error", "duplicates", "predicted", "longest\nwait s"]
NUMBERS = ["1234.5", "1.5", "-12.3 %", "123", "123456789", "7"]
NAME = "dsv4 43 layers, pp 4 tp 2, pp-parallel+full"


def table(name: str = NAME) -> Table:
    made = make_table("Runs", ["run"], HEADERS)
    made.add_row(name, *NUMBERS)
    return made


def rendered(made: Table, width: int) -> list[str]:
    out = StringIO()
    Console(width=width, file=out).print(made)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [*range(76, 110, 3), 80, 99, 100])
def test_tables_fit_the_width_without_losing_text(width: int) -> None:
    made = table()
    lines = rendered(made, width)
    assert max(map(len, lines)) <= width
    text = "".join(lines)
    assert "…" not in text
    words = "Runs", "run", *HEADERS, NAME, *NUMBERS
    assert sorted(re.sub(r"[\s─]", "", text)) == sorted(re.sub(r"\s", "", "".join(words)))
    row = next(line for line in lines if "1234.5" in line)
    assert all(number in row for number in NUMBERS)


def test_console_width_is_100_in_a_pipe_and_else_the_terminals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert make_console().width == PIPED_WIDTH == 100
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert make_console().width == 80


@pytest.fixture
def shown(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Runs a command on a terminal of 80 columns and returns its output."""
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "80"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)

    def run(arguments: str) -> list[str]:
        assert run_guarded(cli, arguments.split(), program="runner") == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return run


def assert_fits_80_columns(lines: list[str]) -> None:
    assert lines and max(len(line.rstrip()) for line in lines) <= 80
    assert not [line for line in lines if "…" in line]


def test_timeouts_and_advice_wrap_at_words(shown: Shown) -> None:
    lines = shown(f"sim {TINY} --walk-max-m 16 --nccl-timeout 5 --no-run-ahead")
    assert_fits_80_columns(lines)
    text = " ".join(line.strip() for line in lines)
    assert re.search(
        r"none: the watchdog ends this run at \d+ s: rank \d waits for rank \d in "
        r"recv hidden_states while that does compile \w+; --nccl-timeout \d+ would "
        r"survive",
        text,
    )
    assert "leaves no kernel to compile in traffic" in text


def test_validation_and_calibration_fit_80_columns(shown: Shown, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    write_timelines(
        path,
        [
            measured(scenario(policy, tp=2), other_profile())
            for policy in (WarmupPolicy.NONE, WarmupPolicy.PLANNED)
        ],
    )
    assert_fits_80_columns(shown(f"compare --hardware h200 {path}"))
    lines = shown(f"calibrate {path} -o {tmp_path / 'x.json'}")
    assert_fits_80_columns([line for line in lines if not line.startswith("wrote ")])


def test_sweep_fits_80_columns(shown: Shown) -> None:
    assert_fits_80_columns(shown(f"sweep {TINY} --jobs 1 --pp 1 --tp 1"))
