"""``runner compare``: two files of Timelines, or measured runs and a profile's predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.cli import cli
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError, run_guarded
from runner.report.compare import Figure, compare_timelines, comparison_json, comparison_tables
from runner.report.validation import validation_json
from runner.timeline import Span, Timeline, write_timelines
from sim.calibration.validation import error_summary, validate
from sim.costs.profile import write_profile
from tests.unit.measured_runs import measured, other_profile
from tests.unit.tiny_runs import h200, scenario

Capture = pytest.CaptureFixture[str]


def compare(*arguments: object) -> int:
    return run_guarded(cli, ["compare", *map(str, arguments)], program="runner")


# -- two Timelines --------------------------------------------------------------------------------

PREDICTED = Timeline(
    policy="cold",
    source="predicted",
    world_size=2,
    spans=(
        Span(0, 0.0, 6.0, "phase", "warm-up"),
        Span(0, 0.0, 6.0, "compile", "gemm", "k1"),
        Span(1, 0.0, 4.0, "compile", "gemm", "k1"),
        Span(1, 4.0, 6.0, "compile", "gemm", "k2"),
    ),
)
MEASURED = Timeline(
    policy="cold",
    source="measured",
    world_size=2,
    spans=(
        Span(0, 0.0, 8.0, "phase", "warm-up"),
        Span(0, 0.0, 7.5, "compile", "gemm", "k1"),
        Span(0, 8.0, 10.0, "phase", "first forward"),
        Span(0, 8.0, 10.0, "compute", "attention"),
        Span(1, 0.0, 5.0, "compile", "gemm", "k2"),
    ),
)

GOLDEN = """\
A: cold (predicted)
B: cold (measured)
2 ranks

                    A predicted  B measured  (A-B)/B
 ────────────────────────────────────────────────────
  wall s                   6.00       10.00  -40.0 %
  kernels compiled            3           2  +50.0 %
  distinct kernels            2           2    0.0 %
  duplicates                  1           0        -

Longest over ranks, by phase

                   A predicted  B measured  (A-B)/B
 ───────────────────────────────────────────────────
  warm-up s               6.00        8.00  -25.0 %
  first forward s            -        2.00        -

Sum over ranks, by kind

             A predicted  B measured   (A-B)/B
 ──────────────────────────────────────────────
  compile s        12.00       12.50    -4.0 %
  load s            0.00        0.00         -
  compute s         0.00        2.00  -100.0 %
  comm s            0.00        0.00         -
  wait s            0.00        0.00         -
  setup s           0.00        0.00         -

Ranks, by kind

  rank                    A predicted  B measured   (A-B)/B
 ───────────────────────────────────────────────────────────
  0     compile s                6.00        7.50   -20.0 %
        compute s                0.00        2.00  -100.0 %
        total s                  6.00       10.00   -40.0 %
        kernels compiled            1           1     0.0 %

  1     compile s                6.00        5.00   +20.0 %
        total s                  6.00        5.00   +20.0 %
        kernels compiled            2           1  +100.0 %

"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_timelines(a, [PREDICTED, Timeline("warm", "predicted", 2, ())])
    write_timelines(b, [MEASURED])
    return a, b


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [(9.0, 10.0, -0.1), (1.0, 0.0, None), (None, 1.0, None), (1.0, None, None), (0.0, 2.0, -1.0)],
)
def test_relative_error_is_relative_to_b_and_none_if_undefined(
    a: float | None, b: float | None, error: float | None
) -> None:
    assert Figure("x", a, b).relative_error == error


def test_compare_prints_common_policies_and_notes_the_others(
    files: tuple[Path, Path], capsys: Capture
) -> None:
    assert compare(*files) == 0
    captured = capsys.readouterr()
    assert "".join(f"{line.rstrip()}\n" for line in captured.out.splitlines()) == GOLDEN
    assert captured.err == f"note: only in {files[0]}, not compared: warm\n"
    bare = Timeline("cold", "predicted", 1, ())
    assert len([*comparison_tables(compare_timelines(bare, bare))]) == 3, (
        "timelines without phases need no table of phases"
    )


def test_compare_json_has_both_figures_and_relative_errors(
    files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    data = comparison_json(compare_timelines(PREDICTED, MEASURED))
    assert compare(*files, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == {"version": 1, "comparisons": [data]}
    assert compare(*files, "--json", tmp_path / "c.json") == 0
    assert "wall s" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert found["a"] == {"policy": "cold", "source": "predicted"}
    assert found["summary"]["wall"] == {"a": 6.0, "b": 10.0, "relative_error": -0.4}
    assert found["summary"]["duplicates"] == {"a": 1, "b": 0, "relative_error": None}
    assert found["phases"]["first forward"] == {"a": None, "b": 2.0, "relative_error": None}
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["ranks"][1]["compile"] == {"a": 6.0, "b": 5.0, "relative_error": 0.2}


def test_compare_refuses_different_world_sizes() -> None:
    with pytest.raises(UserError) as caught:
        compare_timelines(PREDICTED, Timeline("cold", "measured", 4, ()))
    assert str(caught.value) == (
        "cannot compare cold (predicted) on 2 ranks with cold (measured) on 4 ranks: "
        "world sizes must be equal"
    )


def test_compare_notes_different_scenario_settings(tmp_path: Path, capsys: Capture) -> None:
    for name, values in (("a", {}), ("b", {"layers": 2, "stream": (5,)})):
        one = scenario(WarmupPolicy.NONE, tp=2, **values)
        write_timelines(tmp_path / f"{name}.json", [measured(one, other_profile())])
    assert compare(tmp_path / "a.json", tmp_path / "a.json") == 0
    assert capsys.readouterr().err == ""
    assert compare(tmp_path / "a.json", tmp_path / "b.json") == 0
    assert capsys.readouterr().err.splitlines() == [
        "note: layers differs: 4 in A, 2 in B",
        "note: stream differs: None in A, [5] in B",
    ]


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.json"
    spans = (Span(0, 0.0, 1.0, "phase", "[/nope]"), Span(0, 0.0, 1.0, "phase", "[bold] :car:"))
    write_timelines(path, [Timeline("[/policy]", "[red]", 1, spans)])
    assert compare(path, path) == 0
    shown = capsys.readouterr().out
    for name in ("[/nope] s", "[bold] :car: s", "A: [/policy] ([red])", "A [red]"):
        assert name in shown


# -- measured runs against a profile --------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Timeline:
    """A run as it is read back from run.json."""
    made = measured(scenario(WarmupPolicy.NONE, tp=2), other_profile())
    write_timelines(tmp_path / "run.json", [made])
    return Timeline.from_json(made.to_json())


def test_compare_with_hardware_predicts_every_measured_run(
    run: Timeline, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "run.json"
    assert compare(path, path, path, "--hardware", "h200") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Predicted with h200"
    (found,) = validate([run], h200())
    # A long name wraps; its figures stay on the first line.
    figures = f" {run.wall:.1f} {found.predicted.timeline.wall:.1f} {100 * found.error:+.1f} % "
    assert sum(line.startswith("dsv4-tiny 4 layers") and figures in line for line in lines) == 3
    assert lines[-1] == error_summary([found] * 3)
    write_profile(tmp_path / "another.json", other_profile())
    assert compare(path, "--hardware", tmp_path / "another.json") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 runs: median absolute error 0.0%, worst 0.0%; compiles and duplicates exact in 1"
    )


def test_compare_with_hardware_writes_predictions_as_json(
    run: Timeline, tmp_path: Path, capsys: Capture
) -> None:
    expected = json.loads(json.dumps(validation_json(validate([run], h200()), "h200")))
    path, output = tmp_path / "run.json", tmp_path / "validated.json"
    assert compare(path, "--hardware", "h200", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert compare(path, "--hardware", "h200", "--json", output) == 0
    assert json.loads(output.read_text()) == expected
    assert "Predicted with h200" in capsys.readouterr().out


def test_invalid_input_is_a_one_line_error(
    run: Timeline, files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    path, old = tmp_path / "run.json", tmp_path / "old.json"
    data = run.to_json()
    del data["meta"]["hosts"]
    old.write_text(json.dumps({"timelines": [data]}))
    predicted, twice, other = (tmp_path / f"{name}.json" for name in ("p", "twice", "other"))
    write_timelines(predicted, [Timeline("none", "predicted", 1, ())])
    write_timelines(twice, [MEASURED, MEASURED])
    write_timelines(other, [Timeline("hot", "measured", 2, ())])
    nowhere = tmp_path / "no" / "x"
    bad: list[tuple[list[object], str]] = [
        ([], "Missing argument 'A.json B.json | MEASURED.json...'"),
        ([path], "1 files were given: give two to compare, or measured ones with --hardware"),
        ([path] * 3, "3 files were given: give two to compare"),
        ([files[0], other], f"no policy in common: {files[0]} has cold, warm; {other} has hot"),
        ([files[0], twice], f"{twice} has policy cold more than once"),
        ([*files, "--json", nowhere], "No such file"),
        ([files[0], nowhere], "cannot read"),
        ([path, "--hardware", "abacus"], "hardware 'abacus' is not known: use one of"),
        ([predicted, "--hardware", "h200"], "none is a predicted Timeline"),
        ([old, "--hardware", "h200"], "a Timeline of none lacks 'hosts'"),
        ([nowhere, "--hardware", "h200"], "cannot read"),
        ([path, "--hardware", "h200", "--json", nowhere], "No such file"),
    ]
    for arguments, words in bad:
        assert compare(*arguments) == 2, arguments
        captured = capsys.readouterr()
        *notes, error = captured.err.splitlines()
        assert error.startswith("error: ") and words in error, captured.err
        assert all(note.startswith("note: ") for note in notes) and captured.out == ""
