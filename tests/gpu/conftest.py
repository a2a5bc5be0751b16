"""GPUs for tests, as many as each asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gpu.handing_out import GpuPool

Take = Callable[[int], dict[str, str]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def take_gpus(shared_folder: Path) -> Iterator[Take]:
    """Takes GPUs until the test ends; gives the environment of a process that sees only these.

    Skips where the machine has fewer.
    """
    torch = pytest.importorskip("torch")
    pool = GpuPool(torch.cuda.device_count(), shared_folder)
    with ExitStack() as held:

        def take(wanted: int) -> dict[str, str]:
            if pool.count < wanted:
                pytest.skip(f"needs {wanted} GPUs, and there are {pool.count}")
            taken = held.enter_context(pool.take(wanted))
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, taken))}

        yield take
