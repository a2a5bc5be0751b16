"""GPUs for tests, as many as each asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.handing_out import GpuPool
from tests.gpu.runs import Gpus


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def gpus(shared_folder: Path, tmp_path: Path) -> Gpus:
    """Launches on GPUs that no other test has meanwhile."""
    torch = pytest.importorskip("torch")
    pool = GpuPool(torch.cuda.device_count(), shared_folder)
    return Gpus(pool.count, pool.take, shared_folder, tmp_path)
