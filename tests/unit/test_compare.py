"""Two Timelines side by side, and the command that reads them from files."""

import json
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from runner.cli.compare import compare as command
from runner.errors import UserError
from runner.report.compare import Figure, compare, comparison_json, comparison_tables
from runner.timeline import Span, Timeline, write_timelines

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


def text_of(tables):
    out = StringIO()
    console = Console(width=100, force_terminal=False, file=out)
    for table in tables:
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


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


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [(9.0, 10.0, -0.1), (1.0, 0.0, None), (None, 1.0, None), (1.0, None, None), (0.0, 2.0, -1.0)],
)
def test_relative_error(a, b, error):
    assert Figure("x", "s", a, b).relative_error == error


def test_compare_summary_and_phases():
    result = compare(PREDICTED, MEASURED)
    assert result.world_size == 2
    assert result.summary == (
        Figure("wall", "s", 6.0, 10.0),
        Figure("kernels compiled", "", 3, 2),
        Figure("distinct kernels", "", 2, 2),
        Figure("duplicates", "", 1, 0),
    )
    assert result.phases == (
        Figure("warm-up", "s", 6.0, 8.0),
        Figure("first forward", "s", None, 2.0),
    )


def test_compare_ranks_and_kinds():
    result = compare(PREDICTED, MEASURED)
    assert [rank.rank for rank in result.ranks] == [0, 1]
    assert Figure("compile", "s", 6.0, 5.0) in result.ranks[1].figures
    assert Figure("total", "s", 6.0, 5.0) in result.ranks[1].figures
    assert Figure("kernels compiled", "", 2, 1) in result.ranks[1].figures
    assert result.kinds[0] == Figure("compile", "s", 12.0, 12.5)


def test_comparison_tables():
    assert text_of(comparison_tables(compare(PREDICTED, MEASURED))) == GOLDEN


def test_comparison_tables_leave_out_phases_where_there_are_none():
    bare = Timeline("cold", "predicted", 1, ())
    assert len(comparison_tables(compare(bare, bare))) == 3


def test_comparison_json():
    data = json.loads(json.dumps(comparison_json(compare(PREDICTED, MEASURED)), allow_nan=False))
    assert data["a"] == {"policy": "cold", "source": "predicted"}
    assert data["summary"]["wall"] == {"a": 6.0, "b": 10.0, "relative_error": -0.4}
    assert data["summary"]["duplicates"] == {"a": 1, "b": 0, "relative_error": None}
    assert data["phases"]["first forward"] == {"a": None, "b": 2.0, "relative_error": None}
    assert data["ranks"][1]["compile"] == {"a": 6.0, "b": 5.0, "relative_error": 0.2}


def test_world_sizes_must_be_equal():
    other = Timeline("cold", "measured", 4, ())
    with pytest.raises(UserError) as caught:
        compare(PREDICTED, other)
    assert str(caught.value) == (
        "cannot compare cold (predicted) on 2 ranks with cold (measured) on 4 ranks: "
        "world sizes must be equal"
    )


@pytest.fixture
def files(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_timelines(a, [PREDICTED, Timeline("warm", "predicted", 2, ())])
    write_timelines(b, [MEASURED])
    return str(a), str(b)


def invoke(*arguments):
    return CliRunner().invoke(command, arguments)


def test_command_prints_the_tables_of_common_policies(files):
    result = invoke(*files)
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert "\n".join(lines) == GOLDEN
    assert result.stderr == f"note: only in {files[0]}, not compared: warm\n"


def test_command_writes_json_to_stdout_without_tables(files):
    result = invoke(*files, "--json", "-")
    expected = {"version": 1, "comparisons": [comparison_json(compare(PREDICTED, MEASURED))]}
    assert json.loads(result.stdout) == expected


def test_command_writes_json_to_a_file_besides_tables(files, tmp_path):
    result = invoke(*files, "--json", str(tmp_path / "c.json"))
    assert "wall s" in result.stdout
    assert len(json.loads((tmp_path / "c.json").read_text())["comparisons"]) == 1


def test_command_says_why_it_cannot_write(files, tmp_path):
    result = invoke(*files, "--json", str(tmp_path / "missing" / "c.json"))
    assert isinstance(result.exception, UserError)
    assert "No such file" in str(result.exception)


def test_command_without_a_common_policy_lists_both(files, tmp_path):
    other = tmp_path / "other.json"
    write_timelines(other, [Timeline("hot", "measured", 2, ())])
    result = invoke(files[0], str(other))
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        f"no policy in common: {files[0]} has cold, warm; {other} has hot"
    )


def test_command_refuses_a_policy_twice(files, tmp_path):
    twice = tmp_path / "twice.json"
    write_timelines(twice, [MEASURED, MEASURED])
    result = invoke(files[0], str(twice))
    assert isinstance(result.exception, UserError)
    assert "policy cold more than once" in str(result.exception)


def test_command_cannot_read(files, tmp_path):
    result = invoke(files[0], str(tmp_path / "nothing.json"))
    assert isinstance(result.exception, UserError)
