"""Published figures: the shipped rows, what is taken of predictions, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cli import cli
from runner.cli.published import compare_row, options_of
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError, run_guarded
from runner.kernels.rules import RULES
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import make_plan
from runner.timeline import Span, Timeline
from sim.costs.profile import load_profile, shipped_profiles
from sim.published import (
    Compared,
    Figure,
    Row,
    SetUp,
    deviation,
    figure_of,
    read_published,
    summary,
    walk_cases,
)
from sim.simulate import Prediction

ROWS = read_published().rows
SIMULATED = [row for row in ROWS if row.set_up is not None]


@pytest.mark.parametrize(
    ("predicted", "low", "high", "expected"),
    [
        (75.0, 100.0, 200.0, -0.25),
        (100.0, 100.0, 200.0, 0.0),
        (150.0, 100.0, 200.0, 0.0),
        (200.0, 100.0, 200.0, 0.0),
        (250.0, 100.0, 200.0, 0.25),
        (1.0, None, 200.0, 0.0),
        (300.0, None, 200.0, 0.5),
        (50.0, 100.0, None, -0.5),
        (1e9, 100.0, None, 0.0),
        (90.0, 60.0, 60.0, 0.5),
    ],
)
def test_deviation_is_from_the_nearer_end(
    predicted: float, low: float | None, high: float | None, expected: float
) -> None:
    assert deviation(predicted, low, high) == expected


def prediction(*spans: Span) -> Prediction:
    return Prediction(Timeline("full", "predicted", 2, spans), None, longest_wait=7.5)


RUN = prediction(
    Span(0, 0.0, 10.0, "phase", "weights"),
    Span(0, 10.0, 11.0, "load", "a kernel"),
    Span(0, 12.0, 15.0, "compile", "metadata", "k1"),
    Span(0, 16.0, 17.0, "load", "walk a"),
    Span(0, 17.0, 20.0, "compile", "gemm", "k2"),
    Span(0, 20.0, 24.0, "load", "walk a"),
    Span(0, 24.0, 26.0, "compile", "einsum", "k3"),
    Span(0, 10.0, 30.0, "phase", "first request"),
    Span(0, 30.0, 40.0, "phase", "requests"),
    Span(0, 31.0, 33.0, "load", "walk b"),
    Span(1, 10.0, 30.5, "phase", "first request"),
    Span(1, 10.0, 29.0, "load", "walk a"),
)


def test_a_walk_is_of_rank_0_from_its_first_compile_to_its_last_call_until_it_is_up() -> None:
    assert figure_of(Figure.WALK, RUN) == 24.0 - 12.0


def test_a_walk_may_begin_before_any_compile() -> None:
    run = prediction(
        Span(0, 2.0, 3.0, "load", "walk a"),
        Span(0, 3.0, 4.5, "compile", "gemm", "k"),
        Span(0, 4.5, 5.0, "load", "walk a"),
        Span(0, 0.0, 6.0, "phase", "first request"),
    )
    assert figure_of(Figure.WALK, run) == 3.0


def test_the_start_up_ends_with_the_first_answer_on_every_rank() -> None:
    assert figure_of(Figure.START_UP, RUN) == 30.5


def test_the_longest_wait() -> None:
    assert figure_of(Figure.LONGEST_WAIT, RUN) == 7.5


def test_what_walks_nothing_has_no_walk() -> None:
    with pytest.raises(UserError, match="full walks nothing on rank 0"):
        figure_of(Figure.WALK, prediction(Span(0, 0.0, 1.0, "compile", "gemm", "k")))


def test_the_shipped_rows_are_complete() -> None:
    assert len(ROWS) == 31
    for row in ROWS:
        assert row.source.startswith("https://github.com/")
        assert min(map(len, (row.what, row.reported, row.stated))) > 0
        assert bool(row.why_not) == (row.set_up is None)
        assert "\n" not in row.why_not
        assert bool(row.assumed) == (row.set_up is not None)


@pytest.mark.parametrize("row", SIMULATED, ids=lambda row: row.id)
def test_every_set_up_is_taken_by_its_command(row: Row) -> None:
    assert row.set_up is not None
    assert row.set_up.hardware in shipped_profiles()
    values = options_of(row.set_up).params
    assert values["hardware"] == row.set_up.hardware
    if row.set_up.command == "plan":
        assert values["num_sms"] == (load_profile(row.set_up.hardware).num_sms,)
    else:
        assert len(values["policies"]) == 1
        assert WarmupPolicy(values["policies"][0]) in WarmupPolicy
        assert values["cores"] > 0, "given, since no thread states it"
        assert values["max_tokens"] == row.set_up.options["max-tokens"]


def test_one_profile_for_each_type_of_gpu() -> None:
    used = {row.set_up.hardware for row in SIMULATED if row.set_up is not None}
    assert used == {"h20", "h100", "h200"}


def test_options_become_arguments() -> None:
    options = {"model": "dsv4", "ep": True, "batch-sizes": [1, 64], "gemm": ["a:1:2", "b:3:4"]}
    set_up = SetUp("sim", "h20", options, {"SOME": "thing"})
    assert set_up.line == (
        "SOME=thing runner sim --hardware h20 --library sgl-deep-gemm==0.1.4.post1 --model dsv4 "
        "--ep --batch-sizes 1,64 --gemm a:1:2 --gemm b:3:4"
    )


def test_threads_by_repository_and_number() -> None:
    names = {row.id: row.thread for row in ROWS}
    assert names["sglang-26567-serial"] == "sglang#26567"
    assert names["deepgemm-302"] == "DeepGEMM#302"
    assert names["sglang-28271-sharded"] == "bytedance-iaas/sglang#575"


def test_vllms_cases_as_reported() -> None:
    [row] = [row for row in ROWS if row.id == "vllm-53320-cases"]
    assert compare_row(row) == Compared(row, 1346, estimate=True)
    specs = ("gemm_nt_f8f8bf16:5120:2048", "gemm_nt_f8f8bf16:2048:4096")
    demands = [gemm_demands(spec, max_m=16384, num_sms=132)[0] for spec in specs]
    assert walk_cases(make_plan(demands, RULES)) == 797, "of two other rows"


def row_of(figure: Figure, low: float | None, high: float | None) -> Row:
    texts = dict.fromkeys(("id", "source", "what", "reported", "stated"), "text")
    return Row(**texts, figure=figure, low=low, high=high)


def test_a_summary_has_deviations_of_seconds_and_counts_all_rows() -> None:
    compared = [
        Compared(row_of(Figure.WALK, 100, 100), 150, estimate=False),
        Compared(row_of(Figure.START_UP, 100, 200), 80, estimate=True),
        Compared(row_of(Figure.COMPILES, None, 10), 5, estimate=True),
        Compared(row_of(Figure.CASES, 10, 10), 40, estimate=True),
    ]
    found = summary(compared)
    assert (found.rows, found.within, found.in_seconds) == (4, 1, 3)
    assert found.median == pytest.approx(0.2)
    assert found.worst == pytest.approx(0.5)
    assert found.line == (
        "3 rows in seconds: median absolute deviation 20.0%, worst 50.0%; "
        "1 of 4 rows within the reported range"
    )
    assert summary(compared[3:]).line == "0 of 1 rows within the reported range"


TINY: dict[str, Any] = {
    "id": "tiny",
    "source": "https://github.com/someone/something/issues/7",
    "what": "start",
    "reported": "2 min",
    "stated": "nothing",
    "figure": "start-up",
    "low": 100,
    "high": 120.5,
    "assumed": ["everything"],
    "set_up": {
        "command": "sim",
        "hardware": "h20",
        "options": {
            "model": "dsv4-tiny",
            "pp": 1,
            "tp": 1,
            "warmup": "none",
            "batch-sizes": [1],
            "skip-phase": ["imports", "process-group", "weights"],
        },
    },
}
LEFT: dict[str, Any] = {
    **{key: TINY[key] for key in ("source", "what", "reported", "stated")},
    "id": "left",
    "why_not": "no reason",
}


def file_of(folder: Path, *rows: Any, **others: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps({"rows": rows, **others}))
    return path


def test_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "rows have an environment of their own")
    path = file_of(tmp_path, TINY, LEFT, assumed_everywhere=["weather"])
    assert run_guarded(cli, ["published", str(path), "--json", "-"], program="runner") == 0
    data = json.loads(capsys.readouterr().out)
    predicted = data["rows"][0].pop("predicted")
    assert 0 < predicted < 100
    error = predicted / 100 - 1
    assert data["rows"][0].pop("deviation") == pytest.approx(error, abs=1e-4)
    assert data["summary"].pop("median_deviation") == pytest.approx(-error, abs=1e-4)
    assert data["summary"].pop("worst_deviation") == pytest.approx(-error, abs=1e-4)
    texts = {key: TINY[key] for key in ("source", "what", "reported", "stated")}
    assert data == {
        "version": 1,
        "assumed_everywhere": ["weather"],
        "rows": [
            {
                **texts,
                "id": "tiny",
                "low": 100.0,
                "high": 120.5,
                "figure": "start-up",
                "unit": "s",
                "watchdog_ends_it": False,
                "hardware": "h20",
                "estimate": True,
                "assumed": ["everything"],
                "command": "runner sim --hardware h20 --library sgl-deep-gemm==0.1.4.post1 "
                "--model dsv4-tiny --pp 1 --tp 1 --warmup none"
                " --batch-sizes 1 --skip-phase imports --skip-phase process-group"
                " --skip-phase weights",
            }
        ],
        "not_simulated": [{**texts, "id": "left", "why_not": "no reason"}],
        "summary": {"rows": 1, "within_range": 0, "rows_in_seconds": 1},
    }


def test_brief_leaves_the_assumed_inputs_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path, TINY, LEFT)
    assert run_guarded(cli, ["published", str(path)], program="runner") == 0
    assert "assumed: everything" in capsys.readouterr().out
    assert run_guarded(cli, ["published", str(path), "--brief"], program="runner") == 0
    out = capsys.readouterr().out
    assert "everything" not in out
    assert "someone/something#7" in out
    assert "h20, estimate" in out
    assert "no reason" in out


def changed(**values: Any) -> dict[str, Any]:
    row = {**TINY, **values}
    return {key: value for key, value in row.items() if value is not ...}


def with_option(**options: Any) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    set_up = TINY["set_up"]
    return changed(set_up={**set_up, "options": {**set_up["options"], **given}})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "row 0: an object is needed, not a list"),
        (changed(what=...), "row tiny: what is missing"),
        (changed(what=3), "row tiny: what is 3, not a str"),
        (changed(colour="red"), "row tiny: colour is not known"),
        (changed(why_not="both"), "row tiny: either set_up or why_not must be there"),
        (changed(set_up=...), "row tiny: either set_up or why_not must be there"),
        (changed(figure="size"), "row tiny: 'size' is not a valid Figure"),
        (changed(figure="cases"), "row tiny: figure cases is of runner plan"),
        (changed(low=None, high=None), "row tiny: low and high are both missing"),
        (changed(low=-1), "row tiny: low is -1: it must be a number above 0"),
        (changed(low=True), "row tiny: low is True: it must be a number above 0"),
        (changed(low=121), "row tiny: low is 121.0 and high 120.5"),
        (changed(assumed="all"), "row tiny: assumed is 'all', not a list"),
        (changed(set_up={"command": "sim"}), "row tiny: options is missing"),
        (with_option(cores=None), "row tiny: option cores is None: no such value can be given"),
        (with_option(gemm=[]), "row tiny: option gemm is []: no such value can be given"),
        (with_option(ep=False), "row tiny: option ep is False: no such value can be given"),
    ],
)
def test_bad_rows_are_told(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_published(file_of(tmp_path, row))
    assert str(caught.value) == f"{tmp_path}/rows.json holds no published figures: {message}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (with_option(colour="red"), "'colour' is no option that a set-up of runner sim has"),
        (with_option(json="-"), "'json' is no option that a set-up of runner sim has"),
        (with_option(help=True), "'help' is no option that a set-up of runner sim has"),
        (with_option(cores="many"), "Invalid value for '--cores': 'many' is not a valid integer."),
        (with_option(pp=99), "pp=99"),
        (with_option(warmup=["none", "full"]), "its set-up has 2 warm-ups: it must have one"),
        (changed(figure="walk"), "none walks nothing on rank 0"),
        (changed(set_up={**TINY["set_up"], "hardware": "h3"}), "hardware 'h3' is not known"),
        (
            changed(set_up={**TINY["set_up"], "environment": {"SGLANG_DEEPGEMM_PDL": "maybe"}}),
            "SGLANG_DEEPGEMM_PDL='maybe' is not a boolean",
        ),
    ],
)
def test_bad_set_ups_are_told(tmp_path: Path, row: Any, message: str) -> None:
    [read] = read_published(file_of(tmp_path, row)).rows
    with pytest.raises(UserError, match=r"^row tiny: ") as caught:
        compare_row(read)
    assert message in str(caught.value)


def test_bad_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file"):
        read_published(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not json")
    with pytest.raises(UserError, match="text holds no published figures: Expecting value"):
        read_published(tmp_path / "text")
    with pytest.raises(UserError, match=r"rows\.json has row tiny more than once"):
        read_published(file_of(tmp_path, TINY, TINY))
