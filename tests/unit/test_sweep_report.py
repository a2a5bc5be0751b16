"""Reports of a sweep: table, JSON and plot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from runner.config.warmup import WarmupPolicy
from runner.report.sweep_plot import plot_sweep
from runner.report.sweep_table import print_sweep, shown_results, skipped_lines, sweep_json
from sim.sweep.points import Skipped, Sweep
from tests.unit.sweeps import SETTINGS, point, result

SMALL = Sweep(
    settings=SETTINGS,
    results=(
        result(1.5, 40, point("pp-parallel", cores=128)),
        result(2.25, 100, point("planned", ep=True), planned=100, duplicates=0),
        result(2.25, 1999, point("none"), planned=2000),
        result(
            12900.0, 40, point("none", pp=1, nodes=1), timeout_seconds=612.3, cpu_seconds=54321.5
        ),
    ),
    skipped=(
        Skipped(point(tp=3), "tp=3 is odd"),
        Skipped(point(tp=5), "tp=5 is odd"),
        Skipped(point("planned", tp=5), "tp=5 is odd"),
    ),
)

TABLE = """\
a model, 3 layers, a machine, link a link; cold caches, forwards of up to 128 tokens
requests of batch sizes 1,64; points: 4 simulated, 3 skipped

                                     start-up   kernels cover-  com- dupli- compile time-
   policy      pp tp  ep nodes cores        s   present   ed % piled  cates   CPU s out s
 ────────────────────────────────────────────────────────────────────────────────────────
 * pp-parallel  4  2 off     4   128     1.50    40/100   40.0     8      4    12.5     -
 * planned      4  2  on     4    16     2.25   100/100  100.0     8      0    12.5     -
   none         4  2 off     4    16     2.25 1999/2000   99.9     8      4    12.5     -
   none         1  2 off     1    16 12900.00    40/100   40.0     8      4 54321.5   612

* frontier: no other point starts as fast and covers as much, or better
time-out: the watchdog ends 1 of these runs; none is on the frontier
skipped 2: tp=5 is odd
skipped 1: tp=3 is odd
"""


def printed(sweep: Sweep, capsys: pytest.CaptureFixture[str], *, show_all: bool = False) -> str:
    print_sweep(sweep, show_all=show_all)
    return "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())


def test_sweep_table_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(SMALL, capsys) == TABLE


def test_longest_row_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    longest = max((policy.value for policy in WarmupPolicy), key=len)
    at = point(longest, pp=16, tp=16, nodes=256, cores=192)
    wide = result(
        98765.4,
        9998,
        at,
        planned=9999,
        kernels_compiled=99999,
        duplicates=99999,
        cpu_seconds=999999.9,
        timeout_seconds=12345.0,
    )
    out = printed(replace(SMALL, results=(wide,)), capsys)
    assert "…" not in out and max(map(len, out.splitlines())) <= 100
    assert "98765.40 9998/9999   99.9 99999  99999 999999.9 12345" in out


LONG = replace(
    SMALL,
    skipped=(),
    results=(
        *(result(100.0 + at, 1, point(cores=at)) for at in range(1, 26)),
        result(500.0, 100, point("planned")),
        result(501.0, 100, point("planned", cores=8)),
    ),
)


def test_table_shows_the_frontier_and_the_20_fastest_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [item.up_seconds for item in shown_results(LONG)] == [
        *(100.0 + at for at in range(1, 22)),
        500.0,
    ]
    out = printed(LONG, capsys)
    assert out.count("\n * ") == 2
    assert "\nslower points not shown: 5; --all shows them\n" in out


def test_show_all_shows_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(LONG, capsys, show_all=True)
    assert [line.split()[7 if "*" in line else 6] for line in out.splitlines()[6:-2]] == [
        f"{item.up_seconds:.2f}" for item in LONG.results
    ]
    assert "not shown" not in out


def test_stopped_sweep_counts_points_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = replace(SMALL, results=(), skipped=(), unfinished=(point(),))
    assert printed(stopped, capsys).splitlines()[1:] == [
        "requests of batch sizes 1,64; points: 0 simulated, 1 not reached"
    ]


def test_at_most_20_skip_reasons_are_listed() -> None:
    skipped = tuple(Skipped(point(tp=tp), f"tp={tp} is odd") for tp in range(1, 51, 2))
    lines = skipped_lines(replace(SMALL, skipped=skipped))
    assert lines[:2] == ["skipped 1: tp=1 is odd", "skipped 1: tp=3 is odd"]
    assert lines[20:] == ["other reasons: 5, all in the JSON"]


def test_json_has_every_point_skipped_or_unfinished_ones_included() -> None:
    data = json.loads(json.dumps(sweep_json(replace(SMALL, unfinished=(point(cores=1),)))))
    assert set(data) == {"version", "settings", "points", "skipped", "unfinished"}
    assert (data["version"], data["settings"]) == (1, SETTINGS)
    assert [item["frontier"] for item in data["points"]] == [True, True, False, False]
    assert data["points"][1] == {
        "policy": "planned",
        "pp": 4,
        "tp": 2,
        "ep": True,
        "nodes": 4,
        "cores": 16,
        "frontier": True,
        "up_seconds": 2.25,
        "kernels_present": 100,
        "kernels_planned": 100,
        "coverage": 1.0,
        "kernels_compiled": 8,
        "duplicates": 0,
        "compile_cpu_seconds": 12.5,
        "timeout_seconds": None,
    }
    assert data["points"][3]["timeout_seconds"] == 612.3
    assert data["skipped"][0] == {
        "policy": "none",
        "pp": 4,
        "tp": 3,
        "ep": False,
        "nodes": 4,
        "cores": 16,
        "reason": "tp=3 is odd",
    }
    assert [item["reason"] for item in data["skipped"][1:]] == ["tp=5 is odd"] * 2
    assert data["unfinished"] == [
        {"policy": "none", "pp": 4, "tp": 2, "ep": False, "nodes": 4, "cores": 1}
    ]


# -- plot -----------------------------------------------------------------------------------------


def svg_of(sweep: Sweep, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plot as SVG with text elements instead of glyph paths."""
    mpl = pytest.importorskip("matplotlib")
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    plot_sweep(path, sweep)
    return path.read_text()


def test_frontier_points_are_labelled_with_the_settings_that_vary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = svg_of(SMALL, tmp_path / "x.svg", monkeypatch)
    labels = re.findall(r">(pp \d[^<]*)<", text)
    assert sorted(labels) == ["pp 4, nodes 4, cores 128", "pp 4, nodes 4, cores 16, ep"]
    assert ">a model, 3 layers, a machine; tp 2<" in text
    assert ">hollow: ended by the watchdog<" in text
    for policy in WarmupPolicy:
        assert (f">{policy.value}<" in text) is (policy.value in {"none", "pp-parallel", "planned"})


def test_plot_accepts_single_points_timeouts_and_dollar_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "model": "$x^"}
    alone = Sweep(settings=settings, results=(result(5.0, 0, planned=0),), skipped=())
    assert ">frontier<" in svg_of(alone, tmp_path / "1.svg", monkeypatch)
    lost = replace(alone, results=(result(900.0, 1, timeout_seconds=600.0),))
    assert ">frontier<" not in svg_of(lost, tmp_path / "2.svg", monkeypatch)
