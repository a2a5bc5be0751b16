"""Report files: Chrome traces and Gantt charts."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import UserError
from runner.report.chrome import chrome_trace
from runner.report.gantt import plot_gantt
from runner.timeline import KINDS, Span, Timeline

COLD = Timeline(
    policy="cold",
    source="predicted",
    world_size=2,
    spans=(
        Span(0, 0.0, 4.0, "phase", "warm-up"),
        Span(0, 0.0, 4.0, "compile", "gemm", "k1"),
        Span(0, 7.5, 8.0, "comm", "all-reduce", "c0"),
        Span(1, 3.5, 7.5, "wait", "all-reduce", "c0"),
    ),
    meta={"ranks": [{"pp_rank": 0, "tp_rank": rank, "node": 0} for rank in range(2)]},
)
WARM = Timeline("warm", "predicted", 2, (Span(0, 0.0, 3.0, "load", "gemm", "k1"),))


def test_chrome_trace_names_and_events():
    events = chrome_trace([COLD, WARM])["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] in ("process_name", "thread_name")]
    assert names == [
        "cold (predicted)",
        "rank 0 (stage 0, tp 0)",
        "rank 1 (stage 0, tp 1)",
        "warm (predicted)",
        "rank 0",
        "rank 1",
    ]
    complete = [e for e in events if e["ph"] == "X"]
    assert complete[1] == {
        "ph": "X",
        "name": "gemm",
        "cat": "compile",
        "pid": 1,
        "tid": 1_000_000,
        "ts": 0.0,
        "dur": 4e6,
        "args": {"key": "k1"},
    }
    assert complete[0]["cat"] == "phase"


def test_chrome_trace_puts_overlapping_spans_on_separate_threads():
    spans = (Span(0, 0.0, 4.0, "compile", "a", "a"), Span(0, 1.0, 5.0, "compile", "b", "b"))
    events = chrome_trace([Timeline("parallel", "measured", 1, spans)])["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["rank 0", "rank 0 #2"]
    assert len({e["tid"] for e in events if e["ph"] == "X"}) == 2


seconds = st.floats(0, 1e6)
names = st.text('kü$[]" ', max_size=5)


@st.composite
def timelines(draw):
    world_size = draw(st.integers(1, 4))
    span = st.builds(
        lambda rank, start, length, kind, name, key: Span(
            rank, start, start + length, kind, name, key
        ),
        st.integers(0, world_size - 1),
        seconds,
        seconds,
        st.sampled_from(KINDS),
        names,
        names,
    )
    spans = draw(st.lists(span, max_size=12))
    spans.sort(key=lambda span: (span.rank, span.start))
    return Timeline(draw(names), "predicted", world_size, tuple(spans))


@given(st.lists(timelines(), max_size=3))
@settings(deadline=None)
def test_chrome_trace_has_every_span_and_nests_correctly(several):
    trace = json.loads(json.dumps(chrome_trace(several), allow_nan=False))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == sum(len(timeline.spans) for timeline in several)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in complete)
    threads = {}
    for event in complete:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for events in threads.values():
        assert_nested([(round(e["ts"] * 1000), round(e["dur"] * 1000)) for e in events])


def assert_nested(events):
    ends = []
    for start, length in events:
        while ends and ends[-1] <= start:
            ends.pop()
        assert not ends or start + length <= ends[-1]
        ends.append(start + length)


def test_plot_gantt_writes_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.PNG"
    plot_gantt(path, [COLD, WARM])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_gantt_svg_is_deterministic(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    plot_gantt(first, [COLD, WARM])
    plot_gantt(second, [COLD, WARM])
    assert "<svg" in first.read_text()
    assert "<dc:date>" not in first.read_text()
    assert first.read_bytes() == second.read_bytes()


def test_plot_gantt_accepts_dollar_signs_and_empty_timelines(tmp_path):
    pytest.importorskip("matplotlib")
    plot_gantt(tmp_path / "chart.svg", [Timeline("$x^", "predicted", 1, ())])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chart.pdf", r"suffix must be one of \.png, \.svg"),
        ("chart", r"suffix must be one of \.png, \.svg"),
        ("missing/chart.png", r"cannot write .*: No such file"),
    ],
)
def test_plot_gantt_refuses_bad_paths(tmp_path, name, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=message):
        plot_gantt(tmp_path / name, [COLD])


def test_plot_gantt_without_matplotlib_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'deepgemm-coldstart\[plot\]'"):
        plot_gantt(tmp_path / "chart.png", [COLD])
