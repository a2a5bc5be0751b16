"""``runner sweep``: options, points and printed output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.cli import cli
from runner.errors import WorkFailedError, run_guarded
from runner.report.picture import SUFFIXES
from sim.sweep.run import Case, simulate_case

NO_START_UP = "--skip-phase imports --skip-phase process-group --skip-phase weights"
Capture = pytest.CaptureFixture[str]
TINY = ["--model", "dsv4-tiny", "--batch-sizes", "1", "--max-tokens", "64", "--jobs", "1"]


def sweep(arguments: str = "") -> int:
    return run_guarded(cli, ["sweep", *TINY, *arguments.split()], program="runner")


def swept(capsys: Capture, arguments: str = "") -> dict[str, Any]:
    assert sweep(f"{arguments} --json -") == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def axes_of(items: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    names = ("policy", "pp", "tp", "ep", "nodes", "cores")
    return {tuple(item[name] for name in names) for item in items}


def test_every_combination_is_simulated_or_skipped_with_a_reason(capsys: Capture) -> None:
    data = swept(capsys, "--pp 1,2 --tp 1,3 --nodes 1,2 --cores 4 --warmup none,planned")
    fits = {
        (policy, pp, 1, False, nodes, 4)
        for policy in ("none", "planned")
        for pp, nodes in ((1, 1), (2, 1), (2, 2))
    }
    assert axes_of(data["points"]) == fits
    assert len(data["points"]) == len(fits)
    odd = "tp=3 must divide num_attention_heads=4 of dsv4-tiny"
    reasons = {(item["pp"], item["tp"], item["nodes"]): item["reason"] for item in data["skipped"]}
    assert reasons == {
        (1, 1, 2): "nodes=2 must divide the 1 ranks of replicas=1 x pp=1 x tp=1",
        (1, 3, 1): odd,
        (1, 3, 2): "nodes=2 must divide the 3 ranks of replicas=1 x pp=1 x tp=3",
        (2, 3, 1): odd,
        (2, 3, 2): odd,
    }
    assert len(data["skipped"]) == 10 and data["unfinished"] == []


def test_point_has_the_figures_that_sim_predicts(capsys: Capture) -> None:
    layout = "--pp 2 --tp 2 --cores 3 --nodes 2 --warmup pp-parallel --ep"
    arguments = ["sim", *TINY[:-2], *layout.split(), "--json", "-"]
    assert run_guarded(cli, arguments, program="runner") == 0
    (predicted,) = json.loads(capsys.readouterr().out)["predictions"]
    (point,) = swept(capsys, f"{layout} on")["points"]
    assert round(point["up_seconds"], 3) == predicted["up_seconds"]
    assert point["kernels_compiled"] == predicted["kernels_compiled"]
    assert point["duplicates"] == predicted["duplicates"]
    assert round(point["compile_cpu_seconds"], 3) == predicted["compile_seconds_summed"]
    assert point["kernels_present"] == min(n["present"] for n in predicted["meta"]["coverage"])


def test_default_axes_and_settings(capsys: Capture) -> None:
    data = swept(capsys)
    assert axes_of(data["points"]) == {
        (policy, 4, 2, False, 4, 16) for policy in ("none", "pp-parallel", "planned")
    }
    assert data["settings"] == {
        "model": "dsv4-tiny",
        "layers": 8,
        "attn_cp": 1,
        "stage_layers": None,
        "prompt_len": 1,
        "disaggregation": "none",
        "batch_sizes": [1],
        "max_tokens": 64,
        "num_sms": 132,
        "speculative": False,
        "hardware": "h200",
        "link": "nvlink",
        "ranks_per_gpu": 1,
        "nccl_timeout": None,
        "replicas": 1,
        "stream": None,
        "graph_batch_sizes": [],
        "walk_max_m": None,
        "walk_memory": 0.12 * 150e9,
        "compile_lock": False,
        "bf16_fp32_algo": "deep_gemm",
        "moe_a2a": False,
        "overlap": [],
        "library": "sgl-deep-gemm 0.1.4.post1",
        "gpu": "h200",
        "reduced_num_sms": [],
        "decode_batch_sizes": None,
        "without": [],
    }


def test_repeated_options_and_comma_lists_combine(capsys: Capture) -> None:
    data = swept(capsys, "--warmup none --warmup planned --pp 1 --pp 2,1")
    assert axes_of(data["points"]) == {
        (policy, pp, 2, False, pp, 16) for policy in ("none", "planned") for pp in (1, 2)
    }


def test_stage_layers_from_environment_skip_other_pp(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "2,6")
    data = swept(capsys, "--pp 1,2 --warmup none")
    assert [(item["pp"], item["reason"]) for item in data["skipped"]] == [
        (1, "2 stage sizes were given for pp=1 stages")
    ]
    assert data["settings"]["stage_layers"] == [2, 6]


def test_sweep_prints_table_and_writes_plot_and_json(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, path = tmp_path / "sweep.svg", tmp_path / "sweep.json"
    assert sweep(f"--tp 2,3 --plot {plot} --json {path}") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1] == "requests of batch sizes 1; points: 3 simulated, 3 skipped"
    assert lines[-2:] == [
        "skipped 3: tp=3 must divide num_attention_heads=4 of dsv4-tiny",
        f"wrote {plot}",
    ]
    assert sum(line.startswith(" * ") for line in lines) == 1
    assert captured.err.startswith("sweep: 3 of 3, ")
    assert "<svg" in plot.read_text()
    assert len(json.loads(path.read_text())["points"]) == 3


def test_json_on_stdout_is_the_only_output(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    swept(capsys, f"--warmup none --plot {tmp_path / 'sweep.png'}")
    assert (tmp_path / "sweep.png").exists()


def test_runs_ended_by_the_watchdog_are_marked(capsys: Capture) -> None:
    assert sweep(f"--warmup none,planned --nccl-timeout 5 --no-run-ahead {NO_START_UP}") == 0
    out = capsys.readouterr().out
    assert "time-out: the watchdog ends 1 of these runs; none is on the frontier" in out
    rows = [line.split() for line in out.splitlines() if " off " in line]
    assert [(row[0], row[-1]) for row in rows] == [("*", "-"), ("none", "5")]


NODES = "nodes=3 must divide the 8 ranks of replicas=1 x pp=4 x tp=2"
BAD = {
    "--pp 0": "Invalid value for '--pp': 0 is not in the range x>=1",
    "--tp 2,-1": "Invalid value for '--tp': -1 is not in the range x>=1",
    "--nodes 0": "Invalid value for '--nodes': 0 is not in",
    "--cores 16,0": "Invalid value for '--cores': 0 is not in",
    "--pp a": "Invalid value for '--pp': 'a' is not a valid integer range",
    "--ep yes": "Invalid value for '--ep': 'yes' is not one of 'off', 'on'",
    "--warmup none,": "Invalid value for '--warmup': '' is not one of 'none', ",
    "--jobs 0": "Invalid value for '--jobs': 0 is not in the range x>=1",
    "--model nothing": "model 'nothing' is not known: use one of",
    "--layers 9": "layers=9 of dsv4-tiny must lie in 1..8",
    "--hardware abacus": "hardware 'abacus' is not known: use one of",
    "--link string": "--link 'string' is not in profile h200: use one of",
    "--ranks-per-gpu 0": "Invalid value for '--ranks-per-gpu': 0 is not in the range x>=1",
    "--warmup none --nodes 3": NODES,
    "--nodes 3": f"none of 3 combinations fits: {NODES}",
    "--tp 3,2 --nodes 3,5": "none of 12 combinations fits: tp=3 must divide",
    "--batch-sizes 0": "Invalid value for '--batch-sizes': '0' must be whole numbers from 1 on",
    "--prompt-len 0": "Invalid value for '--prompt-len': 0 is not in the range x>=1",
    "--plot x.gif": f"cannot plot to x.gif: suffix must be one of {', '.join(SUFFIXES)}",
    "--plot -": "--trace and --plot need a file",
    "--json x.png --plot x.png": "x.png is given for two outputs: give each its own file",
    "--json /tmp": "cannot write /tmp: it is a folder; give a file",
    "--json /nonexistent/x.json": "cannot write /nonexistent/x.json: its folder does not exist",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda text: text.replace(" ", "_"))
def test_invalid_input_is_a_one_line_error(arguments: str, capsys: Capture) -> None:
    assert sweep(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("sweep: ")]
    assert captured.out == ""
    assert len(lines) == 1 and lines[0].startswith(f"error: {BAD[arguments]}")


def test_error_counts_further_reasons_for_skipping(capsys: Capture) -> None:
    assert sweep("--tp 3,2 --nodes 4,5 --pp 1") == 2
    assert capsys.readouterr().err == (
        "error: none of 12 combinations fits: nodes=4 must divide the 3 ranks of replicas=1 x pp=1"
        " x tp=3; other reasons: 3\n"
    )


def test_sweep_imports_neither_torch_numpy_nor_matplotlib() -> None:
    code = (
        "import sys; from runner.cli import cli; from runner.errors import run_guarded\n"
        f"run_guarded(cli, ['sweep', *{TINY!r}], program='runner')\n"
        "import sim.sweep.run\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (WorkFailedError("it died"), 1, "error: it died"),
    ],
    ids=["interrupted", "lost"],
)
def test_stopped_sweep_shows_finished_points(
    stop: BaseException,
    code: int,
    line: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_only(cases: list[Case], *, jobs: int, on_end: Any) -> None:
        on_end(simulate_case(cases[1]))
        raise stop

    monkeypatch.setattr("runner.cli.sweep.run_cases", one_only)
    path = tmp_path / "sweep.json"
    assert sweep(f"--json {path}") == code
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    assert out[1] == "requests of batch sizes 1; points: 1 simulated, 2 not reached"
    assert captured.err.splitlines()[-1] == line
    data = json.loads(path.read_text())
    assert [item["policy"] for item in data["points"]] == ["pp-parallel"]
    assert [item["policy"] for item in data["unfinished"]] == ["none", "planned"]


def test_ctrl_c_ends_every_process_without_a_traceback(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole process group."""
    cores = ",".join(map(str, range(1, 100)))
    words = f"-m runner sweep --jobs 2 --tp 1,2,4,8 --cores {cores}"
    command = [sys.executable, *words.split()]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert started.stderr is not None
    first = started.stderr.readline()
    assert first.startswith("sweep: ")
    os.killpg(started.pid, signal.SIGINT)
    since = time.monotonic()
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert time.monotonic() - since < 30
    assert " not reached" in out and "\n * " in out
    assert [line for line in err.splitlines() if line and not line.startswith("sweep: ")] == [
        "error: interrupted"
    ]
