"""GpuPool never reserves a GPU twice at a time; needs no GPU."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gpu.gpu_pool import GpuPool


def use(folder: Path, wanted: int) -> list[tuple[int, float, float]]:
    """Take GPUs for a moment; returns (GPU, start, end) of each."""
    with GpuPool(3, folder).take(wanted) as gpus:
        start = time.monotonic()
        time.sleep(0.05)
        return [(gpu, start, time.monotonic()) for gpu in gpus]


def test_concurrent_workers_never_share_a_gpu(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        wanted = [1, 2, 3, 1, 2, 1, 3, 1]
        used = [*pool.map(use, [tmp_path] * len(wanted), wanted)]
    assert [len(its) for its in used] == wanted
    for gpu in range(3):
        times = sorted((start, end) for its in used for g, start, end in its if g == gpu)
        assert times
        assert all(end <= start for (_, end), (start, _) in pairwise(times))


def test_released_gpu_is_given_to_a_waiting_test(tmp_path: Path) -> None:
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
def test_taking_an_impossible_number_of_gpus_is_an_error(tmp_path: Path, wanted: int) -> None:
    with (
        pytest.raises(ValueError, match=f"{wanted} GPUs are wanted of 2"),
        GpuPool(2, tmp_path).take(wanted),
    ):
        pass
