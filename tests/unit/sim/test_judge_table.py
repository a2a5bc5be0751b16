"""Predictions against measurements as shown."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from runner.report.validation_table import judged_json, judged_table
from runner.timeline import Span, Timeline
from sim.calibration.validation import Judged
from sim.simulate import Prediction


def timeline(source: str, wall: float, kernels: str) -> Timeline:
    """A run whose first request is answered after half its time; a kernel a letter."""
    spans = tuple(Span(0, 0.0, wall / 4, "compile", "gemm", key) for key in kernels)
    phases = (
        Span(0, 0.0, wall / 2, "phase", "first request"),
        Span(0, wall / 2, wall, "phase", "requests"),
    )
    meta = {"model": "a-model", "layers": 3, "pp": 4, "tp": 2, "nodes": 1, "compile_lock": False}
    return Timeline("none", source, 1, (*spans, *phases), meta)


def judged() -> list[Judged]:
    one = Judged(
        timeline("measured", 100.0, "abcaa"), Prediction(timeline("predicted", 90.04, "abca"), None)
    )
    run = replace(
        timeline("measured", 4.0, "ab"),
        policy="planned",
        meta={**one.measured.meta, "nodes": 4, "compile_lock": True},
    )
    return [one, Judged(run, Prediction(timeline("predicted", 5.0, "ab"), None))]


def test_a_table_has_a_run_a_row() -> None:
    out = StringIO()
    console = Console(width=140, force_terminal=False, file=out)
    console.print(judged_table(judged(), "Predicted with x"))
    rows = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "Predicted with x" in rows
    assert "a-model 3 layers, pp 4 tp 2, none 100.0 90.0 -10.0 % 5 4 2 1" in rows
    assert "a-model 3 layers, pp 4 tp 2, 4 nodes, locked, planned 4.0 5.0 +25.0 % 2 2 0 0" in rows


def test_it_fits_where_the_commands_print_it() -> None:
    out = StringIO()
    Console(width=100, force_terminal=False, file=out).print(judged_table(judged(), "x"))
    assert "…" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100


def test_the_same_as_plain_data() -> None:
    data = judged_json(judged(), "h200")
    assert (data["version"], data["hardware"]) == (1, "h200")
    assert data["runs"][0] == {
        "run": "a-model 3 layers, pp 4 tp 2, none",
        "measured": {
            "wall_seconds": 100.0,
            "up_seconds": 50.0,
            "kernels_compiled": 5,
            "duplicates": 2,
            "phases": {"first request": 50.0, "requests": 50.0},
        },
        "predicted": {
            "wall_seconds": 90.04,
            "up_seconds": 45.02,
            "kernels_compiled": 4,
            "duplicates": 1,
            "phases": {"first request": 45.02, "requests": 45.02},
        },
        "error": -0.0996,
    }
    assert data["runs"][1]["error"] == 0.25
