"""Fixtures that reserve GPUs for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.gpu_pool import GpuPool
from tests.gpu.runs import Gpus


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all pytest-xdist workers share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def gpus(shared_folder: Path, tmp_path: Path) -> Gpus:
    """Runs launches on GPUs that no other test uses meanwhile."""
    torch = pytest.importorskip("torch")
    pool = GpuPool(torch.cuda.device_count(), shared_folder)
    return Gpus(pool.count, pool.take, shared_folder, tmp_path)
