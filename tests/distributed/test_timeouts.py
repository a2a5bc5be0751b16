"""A rank whose wait times out names the rank it waits for and what that rank compiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.kernels.installed import Library
from tests.distributed.launching import FEW_KERNELS, run_launch

pytest.importorskip("torch")
pytestmark = pytest.mark.distributed


@pytest.fixture
def slow_nvcc(tmp_path: Path) -> Path:
    """An nvcc that compiles for longer than the time-out."""
    path = tmp_path / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then\n'
        '    echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0\n'
        "fi\n"
        "sleep 20\n"
        "exit 1\n"
    )
    path.chmod(0o755)
    return path


def test_timeout_names_the_late_rank_and_what_it_compiles(
    library: Library, slow_nvcc: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FEW_KERNELS))
    done = run_launch(
        "--pp 2 --virtual-nodes 2 --compute skip --batch-sizes 1 --device cpu --warmup none",
        "--nccl-timeout 3 --model",
        config,
        env={"DG_JIT_NVCC_COMPILER": str(slow_nvcc)},
    )
    assert done.returncode == 1
    words = (
        "hidden_states waited 3 s for rank 0, the limit of --nccl-timeout: "
        "rank 0 compiles transpose_fp32"
    )
    assert done.stderr.splitlines() == [
        f"error: rank 1: {words}",
        f"error: rank 1 failed: CommunicationTimeoutError: {words}",
    ]
    assert "Traceback" not in done.stdout
