"""Terminal reports of Timelines: tables and bars."""

from io import StringIO
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from runner.report.timelines import (
    busy_segments,
    critical_rank,
    phase_summary,
    policy_table,
    rank_bars,
    timeline_table,
)
from runner.timeline import KINDS, Span, Timeline

COLD = Timeline(
    policy="cold",
    source="predicted",
    world_size=2,
    spans=(
        Span(0, 0.0, 8.0, "phase", "warm-up"),
        Span(0, 0.0, 4.0, "compile", "gemm", "k1"),
        Span(0, 4.0, 6.0, "compile", "gemm", "k2"),
        Span(0, 6.0, 7.0, "compute", "attention"),
        Span(0, 7.5, 8.0, "comm", "all-reduce", "c0"),
        Span(0, 8.0, 8.5, "setup", "weights"),
        Span(1, 0.0, 8.0, "phase", "warm-up"),
        Span(1, 0.0, 3.0, "compile", "gemm", "k1"),
        Span(1, 3.0, 3.5, "load", "gemm", "k2"),
        Span(1, 3.5, 7.5, "wait", "all-reduce", "c0"),
        Span(1, 7.5, 8.0, "comm", "all-reduce", "c0"),
        Span(1, 8.0, 10.0, "compile", "gemm", "k3"),
    ),
)
WARM = Timeline(
    policy="warm",
    source="predicted",
    world_size=2,
    spans=(Span(0, 0.0, 3.0, "load", "gemm", "k1"), Span(1, 0.0, 3.8, "compile", "gemm", "[k2]")),
)


def text_of(renderable):
    out = StringIO()
    Console(width=100, force_terminal=False, file=out).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


GOLDEN_TIMELINE = """\
cold (predicted): wall 10.00 s, seconds by rank

  rank  compile  load  compute  comm  wait  setup  total  kernels
 ─────────────────────────────────────────────────────────────────
     0     6.00  0.00     1.00  0.50  0.00   0.50   8.50        2
     1     5.00  0.50     0.00  0.50  4.00   0.00  10.00        2
"""

GOLDEN_POLICIES = """\
Policies

                              kernels            dupli-  compile  last     vs
  policy  source     wall s  compiled  distinct   cates    sum s  rank  first
 ─────────────────────────────────────────────────────────────────────────────
  cold    predicted   10.00         4         3       1    11.00     1      -
  warm    predicted    3.80         1         1       0     3.80     1  -62 %
"""

GOLDEN_SUMMARY = """\
cold (predicted)
ends last: rank 1, 10.00 s

  kind     seconds   share
 ──────────────────────────
  compile     5.00  50.0 %
  load        0.50   5.0 %
  compute     0.00   0.0 %
  comm        0.50   5.0 %
  wait        4.00  40.0 %
  setup       0.00   0.0 %
  other       0.00   0.0 %
"""

GOLDEN_BARS = """\
rank 0 |############==_~-   |    8.50 s
rank 1 |######o........~####|   10.00 s
# compile  o load  = compute  ~ comm  . wait  - setup  _ idle  (1 column = 0.5 s)"""


def test_timeline_table_output():
    assert text_of(timeline_table(COLD)) == GOLDEN_TIMELINE


def test_policy_table_output():
    assert text_of(policy_table([COLD, WARM])) == GOLDEN_POLICIES


def test_policy_table_of_one_policy_has_no_comparison():
    assert "first" not in text_of(policy_table([COLD]))


def test_policy_table_shows_sign_of_difference():
    slower = Timeline("slower", "measured", 1, (Span(0, 0.0, 10.5, "load", "x"),))
    same = Timeline("same", "measured", 1, (Span(0, 0.0, 9.99, "load", "x"),))
    rows = text_of(policy_table([COLD, slower, same])).splitlines()
    assert rows[-2].endswith(" +5 %")
    assert rows[-1].endswith(" 0 %")


def test_policy_table_has_no_difference_if_first_policy_took_no_time():
    empty = Timeline("empty", "predicted", 1, ())
    assert text_of(policy_table([empty, WARM])).splitlines()[-1].endswith(" -")


def test_square_brackets_in_names_are_printed_literally():
    timeline = Timeline("[bold]x", "predicted", 1, ())
    assert "[bold]x" in text_of(policy_table([timeline]))
    assert "[bold]x" in text_of(timeline_table(timeline))


def test_phase_summary_output():
    assert text_of(phase_summary(COLD)) == GOLDEN_SUMMARY


def test_phase_summary_counts_parallel_compiles_once():
    spans = (Span(0, 0.0, 4.0, "compile", "a", "a"), Span(0, 1.0, 5.0, "compile", "b", "b"))
    table = text_of(phase_summary(Timeline("parallel", "measured", 1, spans)))
    assert "5.00  100.0 %" in table


def test_phase_summary_of_empty_timeline():
    assert text_of(phase_summary(Timeline("empty", "predicted", 1, ()))).count("0.00      -") == 7


def test_rank_bars_output():
    assert text_of(rank_bars(COLD, 10.0, width=20)) == GOLDEN_BARS


def test_rank_bars_on_a_common_scale():
    lines = text_of(rank_bars(WARM, 10.0, width=20)).splitlines()
    assert lines[:2] == [
        "rank 0 |oooooo              |    3.00 s",
        "rank 1 |########            |    3.80 s",
    ]


def test_rank_bars_cells_show_the_dominant_kind():
    spans = (
        Span(0, 0.0, 0.6, "compute", "a"),
        Span(0, 0.6, 1.4, "comm", "b"),
        Span(0, 1.9, 2.0, "load", "c"),
    )
    assert str(rank_bars(Timeline("p", "measured", 1, spans), 2.0, width=2)).startswith(
        "rank 0 |=_|"
    )


def test_rank_bars_use_different_colours():
    styles = {str(span.style) for span in rank_bars(COLD, 10.0).spans}
    assert {"bold red", "yellow", "green", "cyan"} <= styles


def test_rank_bars_of_empty_timeline():
    line = text_of(rank_bars(Timeline("empty", "predicted", 1, ()), 0.0, width=3)).splitlines()[0]
    assert line == "rank 0 |   |    0.00 s"


def test_busy_segments_are_exclusive():
    spans = [
        Span(0, 0.0, 9.0, "phase", "p"),
        Span(0, 0.0, 4.0, "comm", "c"),
        Span(0, 1.0, 2.0, "compile", "a"),
        Span(0, 1.5, 3.0, "compile", "b"),
        Span(0, 5.0, 5.0, "load", "l"),
    ]
    expected = [(0.0, 1.0, "comm"), (1.0, 3.0, "compile"), (3.0, 4.0, "comm")]
    assert busy_segments(spans) == expected


def test_critical_rank_is_the_lowest_that_finishes_last():
    assert critical_rank(COLD).rank == 1
    spans = tuple(Span(rank, 0.0, 1.0, "load", "x") for rank in range(3))
    assert critical_rank(Timeline("tie", "measured", 3, spans)).rank == 0


seconds = st.floats(0, 1e6)


@given(st.lists(st.builds(lambda *at: at, seconds, seconds, st.sampled_from(KINDS)), max_size=12))
@settings(deadline=None)
def test_terminal_reports_accept_arbitrary_spans(items):
    spans = tuple(Span(0, start, start + length, kind, "x") for start, length, kind in items)
    timeline = Timeline("any", "predicted", 1, spans)
    segments = busy_segments(spans)
    assert sum(end - start for start, end, _ in segments) <= timeline.wall * (1 + 1e-9)
    assert all(a[1] <= b[0] for a, b in pairwise(segments))
    assert all(text_of(table(timeline)) for table in (timeline_table, phase_summary))
    line = str(rank_bars(timeline, timeline.wall, width=20)).splitlines()[0]
    assert line.index("|", 8) == 28
