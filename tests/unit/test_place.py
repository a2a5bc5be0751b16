"""What ranks meet over, by devices and nodes."""

from __future__ import annotations

import pytest

from launch.cli import main
from runner.errors import UserError

torch = pytest.importorskip("torch")

from launch.place import Place, pick_backend  # noqa: E402


def picked(
    wanted: str, monkeypatch: pytest.MonkeyPatch, *, gpus: int, local: int, per_node: int
) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    place = Place(0, local, 0, local)
    return pick_backend(wanted, torch.device("cuda" if gpus else "cpu"), place, per_node)


@pytest.mark.parametrize(
    ("wanted", "gpus", "local", "per_node", "backend"),
    [
        ("auto", 0, 8, 8, "gloo"),
        ("auto", 1, 8, 8, "gloo"),
        ("auto", 7, 8, 8, "gloo"),
        ("auto", 8, 8, 8, "nccl"),
        ("auto", 8, 4, 2, "nccl"),
        ("auto", 1, 1, 1, "nccl"),
        # Virtual nodes alone do not change what a run is over: NCCL among them is asked for.
        ("auto", 2, 8, 2, "gloo"),
        ("gloo", 8, 8, 8, "gloo"),
        ("gloo", 0, 1, 1, "gloo"),
        ("nccl", 8, 8, 8, "nccl"),
        ("nccl", 2, 8, 2, "nccl"),
        ("nccl", 1, 8, 1, "nccl"),
    ],
)
def test_nccl_where_each_rank_has_a_gpu_of_its_own(
    wanted: str,
    gpus: int,
    local: int,
    per_node: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert picked(wanted, monkeypatch, gpus=gpus, local=local, per_node=per_node) == backend


def test_nccl_without_a_gpu_for_each_rank_of_a_node_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"4 ranks of a node would share 2 GPU\(s\)") as caught:
        picked("nccl", monkeypatch, gpus=2, local=8, per_node=4)
    assert "--virtual-nodes of at most 2 rank(s) each can share them" in str(caught.value)
    with pytest.raises(UserError, match=r"--backend nccl: .* the ranks run on CPUs"):
        picked("nccl", monkeypatch, gpus=0, local=8, per_node=1)


def test_nccl_without_gpus_is_refused_once_for_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--model", "dsv4-tiny", "--pp", "2", "--backend", "nccl"]) == 2
    assert capsys.readouterr().err == (
        "error: --backend nccl: it moves what is on a GPU, and the ranks run on CPUs\n"
    )


def test_nccl_without_math_is_refused_before_a_rank_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--model", "dsv4-tiny", "--backend", "nccl", "--compute", "skip"]) == 2
    assert capsys.readouterr().err == (
        "error: --backend nccl with --compute skip: without math nothing is on a GPU\n"
    )
