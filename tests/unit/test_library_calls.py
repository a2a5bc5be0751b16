"""Calling an installed library in worker processes: orders, answers, failures and checks.

Here the worker is a shell script; tests/library runs the real one.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cache.call_check import CallReport, call_on_cache
from runner.cache.machine import TargetMachine
from runner.cli import main
from runner.config.environ import Environ
from runner.errors import UserError, WorkFailedError
from runner.kernels.installed import Library
from runner.kernels.library_calls import EntryRuns, call_library
from runner.kernels.table import Demand
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
from tests.unit.small_cache import GEMM, NVCC_TEXT, contents, fill, keys_for, small_library

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
GROUPED = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 64, 128, 4, 132)
LIBRARY = Library(Path("/dg"), "sgl-deep-gemm", "0.2.5")
CRASH = "echo some words >&2; kill -SEGV $$"

Worker = Callable[[str], None]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Replaces the worker by a shell script."""

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat > {tmp_path}/orders\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def answer(runs: object, *entries: str) -> str:
    paths = [f"/cache/{entry}/kernel.cubin" for entry in entries]
    return f"echo '{json.dumps({'runs': runs, 'kernels': paths})}'"


def call(*demands: Demand) -> list[tuple[Demand, EntryRuns]]:
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        steps.append((done, total))

    found = call_library(LIBRARY, demands, os.environ, jobs=1, progress=progress)
    assert steps == [(done, len(demands)) for done in range(len(demands) + 1)]
    return found


def test_worker_receives_demands_and_answers_with_runs(worker: Worker, tmp_path: Path) -> None:
    answers = answer([[1, 4, [0, 1]], [6, 6, []]], "a", "b"), answer([[128, 256, [0]]], "b")
    worker("\n".join(answers))
    dense, grouped = Demand(DENSE, (1, 2, 3, 4, 6)), Demand(GROUPED, (128, 256))
    assert call(dense, grouped) == [
        (dense, [(1, 4, ["a", "b"]), (6, 6, [])]),
        (grouped, [(128, 256, ["b"])]),
    ]
    assert json.loads((tmp_path / "orders").read_text()) == {
        "library": "/dg",
        "demands": [
            [[DENSE.type, 4096, 1024, 1, 132], 1, [1, 2, 3, 4, 6]],
            [[GROUPED.type, 64, 128, 4, 132], 128, [128, 256]],
        ],
    }


def test_demands_are_divided_among_workers(worker: Worker, tmp_path: Path) -> None:
    worker(f"cp {tmp_path}/orders {tmp_path}/orders.$$; {answer([])}")
    demands = [Demand(DENSE, range(1, 9)), Demand(GROUPED, (128,))]
    found = call_library(LIBRARY, demands, os.environ, jobs=4, progress=lambda *_: None)
    assert len(list(tmp_path.glob("orders.*"))) == 2
    assert sorted(found, key=str) == sorted([(demand, []) for demand in demands], key=str)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (CRASH, "its process died with signal 11 (Segmentation fault): some words"),
        ("kill -KILL $$", "its process died with signal 9 (Killed)"),
        ("printf '{\"runs'; kill -KILL $$", "its process died with signal 9 (Killed)"),
        ("exit 3", "its process died with exit code 3"),
        ("exit 1", "its process died with exit code 1"),
        ("exit 0", "its process died with exit code 0"),
    ],
)
def test_worker_crash_is_a_work_failed_error(worker: Worker, script: str, words: str) -> None:
    worker(script)
    with pytest.raises(WorkFailedError) as caught:
        call(Demand(DENSE, (1,)))
    assert str(caught.value) == f"sgl-deep-gemm 0.2.5 could not be called: {words}"
    assert caught.value.exit_code == 1


def test_gemm_refused_by_the_library_is_a_user_error(worker: Worker) -> None:
    worker("echo more >&2; echo no such GEMM >&2; exit 1")
    with pytest.raises(UserError) as caught:
        call(Demand(DENSE, (1,)))
    assert str(caught.value) == "sgl-deep-gemm 0.2.5 could not be called: no such GEMM"


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs child processes without a stand-in GPU."""

    def environment(gpu: object, *, work_dir: Path, **values: object) -> dict[str, str]:
        return {**os.environ, "WORK": str(work_dir)}

    monkeypatch.setattr("runner.kernels.library.standin_environment", environment)
    monkeypatch.setattr("runner.cache.call_check.standin_environment", environment)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.mark.usefixtures("plain_environment")
def test_command_exits_with_1_if_the_library_crashes(
    worker: Worker,
    tmp_path: Path,
    fake_nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = small_library(tmp_path / "deep_gemm")
    monkeypatch.setattr("runner.target.find_library", lambda wanted: library)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    worker(CRASH)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--gemm", GEMM, "--max-m", "64", "--check"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {library.title} could not be called: its process died with signal 11 "
        "(Segmentation fault): some words"
    )


# -- checking a cache by calls --------------------------------------------------------------------


@pytest.fixture
def check(
    tmp_path: Path, plain_environment: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], CallReport]:
    """Checks a small cache for an H200 by calling the worker; the cache must not change."""
    monkeypatch.setattr("runner.cache.call_check._GPU_DRIVER", tmp_path / "none")
    library = small_library(tmp_path / "deep_gemm")
    cache, manifest = fill(tmp_path / "cache", keys_for(library))
    manifest = replace(manifest, gpu="h200", num_sms=132)
    machine = TargetMachine(library, library.root, NVCC_TEXT, Environ())

    def run() -> CallReport:
        before = contents(cache.root)
        try:
            return call_on_cache(cache, manifest, machine, jobs=2, progress=lambda *_: None)
        finally:
            assert contents(cache.root) == before

    return run


def test_check_of_complete_cache_reports_no_compiles(
    worker: Worker, check: Callable[[], CallReport], tmp_path: Path
) -> None:
    worker(f"ls $DG_JIT_CACHE_DIR/cache > {tmp_path}/seen; {answer([])}")
    assert check() == CallReport("a stand-in h200", 64, [], [])
    assert sorted((tmp_path / "seen").read_text().split()) == sorted(
        path.name for path in (tmp_path / "cache" / "cache").iterdir()
    )
    orders = json.loads((tmp_path / "orders").read_text())
    assert orders["demands"] == [[[DENSE.type, 4096, 1024, 1, 132], 1, [*range(1, 65)]]]


COMPILE = r"""
mkdir $DG_JIT_CACHE_DIR/cache/kernel.a.12
printf 'nvcc\037/tmp/kernel.a.12/kernel.cu\037-cubin\n' > $WORK/compiles.txt
"""


@pytest.mark.parametrize("end", [answer([]), CRASH])
def test_check_of_incomplete_cache_reports_compiles_even_if_the_library_crashes(
    worker: Worker, check: Callable[[], CallReport], end: str
) -> None:
    """The library may crash because the check's compiler writes nothing."""
    worker(COMPILE + end)
    assert check() == CallReport("a stand-in h200", 64, ["kernel.a.12"], ["kernel.a.12"])


def test_check_fails_if_library_crashes_without_a_compile(
    worker: Worker, check: Callable[[], CallReport]
) -> None:
    worker(CRASH)
    with pytest.raises(WorkFailedError, match=r"signal 11"):
        check()
