"""Rules, plans, caches and launches, against the real library on a stand-in GPU.

DEEPGEMM_COLDSTART_LIBRARY_PYTHON names an interpreter with the library and a CUDA build of torch.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from runner.config.hf import load_model
from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.scenario import Scenario
from tests.schedules import schedule_from_json

PYTHON = os.environ.get("DEEPGEMM_COLDSTART_LIBRARY_PYTHON", "")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.library,
    pytest.mark.skipif(not PYTHON, reason="DEEPGEMM_COLDSTART_LIBRARY_PYTHON is not set"),
]


def run(*words: str, cache: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``runner`` in the library's environment, with recorded answers in ``cache``."""
    done = subprocess.run(
        [PYTHON, "-m", "runner", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="session")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memo")


def has_rules(memo: Path) -> bool:
    planned = run("plan", "--gemm", "gemm_nt_f8f8bf16:128:128", "--max-m", "1", cache=memo).stdout
    return planned.startswith("sgl-deep-gemm 0.1.4.post1 ")


BF16 = [
    "gemm_nt_bf16bf16bf16:2048:4096",
    "grouped_gemm_nt_bf16_contig:1024:2048:8",
    "grouped_gemm_nt_bf16_masked:1024:2048:8",
]


@pytest.mark.parametrize(
    ("arguments", "checked"),
    [
        (["--model", "dsv4", "--tp", "2"], "644 kernels in 239697 calls"),
        (["--model", "dsv3", "--tp", "8", "--pp", "1"], "85 kernels in 150076 calls"),
        (
            [word for spec in BF16 for word in ("--gemm", spec)] + ["--max-m", "4096"],
            "48 kernels in 8224 calls",
        ),
    ],
    ids=["dsv4", "dsv3", "bf16"],
)
def test_rules_give_the_same_kernels_as_the_library(
    arguments: list[str], checked: str, memo: Path
) -> None:
    """For every GEMM type and every M."""
    if not has_rules(memo):
        pytest.skip("the rules are those of sgl-deep-gemm 0.1.4.post1")
    assert f"no difference: {checked}" in run("plan", *arguments, "--check", cache=memo).stdout


def test_second_plan_reads_recorded_answers_and_damaged_ones_are_asked_again(
    tmp_path: Path,
) -> None:
    words = ["plan", "--gpu", "b200", "--gemm", "gemm_nt_f8f8bf16:256:512", "--max-m", "64"]
    first, second = (run(*words, "--json", "-", cache=tmp_path) for _ in range(2))
    assert "ask the library" in first.stderr
    assert "ask the library" not in second.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout)
    (memo,) = (tmp_path / "deepgemm-coldstart" / "tables").glob("*.json.gz")
    memo.write_bytes(b"torn")
    again = run(*words, "--json", "-", cache=tmp_path)
    assert json.loads(again.stdout) == json.loads(first.stdout)


NEWER = [
    "gemm_nt_f8f8bf16_block32:4096:4096",
    "gemm_nt_f8f4bf16:4096:4096",
    "grouped_gemm_nt_f8f4bf16_contig:2048:4096:32",
    "grouped_gemm_nt_f8f4bf16_masked:2048:4096:32",
]


@pytest.mark.parametrize("spec", NEWER)
def test_library_plans_blackwell_only_gemm_types(spec: str, memo: Path) -> None:
    """Packed scales, FP4 weights and blocks of 32 have no rules, so the library is asked."""
    words = ["plan", "--gpu", "b200", "--gemm", spec, "--max-m", "256", "--json", "-"]
    plan = json.loads(run(*words, cache=memo).stdout)
    assert plan["arch"] in ("sm_100f", "sm_100a")
    names = {item["name"] for item in plan["kernels"]}
    assert any(name.startswith("sm100_") and "gemm" in name for name in names), names
    covered = {m for item in plan["kernels"] for m, _ in item["m_ranges"]}
    assert min(covered) == (128 if "contig" in spec else 1)


@pytest.mark.nvcc
def test_verify_call_finds_missing_kernels_by_calling_the_library(
    memo: Path, tmp_path: Path
) -> None:
    built = str(tmp_path / "cache")
    gemm = ["--gemm", "gemm_nt_f8f8bf16:256:512", "--max-m", "40"]
    assert "4 built" in run("compile", *gemm, "--cache-dir", built, cache=memo).stdout
    told = run("cache", "verify", built, "--call", cache=memo).stdout
    assert "40 calls of " in told
    assert "0 compiles asked for, 0 new entries" in told
    entry = min((tmp_path / "cache" / "cache").iterdir())
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    failed = run("cache", "verify", built, "--call", cache=memo, code=1)
    assert f"missing: {entry.name} is not in the cache" in failed.stdout
    # If the manifest does not name the entry either, only the calls reveal that it is missing.
    manifest = tmp_path / "cache" / "manifest.json"
    told_there = json.loads(manifest.read_text())
    uses = told_there["entries"].pop(entry.name)["uses"]
    next(iter(told_there["entries"].values()))["uses"] += uses
    manifest.write_text(json.dumps(told_there))
    called = run("cache", "verify", built, "--call", cache=memo, code=1)
    assert "1 compiles asked for, 1 new entries" in called.stdout
    assert f"lacks kernels that the library asks for: {entry.name}" in called.stderr


@pytest.mark.nvcc
def test_verify_checks_the_driver_gpu_or_the_gpu_option(memo: Path, tmp_path: Path) -> None:
    built = str(tmp_path / "cache")
    run(
        "compile",
        "--gemm",
        "gemm_nt_f8f8bf16:256:512",
        "--max-m",
        "8",
        "--cache-dir",
        built,
        cache=memo,
    )
    verify = ["cache", "verify", built]
    h20 = [PYTHON, "-m", "runner", *verify]
    assert " for h200 (132 SMs): checked" in run(*verify, "--gpu", "h100", cache=memo).stdout
    words = "other GPU: built for 132 SMs, this one has 78"
    assert words in run(*verify, "--gpu", "h20", cache=memo, code=1).stdout
    assert words in run("standin", "--gpu", "h20", "--", *h20, cache=memo, code=1).stdout


@pytest.mark.distributed
@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (2, 2)])
def test_launch_on_the_stand_in_performs_the_recorded_operations(
    pp: int, tp: int, memo: Path, tmp_path: Path
) -> None:
    """The CUDA path without a GPU: results are meaningless, but calls are real."""
    schedule = tmp_path / "schedule.json"
    words = [
        "--model",
        "dsv4-tiny",
        "--pp",
        str(pp),
        "--tp",
        str(tp),
        "--device",
        "cuda",
        "--backend",
        "gloo",
        "--compute",
        "real",
        "--batch-sizes",
        "1,130",
        "--schedule",
        str(schedule),
    ]
    standin = ["standin", "--gpu", "h200", "--no-compile", "--", PYTHON, "-m", "launch"]
    done = run(*standin, *words, cache=memo)
    assert "not stood in" not in done.stderr
    scenario = Scenario(
        model=load_model("dsv4-tiny"),
        parallel=ParallelConfig(pp=pp, tp=tp),
        policy=WarmupPolicy.PP_PARALLEL,
        batch_sizes=(1, 130),
    )
    ran = schedule_from_json(json.loads(schedule.read_text()))
    expected = record(scenario)
    for rank, (mine, theirs) in enumerate(zip(ran.ranks, expected.ranks, strict=True)):
        assert mine == theirs, f"rank {rank}"
