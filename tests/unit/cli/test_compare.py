"""``runner compare --hardware``: measured runs beside a profile's predictions of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.cli import cli
from runner.config.warmup import WarmupPolicy
from runner.errors import run_guarded
from runner.report.validation_table import judged_json
from runner.timeline import Timeline, write_timelines
from sim.calibration.validation import judge, summary
from sim.costs.profile import write_profile
from tests.unit.measured_runs import another, measured
from tests.unit.tiny_runs import h200, scenario

Capture = pytest.CaptureFixture[str]


def compare(*arguments: str) -> int:
    return run_guarded(cli, ["compare", *arguments], program="runner")


@pytest.fixture
def run(tmp_path: Path) -> Timeline:
    """A run as it is read back from run.json."""
    made = measured(scenario(WarmupPolicy.NONE, tp=2), another())
    write_timelines(tmp_path / "run.json", [made])
    return Timeline.from_json(made.to_json())


def test_every_run_of_every_file_is_held_against_the_profile(
    run: Timeline, tmp_path: Path, capsys: Capture
) -> None:
    path = str(tmp_path / "run.json")
    assert compare(path, path, path, "--hardware", "h200") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Predicted with h200"
    (judged,) = judge([run], h200())
    # A long name wraps; its figures stay on the first line.
    figures = f" {run.wall:.1f} {judged.predicted.timeline.wall:.1f} {100 * judged.error:+.1f} % "
    assert sum(line.startswith("dsv4-tiny 4 layers") and figures in line for line in lines) == 3
    assert lines[-1] == summary([judged] * 3)


def test_a_profile_file(run: Timeline, tmp_path: Path, capsys: Capture) -> None:
    write_profile(tmp_path / "another.json", another())
    assert compare(str(tmp_path / "run.json"), "--hardware", str(tmp_path / "another.json")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 runs: median absolute error 0.0%, worst 0.0%; compiles and duplicates exact in 1"
    )


def test_json(run: Timeline, tmp_path: Path, capsys: Capture) -> None:
    expected = json.loads(json.dumps(judged_json(judge([run], h200()), "h200")))
    path, output = str(tmp_path / "run.json"), tmp_path / "judged.json"
    assert compare(path, "--hardware", "h200", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert compare(path, "--hardware", "h200", "--json", str(output)) == 0
    assert json.loads(output.read_text()) == expected
    assert "Predicted with h200" in capsys.readouterr().out


def test_bad_input(run: Timeline, tmp_path: Path, capsys: Capture) -> None:
    path, old = str(tmp_path / "run.json"), tmp_path / "old.json"
    data = run.to_json()
    del data["meta"]["hosts"]
    old.write_text(json.dumps({"timelines": [data]}))
    predicted = tmp_path / "predicted.json"
    write_timelines(predicted, [Timeline("none", "predicted", 1, ())])
    bad = [
        ([], "Missing argument 'A.json B.json | MEASURED.json...'"),
        ([path], "1 files were given: two are compared, or use --hardware"),
        ([path] * 3, "3 files were given: two are compared, or use --hardware"),
        ([path, "--hardware", "abacus"], "hardware 'abacus' is not known: use one of"),
        ([str(predicted), "--hardware", "h200"], "none is a predicted Timeline"),
        ([str(old), "--hardware", "h200"], "a Timeline of none does not tell its 'hosts'"),
        ([str(tmp_path / "x.json"), "--hardware", "h200"], "cannot read"),
        ([path, "--hardware", "h200", "--json", str(tmp_path / "no" / "x")], "No such file"),
    ]
    for arguments, words in bad:
        assert compare(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and words in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""


def test_two_files_are_compared_as_they_are(run: Timeline, tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "run.json")
    assert compare(path, path) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "(A-B)/B" in captured.out


def test_what_differs_is_noted(run: Timeline, tmp_path: Path, capsys: Capture) -> None:
    other = measured(scenario(WarmupPolicy.NONE, tp=2, layers=2, stream=(5,)), another())
    write_timelines(tmp_path / "other.json", [other])
    assert compare(str(tmp_path / "run.json"), str(tmp_path / "other.json")) == 0
    assert capsys.readouterr().err.splitlines() == [
        "note: layers differs: 4 in A, 2 in B",
        "note: stream differs: None in A, [5] in B",
    ]
