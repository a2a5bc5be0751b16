"""Real launches, for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runner.schedule import Schedule
from tests.models import DSV3_SMALL

FEW_KERNELS = DSV3_SMALL | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
}
"""Dense layers whose GEMMs all have K = 512: a handful of kernels on each stage."""


def launch(*arguments: str, torchrun: list[str] | None = None, timeout: float = 300) -> str:
    """Run a launch and return what it printed; fails the test where it fails."""
    done = run_launch(*arguments, torchrun=torchrun, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_launch(
    *arguments: str,
    torchrun: list[str] | None = None,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    prefix = [sys.executable]
    if torchrun is not None:
        prefix += ["-m", "torch.distributed.run", *torchrun]
    command = [*prefix, "-m", "launch", *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "SGL"))}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**clean, **(env or {})},
    )


def schedule_in(path: Path) -> Schedule:
    """The operations that a launch wrote with ``--schedule``."""
    return Schedule.from_json(json.loads(path.read_text()))
