"""``runner overlap``: options, printed tables and written files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cli import cli
from runner.errors import run_guarded
from runner.model.strategy import STRATEGIES, load_strategy

Capture = pytest.CaptureFixture[str]
TINY = ["--model", "dsv4-tiny", "--layers", "4", "--tp", "2", "--ep", "--batch", "512"]
COMPARE = [*TINY, "--no-search"]
SETTINGS = {
    "model": "dsv4-tiny",
    "layers": 4,
    "pp": 2,
    "tp": 2,
    "ep": True,
    "stage_layers": [1, 3],
    "stage": 1,
    "mode": "decode",
    "batch": 9,
    "prompt_len": 7,
    "hardware": "h20",
    "link": "gloo",
}
FIGURES = [
    "step_seconds",
    "compute_seconds",
    "communication_seconds",
    "exposed_seconds",
    "idle_share",
    "layers",
]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in ("SGLANG", "SGL"):
        monkeypatch.delenv(f"{prefix}_PP_LAYER_PARTITION", raising=False)


def overlap(*arguments: str | Path) -> int:
    return run_guarded(cli, ["overlap", *map(str, arguments)], program="runner")


def compared(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    """The JSON output, which must be the only text on standard output."""
    assert overlap(*arguments, "--json", "-") == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["version"] == 1
    return data


def names(data: dict[str, Any]) -> list[str]:
    return [run["name"] for run in data["runs"]]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# -- bad input ------------------------------------------------------------------------------------

BAD: list[tuple[list[str], str]] = [
    (["--tp", "1"], "--tp 1 must be at least 2: a single rank never waits"),
    (["--batch", "1"], "Invalid value for '--batch': 1 is not in the range x>=2."),
    (["--prompt-len", "0"], "Invalid value for '--prompt-len': 0 is not in the range x>=1."),
    (["--mode", "prefill"], "Invalid value for '--mode': 'prefill' is not one of"),
    (["--link", "pigeon"], "--link 'pigeon' is not in profile h200: use one of nvlink, ib, gloo"),
    (["--hardware", "abacus"], "hardware 'abacus' is not known: use one of"),
    (["--overlap", "mine"], "overlap strategy 'mine' is not known: use one of deepseek-decode-"),
    (["--overlap", "dsv4-prefill"], "--overlap dsv4-prefill is for extend, not for --mode decode"),
    (
        ["--mode", "extend", "--overlap", "deepseek-decode"],
        "--overlap deepseek-decode is for decode, not for --mode extend",
    ),
    (["--stage", "1"], "--stage 1 must be below --pp 1"),
    (["--pp", "2", "--stage", "2"], "--stage 2 must be below --pp 2"),
    (
        ["--mode", "extend", "--prompt-len", "512"],
        "a batch of 1 sequence cannot be cut in two: give more tokens or shorter prompts",
    ),
    (["--attn-cp", "2"], "--attn-cp 2 must be 1"),
    (["--pp", "0"], "pp=0 must be at least 1"),
    (["--save", "-"], "--save needs a file"),
    (["--measured", "none.json"], "cannot read none.json"),
    (["--measured", "README.md"], "README.md is not a file from launch.steps"),
    (["--json", "one.json", "--save", "one.json"], "one.json is given for two outputs"),
    (["--layers", "99"], "layers=99 of dsv4-tiny must lie in 1..8"),
    (["--tp", "3"], "tp=3 must divide"),
    (["--model", "dsv3", "--layers", "3"], "this stage has no layer with experts"),
    (["--plot", "turns.bmp"], "cannot plot to turns.bmp: suffix must be one of"),
    (["--plot", "-"], "need a file"),
    (["--json", "/no/such/folder"], "cannot write /no/such/folder: its folder does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(one) for one, _ in BAD])
def test_invalid_input_is_a_one_line_error(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    assert overlap(*COMPARE, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_conflicting_output_options_are_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "best.toml"
    assert overlap(*COMPARE, "--save", path) == 2
    no_search = "--save writes the search's result: it does not go with --no-search"
    assert capsys.readouterr() == ("", f"error: {no_search}\n") and not path.exists()
    assert overlap(*TINY, "--json", "-", "--save", "-") == 2
    assert capsys.readouterr() == ("", "error: only one output can go to standard output (-)\n")


# -- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["deepseek-decode-before", "deepseek-decode"]),
        (["--mode", "extend", "--prompt-len", "64"], ["deepseek-prefill", "dsv4-prefill"]),
        (["--overlap", "deepseek-decode"] * 2, ["deepseek-decode"]),
    ],
)
def test_no_search_compares_named_strategies_only(
    arguments: list[str], expected: list[str], capsys: Capture
) -> None:
    data = compared(capsys, *COMPARE, *arguments)
    assert names(data) == ["one batch", *expected]
    assert data["runs"][0]["strategy"] is None
    assert [run["strategy"] for run in data["runs"][1:]] == [
        STRATEGIES[name].to_json() for name in expected
    ]
    fastest = min(data["runs"][1:], key=lambda run: run["step_seconds"])
    assert data["reference"] == fastest["name"] and data["placements_searched"] is None
    assert overlap(*COMPARE, *arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in expected)
    assert "best" not in text and "search" not in text


def test_json_holds_the_settings(capsys: Capture) -> None:
    words = "--pp 2 --stage 1 --stage-layers 1,3 --hardware h20 --link gloo --prompt-len 7"
    data = compared(capsys, *COMPARE, *words.split(), "--batch", "9")
    assert (data["first_layer"], data["overlapped_layers"]) == (1, 3)
    assert [*data][: [*data].index("first_layer")] == ["version", *SETTINGS]
    assert {name: data[name] for name in SETTINGS} == SETTINGS


def test_step_time_is_compute_plus_exposed_communication(capsys: Capture) -> None:
    """Communication outside the layers is fully exposed; the layers account for the rest."""
    data = compared(capsys, *COMPARE, "--link", "nvlink")
    for run in data["runs"]:
        assert run["compute_seconds"] + run["exposed_seconds"] == pytest.approx(run["step_seconds"])
        assert run["idle_share"] == pytest.approx(run["exposed_seconds"] / run["step_seconds"])
        assert len(run["layers"]) == data["overlapped_layers"] == 4
        exposed, communicated = (
            sum(layer[name] for layer in run["layers"]) for name in ("exposed", "communication")
        )
        around = run["communication_seconds"] - communicated
        assert around > 0
        assert exposed + around == pytest.approx(run["exposed_seconds"])
        assert 0 < exposed < communicated


def test_per_layer_prints_exposed_communication_of_each_layer(capsys: Capture) -> None:
    data = compared(capsys, *COMPARE)
    assert overlap(*COMPARE, "--per-layer") == 0
    text = capsys.readouterr().out
    rows = words(text.partition("Each layer's exposed communication, ms")[2])
    layers = [row for row in rows if row and row[0].isdigit()]
    assert layers == [
        [str(index), *(f"{1e3 * run['layers'][index]['exposed']:.2f}" for run in data["runs"])]
        for index in range(4)
    ]
    assert overlap(*COMPARE) == 0
    assert "Each layer's" not in capsys.readouterr().out


# -- files that are written -----------------------------------------------------------------------


def test_saved_best_strategy_gives_the_same_figures_when_loaded(
    tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "mine.toml"
    data = compared(capsys, *TINY, "--save", path)
    *others, best = data["runs"]
    assert names(data) == ["one batch", "deepseek-decode-before", "deepseek-decode", "best of all"]
    assert data["placements_searched"] == 917_497
    assert all(best["exposed_seconds"] <= run["exposed_seconds"] for run in others[1:])
    assert load_strategy(str(path)).to_json() == {**best["strategy"], "name": "mine"}
    again = compared(capsys, *COMPARE, "--overlap", path)
    assert names(again) == ["one batch", "mine"] and again["reference"] == "mine"
    for figure in FIGURES:
        assert again["runs"][1][figure] == best[figure]
        assert again["runs"][0][figure] == others[0][figure]


def test_search_prints_the_best_strategy_and_written_paths(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is limited to one order, that of the named strategy."""
    monkeypatch.setattr(
        "sim.overlap.search.legal_orders", lambda: iter([STRATEGIES["deepseek-decode"].operations])
    )
    made, saved = tmp_path / "made.json", tmp_path / "best.toml"
    options = ("--overlap", "deepseek-decode", "--json", made, "--save", saved)
    assert overlap(*TINY, *options) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"wrote {made}\nwrote {saved}\n")
    data = json.loads(made.read_text())
    rows = {row[0]: row for row in words(text) if row}
    best = data["runs"][-1]
    assert rows["best"][3] == f"{1e3 * best['step_seconds']:.2f}"
    assert rows["best"][-1] == f"{100 * best['idle_share']:.1f}"
    assert f"search: all {data['placements_searched']:,} placements decided: the best waits" in text
    assert f"ahead: {load_strategy(str(saved)).describe()}\n" in text
    assert "Why: what the GPU waits for, deepseek-decode against the best" in text


def test_plot_is_reproducible(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    assert overlap(*COMPARE, "--plot", one) == 0
    assert capsys.readouterr().out.endswith(f"wrote {one}\n")
    # ``compared`` checks that --plot prints nothing beside the JSON.
    compared(capsys, *COMPARE, "--plot", two)
    text = one.read_bytes()
    assert text == two.read_bytes() and text.startswith(b"<?xml") and b"</svg>" in text


def test_delta_stages_above_the_number_of_stages_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    far = tmp_path / "far.toml"
    far.write_text(replace(STRATEGIES["deepseek-decode"], delta_stages=50).to_toml())
    assert overlap(*TINY, "--no-search", "--overlap", far) == 2
    assert capsys.readouterr().err == (
        "error: strategy far: delta_stages = 50 must be at most 21, the stages of the layers that "
        "overlap\n"
    )


def test_two_strategies_with_one_name_are_refused(tmp_path: Path, capsys: Capture) -> None:
    paths = [tmp_path / name / "mine.toml" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(STRATEGIES["deepseek-decode"].to_toml())
    assert overlap(*TINY, *(word for path in paths for word in ("--overlap", path))) == 2
    assert "two strategies are called mine: rename one of the files" in capsys.readouterr().err


def test_numpy_is_required_by_the_search_only(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.overlap.find_spec", lambda name: None)
    assert overlap(*TINY) == 2
    assert capsys.readouterr().err == (
        "error: the search for the best placement needs numpy: pip install "
        "'deepgemm-coldstart[search]', or give --no-search\n"
    )
    monkeypatch.setitem(sys.modules, "sim.overlap.search", None)
    assert overlap(*TINY, "--no-search") == 0
