"""Timelines: phases, when the server is up, and Timeline files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from runner.timeline import FIRST_REQUEST, Span, Timeline, read_timelines, write_timelines


def timeline(*spans: Span, world_size: int = 2, **meta: Any) -> Timeline:
    return Timeline("none", "measured", world_size, spans, meta)


RUN = timeline(
    Span(0, 0.0, 1.0, "phase", "warm-up"),
    Span(0, 1.0, 4.0, "phase", FIRST_REQUEST),
    Span(0, 1.0, 3.0, "compile", "gemm", "gemm 1"),
    Span(0, 4.0, 9.0, "phase", "requests"),
    Span(1, 0.0, 2.0, "phase", "warm-up"),
    Span(1, 2.0, 5.5, "phase", FIRST_REQUEST),
    Span(1, 5.5, 8.0, "phase", "requests"),
)


def test_phase_ends_when_its_last_rank_leaves_it() -> None:
    assert RUN.end_of("warm-up") == 2.0
    assert RUN.end_of("requests") == 9.0
    assert RUN.end_of("graph capture") is None
    # A span of work is not a phase, whatever its name.
    assert RUN.end_of("gemm") is None


def test_server_is_up_when_the_first_request_is_answered() -> None:
    assert (RUN.up, RUN.wall) == (5.5, 9.0)


def test_up_equals_wall_without_a_first_request() -> None:
    assert timeline(Span(0, 0.0, 3.0, "compute", "x")).up == 3.0
    assert timeline().up == timeline().wall == 0.0


def test_phase_length_is_that_of_the_slowest_rank() -> None:
    assert RUN.phases() == {"warm-up": 2.0, FIRST_REQUEST: 3.5, "requests": 5.0}


def test_file_holds_several_timelines(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    other = timeline(Span(0, 0.1234564, 0.5, "compute", "x"), world_size=1, stalls=[[0, "a", 0]])
    write_timelines(path, [RUN, other])
    back = read_timelines(path)
    assert back[0] == RUN
    assert back[1].meta == other.meta
    assert back[1].spans == (Span(0, 0.123456, 0.5, "compute", "x"),)


def broken(**changes: Any) -> str:
    data = {**RUN.to_json(), **changes}
    return json.dumps({"timelines": [data]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param("[" * 200_000, id="deep"),
        "{}",
        "[]",
        '{"timelines": [{}]}',
        broken(spans=[[2, 0, 1, "phase", "warm-up", ""]]),
        broken(spans=[[-1, 0, 1, "phase", "warm-up", ""]]),
        broken(spans=[[0, 0, 1, "nap", "warm-up", ""]]),
        broken(spans=[[0, 2, 1, "phase", "warm-up", ""]]),
        broken(spans=[[0, 1]]),
        broken(spans=[[0, float("nan"), 1, "phase", "warm-up", ""]]),
        broken(spans=[[0, 0, float("nan"), "phase", "warm-up", ""]]),
        broken(spans=[[0, 0, float("inf"), "phase", "warm-up", ""]]),
        broken(spans=[[float("inf"), 0, 1, "phase", "warm-up", ""]]),
        broken(spans=[[0, 0, 1, "phase", None, ""]]),
        broken(spans=[[0, 0, 1, "compile", "gemm", 3]]),
        broken(world_size="many"),
        broken(world_size=0, spans=[]),
        broken(world_size=-1, spans=[]),
        broken(version=2),
    ],
)
def test_invalid_timeline_file_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is not a Timeline file: ") as caught:
        read_timelines(path)
    assert "\n" not in str(caught.value)


def test_missing_timeline_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_timelines(tmp_path / "none.json")
    assert str(caught.value) == f"cannot read {tmp_path / 'none.json'}: No such file or directory"
