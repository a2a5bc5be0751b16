"""``torchrun -m launch.steps`` on CPUs measures steps that ``runner overlap`` compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli import cli
from runner.errors import run_guarded
from runner.schedule import Await, Begin, Collective, Compute, Mark
from sim.overlap.measured import read_steps
from tests.distributed.launching import split

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.distributed

SMALL = "--model dsv4-tiny --layers 2 --ep --prompt-len 3 --repeat 1 --device cpu"


def steps(*arguments: str | Path, ranks: int) -> subprocess.CompletedProcess[str]:
    torchrun = f"-m torch.distributed.run --nproc-per-node {ranks} -m launch.steps"
    return subprocess.run(
        [sys.executable, *split(torchrun, SMALL, *arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(("mode", "batch"), [("decode", "5"), ("extend", "7")])
def test_measured_steps_are_compared_with_predictions(
    mode: str, batch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, shown = tmp_path / "steps.json", tmp_path / "shown.json"
    done = steps(f"--tp 2 --mode {mode} --batch {batch} --json", path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = read_steps(path)
    assert [step.strategy is None for step in measured.steps] == [True, False, False]
    for step in measured.steps:
        assert list(step.ends) == sorted(step.ends) and step.ends[0] == 0 < step.step_seconds
        assert all(0 <= start <= end <= step.ends[-1] for start, end in step.link)
    words = ["overlap", "--measured", str(path), "--no-search", "--json", str(shown)]
    assert run_guarded(cli, words, program="runner") == 0
    assert "Measured on CPU" in capsys.readouterr().out
    rows = json.loads(shown.read_text())["measured"]
    assert [row["noted_seconds"] for row in rows] == [step.ends[-1] for step in measured.steps]
    assert all(row["predicted_seconds"] > 0 for row in rows)


def test_number_of_ranks_other_than_tp_is_refused() -> None:
    done = steps("--tp 2 --json none.json", ranks=1)
    assert done.returncode != 0
    assert "error: --pp 1 --tp 2 with 1 ranks: this measures one stage; run torchrun" in done.stderr


def test_step_sink_records_end_of_operations_and_span_of_collectives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from launch.steps import StepSink

    ticks = iter(range(100))
    monkeypatch.setattr("launch.steps.time.perf_counter", lambda: float(next(ticks)))
    sink = StepSink(None)
    for _ in range(2):  # Records of an earlier forward are dropped.
        sink.listen(True)
        sink.run(Mark("batch", "0"), lambda: None)
        sink.run(Compute("x", 1, 1), lambda: None)
        sink.run(Begin("all_to_all tokens of 0", (0, 1), 8), lambda: None)
        sink.run(Collective("all_reduce y", (0, 1), 8), lambda: None)
        assert sink.run(Await("all_to_all tokens of 0"), lambda: "tokens") == "tokens"
    assert sink.ends() == [0, 1, 2, 3, 4]
    assert sink.link() == [(1, 4), (2, 3)]
    sink.listen(False)
    sink.run(Compute("z", 1, 1), lambda: None)
    assert sink.ends() == [] and sink.last == "z"
