"""``runner calibrate``: fits a hardware profile to measured runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cli import cli
from runner.config.warmup import WarmupPolicy
from runner.errors import run_guarded
from runner.timeline import Timeline, write_timelines
from sim.calibration.calibrate import fit_profile, leave_one_out
from sim.calibration.validation import error_summary
from sim.costs.profile import Profile, load_profile, write_profile
from tests.unit.measured_runs import measured, other_profile
from tests.unit.tiny_runs import h200, scenario

Capture = pytest.CaptureFixture[str]


def calibrate(*arguments: str) -> int:
    return run_guarded(cli, ["calibrate", *arguments], program="runner")


@pytest.fixture
def runs(tmp_path: Path) -> list[Timeline]:
    """Two measured runs, one per file: none.json and planned.json."""
    made = []
    for policy in (WarmupPolicy.NONE, WarmupPolicy.PLANNED):
        run = measured(scenario(policy, tp=2), other_profile())
        write_timelines(tmp_path / f"{policy.value}.json", [run])
        made.append(run)
    return made


def files(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "none.json"), str(tmp_path / "planned.json")]


def fitted(runs: list[Timeline], name: str, base: Profile | None = None) -> Profile:
    as_written = [Timeline.from_json(run.to_json()) for run in runs]
    return fit_profile(as_written, base or h200(), name).profile


def test_calibrate_writes_the_profile_and_prints_its_figures(
    runs: list[Timeline], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "mine.json"
    assert calibrate(*files(tmp_path), "-o", str(output)) == 0
    assert load_profile(str(output)) == fitted(runs, "mine")
    captured = capsys.readouterr()
    assert f"leave one out: {len(runs)} of {len(runs)}, " in captured.err
    lines = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert lines[0] == "Profile mine"
    assert "builder start 2.50 s 1" in lines
    assert "Each run, predicted by a profile fitted to the others" in lines
    # A long name wraps; its figures stay on the first line.
    assert sum(line.startswith("dsv4-tiny 4 layers") for line in lines) == 2
    as_written = [Timeline.from_json(run.to_json()) for run in runs]
    assert lines[-2] == error_summary(leave_one_out(as_written, h200()))
    assert lines[-1] == f"wrote {output}"


def test_sim_accepts_the_calibrated_profile(runs: list[Timeline], tmp_path: Path) -> None:
    output = tmp_path / "mine.json"
    assert calibrate(*files(tmp_path), "-o", str(output), "--name", "my machine") == 0
    assert load_profile(str(output)).name == "my machine"
    figures = tmp_path / "figures.json"
    options = "sim --model dsv4-tiny --warmup prebuilt --batch-sizes 1 --max-tokens 64 --hardware"
    arguments = [*options.split(), str(output), "--json", str(figures)]
    assert run_guarded(cli, arguments, program="runner") == 0
    (made,) = json.loads(figures.read_text())["predictions"]
    assert made["meta"]["hardware"] == "my machine"


def test_figures_that_no_run_measures_come_from_the_base_profile(
    runs: list[Timeline], tmp_path: Path
) -> None:
    base = other_profile()
    write_profile(tmp_path / "base.json", base)
    output = tmp_path / "mine.json"
    assert (
        calibrate(*files(tmp_path), "-o", str(output), "--base", str(tmp_path / "base.json")) == 0
    )
    made = load_profile(str(output))
    assert made == fitted(runs, "mine", base)
    assert (made.host.walk, made.host.walk_call) == (base.host.walk, base.host.walk_call)
    assert made.cache.verify == base.cache.verify != h200().cache.verify


def test_single_run_cannot_be_cross_validated(
    runs: list[Timeline], tmp_path: Path, capsys: Capture
) -> None:
    assert calibrate(files(tmp_path)[0], "-o", str(tmp_path / "mine.json")) == 0
    assert capsys.readouterr().out.splitlines()[-2] == (
        "no leave-one-out error: that needs at least two runs"
    )


def without_replicas(run: Timeline) -> dict[str, Any]:
    data = run.to_json()
    del data["meta"]["replicas"]
    return data


def test_invalid_input_is_a_one_line_error(
    runs: list[Timeline], tmp_path: Path, capsys: Capture
) -> None:
    good, output = files(tmp_path)[0], str(tmp_path / "mine.json")
    predicted = tmp_path / "predicted.json"
    write_timelines(predicted, [Timeline("none", "predicted", 1, ())])
    broken, old, empty = (tmp_path / f"{name}.json" for name in ("broken", "old", "empty"))
    broken.write_text("{")
    old.write_text(json.dumps({"timelines": [without_replicas(runs[0])]}))
    write_timelines(empty, [])
    bad: list[tuple[list[str], str]] = [
        ([], "Missing argument 'TIMELINE.json...'"),
        ([good], "Missing option '-o' / '--output'"),
        ([str(tmp_path / "nothing.json"), "-o", output], "cannot read"),
        ([str(broken), "-o", output], f"{broken} is not a Timeline file"),
        ([str(old), "-o", output], "a Timeline of none lacks 'replicas'"),
        ([str(empty), "-o", output], "the files hold no Timeline"),
        ([good, str(predicted), "-o", output], "none is a predicted Timeline, not a measured one"),
        ([good, "-o", output, "--base", "abacus"], "hardware 'abacus' is not known"),
        ([good, "-o", str(tmp_path / "no" / "x.json")], "its folder does not exist"),
    ]
    for arguments, words in bad:
        assert calibrate(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and words in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert not Path(output).exists()
