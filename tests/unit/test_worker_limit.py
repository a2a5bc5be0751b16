"""How a rank of a launch limits its waits, by what its tensors go over."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from launch import worker
from launch.options import LaunchOptions
from launch.place import Place
from launch.wait_limit import WaitLimit
from launch.watchdog import CommunicationTimeoutError
from runner.schedule import Recv

WAITED = "hidden_states waited 1 s for rank {}, the limit of --nccl-timeout: {}"


def limit_of(link: str, log_dir: Path) -> WaitLimit:
    """That of rank 9 of 16, the second of eight on its host."""
    nothing: Any = None
    run = worker._RankRun(
        LaunchOptions(nccl_timeout=1.0),
        nothing,
        nothing,
        Place(9, 16, 1, 8),
        nothing,
        log_dir,
        nothing,
        "nccl",
        [],
        link=link,
    )
    return run._wait_limit(log_dir)


@pytest.mark.parametrize(
    ("peer", "known"),
    [(8, "none of them is compiling"), (7, "rank 7 cannot be seen from this host")],
)
def test_over_nccl_the_process_ends_wherever_its_host_is(
    peer: int, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, str]] = []
    over = threading.Event()

    def end(rank: int, error: Exception) -> None:
        ended.append((rank, str(error)))
        over.set()

    monkeypatch.setattr(worker, "end_process", end)
    with limit_of("nccl", tmp_path).over(Recv("hidden_states", peer, 64)):
        assert over.wait(30)
    assert ended == [(9, WAITED.format(peer, known))]


def test_over_gloo_its_error_says_more(tmp_path: Path) -> None:
    limit = limit_of("gloo", tmp_path)
    with (
        pytest.raises(CommunicationTimeoutError) as caught,
        limit.over(Recv("hidden_states", 8, 64)),
    ):
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")
    assert str(caught.value) == WAITED.format(8, "none of them is compiling")
