"""No GPU is handed to two at a time; needs none."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gpu.handing_out import GpuPool


def use(folder: Path, wanted: int) -> list[tuple[int, float, float]]:
    """Take GPUs for a moment: which, and from when to when."""
    with GpuPool(3, folder).take(wanted) as gpus:
        start = time.monotonic()
        time.sleep(0.05)
        return [(gpu, start, time.monotonic()) for gpu in gpus]


def test_workers_never_share_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        wanted = [1, 2, 3, 1, 2, 1, 3, 1]
        used = [*pool.map(use, [tmp_path] * len(wanted), wanted)]
    assert [len(its) for its in used] == wanted
    for gpu in range(3):
        times = sorted((start, end) for its in used for g, start, end in its if g == gpu)
        assert times
        assert all(end <= start for (_, end), (start, _) in pairwise(times))


def test_who_lets_go_lets_another_have_it(tmp_path: Path) -> None:
    pool, got = GpuPool(1, tmp_path), threading.Event()

    def other() -> None:
        with pool.take(1):
            got.set()

    thread = threading.Thread(target=other)
    with pool.take(1) as gpus:
        assert gpus == [0]
        thread.start()
        assert not got.wait(0.2)
    assert got.wait(10)
    thread.join()


@pytest.mark.parametrize("wanted", [0, 3])
def test_more_than_there_are_is_an_error(tmp_path: Path, wanted: int) -> None:
    with (
        pytest.raises(ValueError, match=f"{wanted} GPUs are wanted of 2"),
        GpuPool(2, tmp_path).take(wanted),
    ):
        pass
