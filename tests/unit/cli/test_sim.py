"""``runner sim``: options, figures and printed output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.cli import cli
from runner.config.warmup import WarmupPolicy
from runner.errors import run_guarded
from runner.timeline import read_timelines
from sim.costs.profile import load_profile

Capture = pytest.CaptureFixture[str]
TINY = [
    "--model",
    "dsv4-tiny",
    "--layers",
    "4",
    "--batch-sizes",
    "1",
    "--max-tokens",
    "64",
    "--walk-max-m",
    "16",
]
ALL = [policy.value for policy in WarmupPolicy]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for rest in (
        "JIT_DEEPGEMM_PRECOMPILE",
        "JIT_DEEPGEMM_FAST_WARMUP",
        "PP_PARALLEL_DEEPGEMM_WARMUP",
        "PP_LAYER_PARTITION",
    ):
        for prefix in ("SGLANG", "SGL"):
            monkeypatch.delenv(f"{prefix}_{rest}", raising=False)


def sim(*arguments: str) -> int:
    return run_guarded(cli, ["sim", *arguments], program="runner")


def simulated(capsys: Capture, *arguments: str) -> list[dict[str, Any]]:
    """The predictions of a small run."""
    assert sim(*TINY, *arguments, "--json", "-") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["version"] == 1
    predictions: list[dict[str, Any]] = data["predictions"]
    return predictions


def policies(capsys: Capture, *arguments: str) -> list[str]:
    return [made["policy"] for made in simulated(capsys, *arguments)]


# -- which policies -------------------------------------------------------------------------------


def test_sim_runs_all_policies_by_default(capsys: Capture) -> None:
    assert policies(capsys) == ALL
    assert policies(capsys, "--warmup", "fast", "--warmup", "none", "--warmup", "fast") == [
        "fast",
        "none",
    ]


PRECOMPILE = "SGLANG_JIT_DEEPGEMM_PRECOMPILE"
FAST = "SGLANG_JIT_DEEPGEMM_FAST_WARMUP"
PP_PARALLEL = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({PRECOMPILE: "1"}, "full"),
        ({PRECOMPILE: "false"}, "none"),
        ({FAST: "1"}, "fast"),
        ({FAST: "0"}, "full"),
        ({PRECOMPILE: "0", FAST: "1"}, "none"),
        ({PP_PARALLEL: "1"}, "pp-parallel+full"),
        ({PP_PARALLEL: "yes", PRECOMPILE: "no"}, "pp-parallel"),
        ({PP_PARALLEL: "1", FAST: "1"}, "pp-parallel+fast"),
        ({PP_PARALLEL: "0"}, "full"),
        ({"SGL_JIT_DEEPGEMM_FAST_WARMUP": "1"}, "fast"),
    ],
)
def test_sglang_variables_choose_the_policy(
    variables: dict[str, str], expected: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert policies(capsys) == [expected]


def test_warmup_option_overrides_sglang_variables(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAST, "1")
    assert policies(capsys, "--warmup", "planned", "--warmup", "none") == ["planned", "none"]


def test_non_boolean_sglang_variable_is_refused(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PP_PARALLEL, "perhaps")
    assert sim(*TINY) == 2
    assert capsys.readouterr().err == (
        f"error: {PP_PARALLEL}='perhaps' is not a boolean: use one of true, 1, false, 0\n"
    )


# -- what is simulated ----------------------------------------------------------------------------


def test_json_figures_match_the_written_timeline(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    (made,) = simulated(capsys, "--warmup", "none", "--timeline", str(path))
    (timeline,) = read_timelines(path)
    assert (timeline.source, timeline.policy) == ("predicted", "none")
    assert made["up_seconds"] == pytest.approx(timeline.up, abs=1e-3)
    assert made["wall_seconds"] == pytest.approx(timeline.wall, abs=1e-3)
    assert made["kernels_compiled"] == timeline.kernels_compiled
    assert made["distinct_kernels"] == timeline.distinct_kernels
    assert made["duplicates"] == timeline.duplicates
    assert list(made["phases"]) == [
        "imports",
        "process group",
        "weights",
        "warm-up",
        "first request",
    ]
    assert [rank["rank"] for rank in made["ranks"]] == list(range(8))
    assert made["timeout"] is None
    assert made["meta"] == timeline.meta
    nodes = made["meta"]["coverage_up"]
    assert max(node["planned"] - node["present"] for node in nodes) <= made["stalls"]


def test_json_describes_a_watchdog_timeout(capsys: Capture) -> None:
    (made,) = simulated(capsys, "--warmup", "none", "--nccl-timeout", "5", "--no-run-ahead")
    assert set(made["timeout"]) == {
        "time",
        "rank",
        "operation",
        "waiting_for",
        "busy_with",
        "needed",
        "of_hosts",
    }
    assert made["timeout"]["of_hosts"] is False
    assert made["timeout"]["needed"] == pytest.approx(made["longest_wait"], abs=1e-3)


def test_options_and_environment_reach_the_scenario(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "1,3")
    (made,) = simulated(
        capsys,
        "--warmup",
        "fast",
        "--pp",
        "2",
        "--tp",
        "2",
        "--replicas",
        "2",
        "--nodes",
        "8",
        "--hosts",
        "4",
        "--cores",
        "5",
        "--stream",
        "9,3",
        "--cuda-graphs",
        "1,2",
        "--walk-memory",
        "2",
        "--compile-lock",
        "--link",
        "gloo",
        "--ranks-per-gpu",
        "2",
        "--prompt-len",
        "3",
        "--disaggregation-mode",
        "decode",
    )
    expected = {
        "model": "dsv4-tiny",
        "layers": 4,
        "pp": 2,
        "tp": 2,
        "replicas": 2,
        "nodes": 8,
        "hosts": 4,
        "cores_per_node": 5,
        "stream": [9, 3],
        "graph_batch_sizes": [1, 2],
        "walk_max_m": 16,
        "walk_memory": 2 * 2**30,
        "compile_lock": True,
        "link": "gloo",
        "ranks_per_gpu": 2,
        "prompt_len": 3,
        "disaggregation": "decode",
        "stage_layers": [1, 3],
        "max_tokens": 64,
    }
    assert {name: made["meta"][name] for name in expected} == expected


def test_default_is_one_node_per_stage_and_replica(capsys: Capture) -> None:
    (made,) = simulated(capsys, "--warmup", "none", "--pp", "2", "--replicas", "3")
    assert (made["meta"]["nodes"], made["meta"]["hosts"]) == (6, 6)
    gpu = load_profile("h200").gpu
    assert made["meta"]["walk_memory"] == 0.12 * gpu.memory


def test_skip_phase_and_weights_options_change_start_up_phases(capsys: Capture) -> None:
    def phases(*arguments: str) -> dict[str, float]:
        (made,) = simulated(capsys, "--warmup", "none", *arguments)
        return {
            name: seconds
            for name, seconds in made["phases"].items()
            if name not in ("warm-up", "first request")
        }

    assert list(phases("--skip-phase", "imports")) == ["process group", "weights"]
    assert (
        phases(
            "--skip-phase", "weights", "--skip-phase", "imports", "--skip-phase", "process-group"
        )
        == {}
    )
    cold, warm = (phases("--weights", kind)["weights"] for kind in ("disk", "page-cache"))
    assert cold > warm
    assert set(phases("--weights", "dummy")) == {"imports", "process group", "weights"}


def test_prefill_node_compiles_no_decode_kernels(capsys: Capture) -> None:
    (prefill,) = simulated(capsys, "--warmup", "none", "--disaggregation-mode", "prefill")
    (both,) = simulated(capsys, "--warmup", "none")
    assert prefill["kernels_compiled"] < both["kernels_compiled"]


# -- printed output -------------------------------------------------------------------------------


def test_written_timelines_can_be_compared(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "t.json"
    assert sim(*TINY, "--timeline", str(path)) == 0
    assert [t.policy for t in read_timelines(path)] == ALL
    assert run_guarded(cli, ["compare", str(path), str(path)], program="runner") == 0


def test_table_has_one_row_per_policy_and_ends_with_advice(capsys: Capture) -> None:
    assert sim(*TINY, "--nccl-timeout", "5", "--no-run-ahead") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("dsv4-tiny, 4 layers: pp 4 x tp 2 on 4 nodes, h200, 16 cores a node")
    rows = [line.split()[0] for line in lines if line.startswith("  ") and line.strip()]
    assert [row for row in rows if row in ALL] == ALL
    assert any(line.startswith("none: the watchdog ends this run at ") for line in lines)
    _, _, advice = " ".join(map(str.strip, lines)).partition("use ")
    assert re.fullmatch(
        r"prebuilt: up after \d+ s; leaves no kernel to compile in traffic; needs a prebuilt "
        r"cache; without one use planned: up after \d+ s, leaves no kernel "
        r"to compile in traffic",
        advice,
    )
    assert max(map(len, lines[3:-10])) <= 100


def test_single_policy_output_shows_each_rank_without_advice(capsys: Capture) -> None:
    assert sim(*TINY, "--warmup", "none") == 0
    out = capsys.readouterr().out
    assert "use " not in out and "rank 7" in out.replace("  ", " ")


def test_timeline_on_stdout_is_the_only_output(capsys: Capture) -> None:
    assert sim(*TINY, "--warmup", "none", "--timeline", "-") == 0
    assert len(json.loads(capsys.readouterr().out)["timelines"]) == 1


BAD = {
    "--model nothing": "'nothing'",
    "--pp 99": "pp=99 stages need at least as many layers: the model has 43",
    "--tp 3": "tp=3 must divide num_attention_heads=64 of dsv4",
    "--hardware abacus": "hardware 'abacus' is not known: use one of",
    "--link string": "--link 'string' is not in profile h200: use one of nvlink, ib, gloo",
    "--cores 0": "0 is not in the range x>=1",
    "--ranks-per-gpu 0": "0 is not in the range x>=1",
    "--nodes 0": "nodes=0 must be at least 1",
    "--replicas 0": "replicas=0 must be at least 1",
    "--hosts 0": "hosts=0 must divide the 4 nodes",
    "--hosts 3": "hosts=3 must divide the 4 nodes",
    "--nccl-timeout nan": "'nan' is not a finite number",
    "--nccl-timeout inf": "inf is not in the range",
    "--host-factor nan": "'nan' is not a finite number",
    "--walk-memory nan": "'nan' is not a finite number",
    "--walk-memory inf": "inf is not in the range",
    "--nccl-timeout 0": "0.0 is not in the range",
    "--prompt-len 0": "0 is not in the range x>=1",
    "--plot x.gif": "suffix must be one of .png, .svg",
    "--trace -": "--trace and --plot need a file",
    "--json - --timeline -": "only one output can go to standard output",
    "--nodes 3": "nodes=3 must divide the 8 ranks",
    "--timeline /nonexistent/x.json": "cannot write /nonexistent/x.json: its folder does not exist",
    "--json x.json --timeline x.json": "x.json is given for two outputs: give each its own file",
    "--trace x.json --timeline ./x.json": "x.json is given for two outputs",
    "--trace /tmp": "cannot write /tmp: it is a folder; give a file",
    "--batch-sizes 1,b": "'1,b' must be whole numbers from 1 on",
    "--batch-sizes 1000000 --warmup none": "batch sizes 1000000 must lie in 1..131072",
    "--stream 1000000": "token counts 1000000 must lie in 1..131072",
    "--cuda-graphs 1000000": "graph batch sizes 1000000 must lie in 1..131072",
    "--batch-sizes 0": "'0' must be whole numbers from 1 on",
    "--warmup slow": "'slow'",
    "--stream 5,0": "'5,0' must be whole numbers from 1 on",
    "--cuda-graphs 0": "'0' must be whole numbers from 1 on",
    "--walk-max-m 0": "0 is not in the range",
    "--walk-memory 0": "0.0 is not in the range",
    "--weights tape": "'tape'",
    "--weights skip": "'skip'",
    "--skip-phase coffee": "'coffee'",
    "--disaggregation-mode both": "'both'",
    "--warmup planned --max-tokens 64": "batch size 8448 is above --max-tokens 64",
    "--warmup planned --stream 20000": "token count 20000 is above --max-tokens 16384",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda text: text.replace(" ", "_"))
def test_invalid_input_is_a_one_line_error(arguments: str, capsys: Capture) -> None:
    assert sim(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    err = captured.err
    assert err.startswith("error: ") and BAD[arguments] in err and err.count("\n") == 1


def test_output_that_may_not_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    with monkeypatch.context() as read_only:  # Root may write everywhere.
        read_only.setattr("os.access", lambda *_: False)
        assert sim(*TINY, "--json", str(path)) == 2
    line = f"error: cannot write {path}: you may not write there; give another file\n"
    assert capsys.readouterr() == ("", line)


def test_outputs_can_share_a_device(capsys: Capture) -> None:
    assert sim(*TINY, "--json", "/dev/null", "--timeline", "/dev/null") == 0
    assert "wrote /dev/null" in capsys.readouterr().out
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "text", ["\xff", "[]", "{}", "3", '{"name": "x"}', None], ids=lambda text: repr(text)[:12]
)
def test_invalid_profile_file_is_a_one_line_error(
    text: str | None, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "profile.json"
    good = json.dumps(load_profile("h200").to_json())
    load = f'"load": {load_profile("h200").cache.load}'
    assert load in good
    path.write_bytes(
        (good.replace(load, '"load": "x"') if text is None else text).encode("latin-1")
    )
    assert sim("--hardware", str(path)) == 2
    err = capsys.readouterr().err
    assert f"{path} is not a hardware profile" in err and err.count("\n") == 1


# -- imports --------------------------------------------------------------------------------------


def in_a_process(code: str) -> None:
    start = "import sys; from runner.cli import cli; from runner.errors import run_guarded\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_sim_imports_neither_torch_numpy_nor_matplotlib() -> None:
    in_a_process(
        f"run_guarded(cli, ['sim', *{TINY!r}], program='runner')\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )


def test_help_imports_no_subcommand_dependencies() -> None:
    in_a_process(
        "run_guarded(cli, ['--help'], program='runner')\n"
        "assert not {'rich', 'sim', 'runner.model'} & set(sys.modules), sys.modules.keys()"
    )
