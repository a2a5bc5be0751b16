"""Launches of real ranks over gloo on CPUs: logits, recorded operations, errors and signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler
from runner.config.environ import Bf16Fp32Algo
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.driver.run import record
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.timeline import Timeline, read_timelines
from tests.distributed.launching import FEW_KERNELS, launch, read_schedule, run_launch, split
from tests.models import DSV3_SMALL

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.distributed

SMALL = "--batch-sizes 2,24 --prompt-len 12 --no-jit --device cpu"
"""EXTEND of 2 and of 2 x 12 tokens, each followed by a DECODE step."""


@pytest.fixture(scope="session")
def dsv3_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dsv3") / "config.json"
    path.write_text(json.dumps(DSV3_SMALL))
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, dsv3_config: Path) -> dict[str, list]:
    """Logits of one rank, by model."""
    folder = tmp_path_factory.mktemp("reference")
    found = {}
    for model in ("dsv4-tiny", str(dsv3_config)):
        path = folder / "logits.pt"
        launch(f"--model {model} --warmup none", SMALL, "--logits", path)
        found[model] = torch.load(path)
    return found


def assert_same_logits(expected: list, path: Path) -> None:
    found = torch.load(path)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-6


LAYOUTS = [
    "--pp 1 --tp 2",
    "--pp 2 --tp 1",
    "--pp 2 --tp 2",
    "--pp 4 --tp 1",
    "--pp 4 --tp 2",
    "--pp 1 --tp 2 --ep",
    "--pp 4 --tp 2 --ep",
    "--pp 2 --tp 2 --attn-cp 2",
    "--pp 3 --stage-layers 1,5,2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_do_not_depend_on_the_layout(
    layout: str, reference: dict[str, list], tmp_path: Path
) -> None:
    """The tolerance is 1e-6, because partial sums on a CPU stay in fp32 until they are added."""
    path = tmp_path / "logits.pt"
    launch("--model dsv4-tiny --warmup none", layout, SMALL, "--logits", path)
    assert_same_logits(reference["dsv4-tiny"], path)


@pytest.mark.parametrize("layout", ["--pp 2 --tp 2", "--pp 2 --tp 2 --ep", "--tp 2 --attn-cp 2"])
def test_dsv3_logits_do_not_depend_on_the_layout(
    layout: str, reference: dict[str, list], dsv3_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "logits.pt"
    launch("--model", dsv3_config, "--warmup none", layout, SMALL, "--logits", path)
    assert_same_logits(reference[str(dsv3_config)], path)


def test_warm_up_does_not_change_the_logits(reference: dict[str, list], tmp_path: Path) -> None:
    path = tmp_path / "logits.pt"
    launch("--model dsv4-tiny --pp 2 --warmup pp-parallel", SMALL, "--logits", path)
    assert_same_logits(reference["dsv4-tiny"], path)


def test_launch_under_torchrun_uses_its_ranks(reference: dict[str, list], tmp_path: Path) -> None:
    path = tmp_path / "logits.pt"
    printed = launch(
        "--model dsv4-tiny --pp 2 --tp 2 --warmup none",
        SMALL,
        "--logits",
        path,
        torchrun="--nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0",
    )
    assert "= 4 ranks over gloo on cpu" in printed
    assert_same_logits(reference["dsv4-tiny"], path)


def test_launch_under_a_single_torchrun_worker_starts_its_own_ranks(tmp_path: Path) -> None:
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint localhost:0"
    printed = launch("--model dsv4-tiny --pp 2 --tp 1", SMALL, torchrun=rendezvous)
    assert "pp 2 x tp 1 = 2 ranks over gloo on cpu" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        "--model dsv4-tiny --pp 4 --tp 2 --warmup pp-parallel --batch-sizes 1,24",
        "--model dsv4-tiny --pp 2 --tp 2 --ep --warmup none --batch-sizes 5 --prompt-len 3",
        "--model dsv4-tiny --pp 2 --tp 2 --attn-cp 2 --warmup pp-parallel --batch-sizes 8",
        "--model dsv4 --layers 4 --pp 2 --tp 2 --compute skip --batch-sizes 1,64",
        "--model dsv3 --layers 4 --pp 2 --tp 1 --compute skip --batch-sizes 1",
    ],
)
def test_real_run_performs_the_recorded_operations(arguments: str, tmp_path: Path) -> None:
    words = dict(_pairs(arguments.split()))
    path = tmp_path / "schedule.json"
    launch(arguments, "--no-jit --device cpu --schedule", path)
    model = load_model(words["--model"])
    if "--layers" in words:
        model = with_layers(model, int(words["--layers"]))
    parallel = ParallelConfig(
        pp=int(words["--pp"]),
        tp=int(words["--tp"]),
        ep="--ep" in words,
        attn_cp=int(words.get("--attn-cp", "1")),
    )
    sizes = tuple(int(size) for size in words["--batch-sizes"].split(","))
    policy = WarmupPolicy(words.get("--warmup", "pp-parallel"))
    scenario = Scenario(
        model=model,
        parallel=parallel,
        policy=policy,
        batch_sizes=sizes,
        prompt_len=int(words.get("--prompt-len", "1")),
    )
    ran, recorded = read_schedule(path), record(scenario)
    for rank, (ours, theirs) in enumerate(zip(ran.ranks, recorded.ranks, strict=True)):
        assert ours == theirs, f"rank {rank}"


@pytest.mark.parametrize("algo", [Bf16Fp32Algo.CUBLAS, Bf16Fp32Algo.TORCH])
def test_environment_selects_the_bf16_fp32_algorithm(algo: Bf16Fp32Algo, tmp_path: Path) -> None:
    """Each rank reads the variable and runs the operations recorded for that algorithm."""
    path = tmp_path / "schedule.json"
    done = run_launch(
        "--model dsv4-tiny --pp 2 --warmup none",
        SMALL,
        "--schedule",
        path,
        env={"SGLANG_OPT_BF16_FP32_GEMM_ALGO": algo.value},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scenario = Scenario(
        model=load_model("dsv4-tiny"),
        parallel=ParallelConfig(pp=2),
        prompt_len=12,
        policy=WarmupPolicy.NONE,
        batch_sizes=(2, 24),
        bf16_fp32_algo=algo,
    )
    ran = read_schedule(path)
    assert ran == record(scenario)
    assert ran != record(replace(scenario, bf16_fp32_algo=Bf16Fp32Algo.DEEP_GEMM))


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for index, word in enumerate(words):
        if word.startswith("--"):
            following = words[index + 1] if index + 1 < len(words) else "--"
            pairs.append((word, "" if following.startswith("--") else following))
    return pairs


@pytest.mark.nvcc
def test_stages_compile_serially_without_warm_up_and_concurrently_with_pp_parallel(
    nvcc_compiler: NvccCompiler, tmp_path: Path
) -> None:
    config, path = tmp_path / "config.json", tmp_path / "timeline.json"
    config.write_text(json.dumps(FEW_KERNELS))
    launch(
        "--pp 2 --virtual-nodes 2 --compute skip --batch-sizes 1 --disaggregation-mode prefill",
        "--device cpu --warmup none --warmup pp-parallel --model",
        config,
        "--timeline",
        path,
        timeout=540,
    )
    serial, parallel = read_timelines(path)
    for timeline in (serial, parallel):
        assert timeline.kernels_compiled == 2 * timeline.distinct_kernels > 2
        assert timeline.distinct_kernels == serial.distinct_kernels
    assert not _overlap(serial), "without a warm-up stage 1 compiles after stage 0"
    assert _overlap(parallel), "with it they compile at the same time"


PLANNED = (
    "--pp 2 --tp 2 --compute skip --batch-sizes 1 --disaggregation-mode prefill --device cpu "
    "--max-tokens 16"
)


@pytest.mark.nvcc
def test_planned_builds_each_kernel_once_and_prebuilt_compiles_none(
    nvcc_compiler: NvccCompiler, tmp_path: Path
) -> None:
    """Two nodes divide the plan and exchange kernels; then one node's cache serves all ranks."""
    config, cache = tmp_path / "config.json", tmp_path / "cache"
    config.write_text(json.dumps(FEW_KERNELS))
    common = ["--model", config, PLANNED, "--cache-dir"]
    built, schedule = tmp_path / "planned.json", tmp_path / "schedule.json"
    launch(
        *common,
        cache,
        "--virtual-nodes 2 --warmup planned --timeline",
        built,
        "--schedule",
        schedule,
        timeout=540,
    )
    (planned,) = read_timelines(built)
    scenario = _planned_scenario(config)
    everything = len(plan_of(scenario).kernels)
    assert planned.kernels_compiled == planned.distinct_kernels == everything > 2
    identities = {item.kernel.identity for item in plan_of(scenario).kernels}
    assert {span.key for span in planned.spans if span.is_kernel} == identities
    assert {span.rank for span in planned.spans if span.kind == "compile"} == {0, 2}
    assert [node["present"] for node in planned.meta["coverage"]] == [everything] * 2
    assert [node["stalls"] for node in planned.meta["coverage"]] == [[], []]
    assert read_schedule(schedule) == record(scenario)

    again = tmp_path / "prebuilt.json"
    launch(*common, cache / "node1", "--warmup prebuilt --timeline", again)
    (prebuilt,) = read_timelines(again)
    assert prebuilt.kernels_compiled == 0
    assert prebuilt.meta["coverage"][0]["present"] == everything

    lacking = run_launch(*common, tmp_path / "none", "--warmup prebuilt")
    assert lacking.returncode == 2
    assert f"lacks {everything} of {everything} planned kernels" in lacking.stderr
    assert "Traceback" not in lacking.stderr


def _planned_scenario(config: Path) -> Scenario:
    return Scenario(
        model=load_model(str(config)),
        parallel=ParallelConfig(pp=2, tp=2, nodes=2),
        policy=WarmupPolicy.PLANNED,
        batch_sizes=(1,),
        disaggregation=DisaggregationMode.PREFILL,
        max_tokens=16,
    )


def _overlap(timeline: Timeline) -> bool:
    """Whether compiles of the two stages overlap in time."""
    zero, one = ([s for s in timeline.by_rank()[rank] if s.kind == "compile"] for rank in (0, 1))
    return any(a.start < b.end and b.start < a.end for a in zero for b in one)


BAD_INPUT = {
    "--model nothing": "'nothing'",
    "--pp 9 --model dsv4-tiny": "pp=9 stages need at least as many layers: the model has 8",
    "--tp 3 --model dsv4-tiny": "tp=3 must divide num_attention_heads=4 of dsv4-tiny",
    "--tp 4 --model dsv4-tiny": "tp=4 must divide o_groups=2 of dsv4-tiny",
    "--pp 2 --stage-layers 3,4 --model dsv4-tiny": "stage sizes 3,4 must each be at least 1",
    "--model dsv4-tiny --layers 99": "layers=99 of dsv4-tiny must lie in 1..8",
    "--model dsv4-tiny --batch-sizes 0": "'0' must be whole numbers from 1 on",
    "--model dsv4-tiny --batch-sizes x": "'x' must be whole numbers from 1 on",
    "--model dsv4-tiny --device cuda": "--device cuda: torch sees no CUDA device",
    "--model dsv4-tiny --warmup slow": "'slow'",
    "--model dsv4-tiny --warmup planned --max-tokens 64": "is above --max-tokens 64",
    "--model dsv4-tiny --warmup none --max-tokens 0": "max-tokens 0 must lie in 1..131072",
    "--model dsv4-tiny --prompt-len 0": "0 is not in the range x>=1",
    "--model dsv4-tiny --stream 0": "'0' must be whole numbers from 1 on",
    "--model dsv4-tiny --stream 4,-1": "'4,-1' must be whole numbers from 1 on",
    "--model dsv4-tiny --stream 99 --warmup planned --batch-sizes 1 --max-tokens 64": (
        "token count 99 is above --max-tokens 64, the limit that planned prepares for"
    ),
    "--model dsv4-tiny --cuda-graphs 0": "'0' must be whole numbers from 1 on",
    "--model dsv4-tiny --walk-max-m 0": "'--walk-max-m': 0 is not in the range",
    "--model dsv4-tiny --num-sms 7": "--num-sms 7 must be a positive even number",
    "--model dsv4-tiny --logits /no/x.pt": "cannot write /no/x.pt: its folder does not exist",
    "--model dsv4-tiny --plot x.gif": "suffix must be one of .png, .svg",
    "--model dsv4-tiny --timeline -": "--timeline needs a file",
    "--model dsv4-tiny --schedule s.json --warmup none --warmup pp-parallel": "only one run",
}


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=lambda text: text.replace(" ", "_"))
def test_invalid_input_is_one_line_and_exit_code_2(arguments: str) -> None:
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run_launch(arguments, "--no-jit")
    assert done.returncode == 2
    assert BAD_INPUT[arguments] in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_wrong_world_size_error_shows_the_correct_command() -> None:
    done = run_launch("--pp 4 --tp 2", env={"WORLD_SIZE": "3", "RANK": "0"})
    assert done.returncode == 2
    assert "WORLD_SIZE=3 but --pp 4 --tp 2 needs 8 ranks" in done.stderr
    assert "torchrun --nproc-per-node 8 -m launch --pp 4 --tp 2" in done.stderr


def test_invalid_environment_value_names_the_variable() -> None:
    done = run_launch("--model dsv4-tiny", env={"SGLANG_DEEPGEMM_PDL": "perhaps"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: SGLANG_DEEPGEMM_PDL='perhaps' is not a boolean")


@pytest.mark.nvcc
def test_unwritable_cache_is_a_one_line_error(nvcc_compiler: NvccCompiler, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = run_launch(
        "--model dsv4-tiny --pp 2 --batch-sizes 1 --device cpu --cache-dir", blocker / "cache"
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert f"cache directory {blocker / 'cache'} cannot be written" in done.stderr


def test_rank_outside_the_world_is_a_one_line_error() -> None:
    done = run_launch("--model dsv4-tiny --no-jit", env={"RANK": "5"})
    assert done.returncode == 2
    assert "RANK=5 must be below WORLD_SIZE=1" in done.stderr


TWO_RANKS = "--model dsv4-tiny --pp 2 --no-jit --device cpu"


@pytest.mark.parametrize("seconds", ["0.01", "12"])
def test_run_above_its_timeout_ends_with_an_error(seconds: str) -> None:
    """Before the ranks have connected, and in the middle of a longer run."""
    done = run_launch(TWO_RANKS, "--timeout", seconds, timeout=120)
    assert done.returncode == 1
    words = rf"rank [01] failed: OutOfTimeError: not finished after --timeout {seconds} s, in: .+"
    assert re.fullmatch(f"error: {words}", done.stderr.splitlines()[-1])


def start_launch(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *split("-m launch", *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_rank_ends_the_job_and_is_named() -> None:
    job = start_launch(TWO_RANKS)
    try:
        os.kill(_pid_of_rank(job.pid, 1), signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 1
    assert "error: rank 1 was ended by signal 9" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "error: ended by SIGTERM")],
    ids=lambda value: str(getattr(value, "name", "")),
)
def test_signal_to_launch_ends_its_ranks(number: signal.Signals, code: int, line: str) -> None:
    job = start_launch(TWO_RANKS)
    try:
        ranks = [_pid_of_rank(job.pid, rank) for rank in (0, 1)]
        time.sleep(2)
        job.send_signal(number)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert (job.returncode, errors.strip()) == (code, line)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def _pid_of_rank(parent: int, rank: int) -> int:
    """Wait for the parent's rank to appear."""
    for _ in range(600):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return int(child)
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} did not start")
