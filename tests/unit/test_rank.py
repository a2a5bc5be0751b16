"""A rank's process: communication backend, compute mode, graph checks and start time."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import UserError

torch = pytest.importorskip("torch")

from launch.cli import main  # noqa: E402
from launch.rank import check_graphs, compute_mode, pick_backend, process_start  # noqa: E402
from runner.config.environ import Environ  # noqa: E402
from runner.config.presets import PRESETS  # noqa: E402
from runner.driver.warmup import WarmupPolicy  # noqa: E402
from tests.unit.test_launch_options import parsed  # noqa: E402


def picked(
    wanted: str, monkeypatch: pytest.MonkeyPatch, *, gpus: int, local: int, per_node: int
) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    return pick_backend(wanted, "cuda" if gpus else "cpu", local, per_node)


@pytest.mark.parametrize(
    ("wanted", "gpus", "local", "per_node", "backend"),
    [
        ("auto", 0, 8, 8, "gloo"),
        ("auto", 1, 8, 8, "gloo"),
        ("auto", 7, 8, 8, "gloo"),
        ("auto", 8, 8, 8, "nccl"),
        ("auto", 8, 4, 2, "nccl"),
        ("auto", 1, 1, 1, "nccl"),
        # Virtual nodes do not change the default backend: NCCL among them is opt-in.
        ("auto", 2, 8, 2, "gloo"),
        ("gloo", 8, 8, 8, "gloo"),
        ("gloo", 0, 1, 1, "gloo"),
        ("nccl", 8, 8, 8, "nccl"),
        ("nccl", 2, 8, 2, "nccl"),
        ("nccl", 1, 8, 1, "nccl"),
    ],
)
def test_auto_backend_is_nccl_if_each_rank_has_its_own_gpu(
    wanted: str,
    gpus: int,
    local: int,
    per_node: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert picked(wanted, monkeypatch, gpus=gpus, local=local, per_node=per_node) == backend


def test_nccl_requires_a_gpu_for_each_rank_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"4 ranks of a node would share 2 GPUs") as caught:
        picked("nccl", monkeypatch, gpus=2, local=8, per_node=4)
    assert "give --virtual-nodes so that a node has at most 2 ranks" in str(caught.value)
    with pytest.raises(UserError, match=r"--backend nccl .* the ranks run on CPUs"):
        picked("nccl", monkeypatch, gpus=0, local=8, per_node=1)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--pp", "2"], "--backend nccl moves data on GPUs, but the ranks run on CPUs"),
        (
            ["--compute", "skip"],
            "--backend nccl needs --compute real: without math nothing is on a GPU",
        ),
    ],
)
def test_nccl_without_gpu_data_is_refused_before_ranks_start(
    more: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--model", "dsv4-tiny", "--backend", "nccl", *more]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


# -- what a rank computes -------------------------------------------------------------------------

OPTIONS = parsed("--model", "dsv4-tiny")


@pytest.mark.parametrize(
    ("asked", "device", "model", "expected"),
    [
        (None, "cpu", "dsv4-tiny", ("real", "the model is small")),
        (None, "cuda", "dsv4", ("real", "on a GPU")),
        ("skip", "cuda", "dsv4", ("skip", "as given")),
        ("real", "cpu", "dsv4", ("real", "as given")),
    ],
)
def test_compute_mode_is_real_on_gpu_for_small_models_or_as_asked(
    asked: str | None, device: str, model: str, expected: tuple[str, str]
) -> None:
    assert compute_mode(replace(OPTIONS, compute=asked), device, PRESETS[model]) == expected


def test_compute_mode_is_skip_for_large_models_on_cpu() -> None:
    mode, why = compute_mode(OPTIONS, "cpu", PRESETS["dsv4"])
    assert mode == "skip"
    assert why.endswith(" G weights are too many for math on a CPU")


@pytest.mark.parametrize(
    ("tp", "sizes", "on_gpu", "backend", "refused"),
    [
        (2, (1, 8), True, "gloo", True),
        (2, (1, 8), True, "nccl", False),
        (2, (1, 8), False, "gloo", False),
        (1, (1, 8), True, "gloo", False),
        (2, (), True, "gloo", False),
    ],
)
def test_cuda_graphs_with_collectives_over_gloo_are_refused(
    tp: int, sizes: tuple[int, ...], on_gpu: bool, backend: str, refused: bool
) -> None:
    graphs = ["--cuda-graphs", ",".join(map(str, sizes))] if sizes else []
    options = parsed("--model", "dsv4-tiny", "--tp", str(tp), *graphs)
    scenario = options.scenario(Environ(), policy=WarmupPolicy.NONE)
    if not refused:
        check_graphs(scenario, on_gpu=on_gpu, backend=backend)
        return
    with pytest.raises(UserError, match=r"--cuda-graphs with --tp above 1 needs NCCL"):
        check_graphs(scenario, on_gpu=on_gpu, backend=backend)


# -- start time of a process ----------------------------------------------------------------------

PRINT = "from launch.rank import process_start; print(process_start())"


def test_process_start_is_constant_and_in_the_past() -> None:
    first = process_start()
    time.sleep(0.05)
    assert process_start() == pytest.approx(first, abs=0.02)
    assert first < time.time()


@pytest.mark.parametrize("name", ["plain", "a name) with (S 1 2 brackets"])
def test_process_start_of_a_child_is_when_it_was_started(name: str, tmp_path: Path) -> None:
    """A program name with spaces and parentheses must not confuse parsing of /proc/PID/stat."""
    program = tmp_path / name
    program.symlink_to(Path(sys.executable).resolve())
    before = time.time()
    done = subprocess.run(
        [program, "-c", PRINT],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    after = time.time()
    assert before - 0.02 <= float(done.stdout) < after
