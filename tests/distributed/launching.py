"""Helpers that run real launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runner.schedule import Schedule
from tests.models import DSV3_SMALL
from tests.schedules import schedule_from_json

FEW_KERNELS = DSV3_SMALL | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
}
"""Dense layers whose GEMMs all have K = 512, so that each stage needs only a few kernels."""


def split(*arguments: str | Path) -> list[str]:
    """Command line words from strings, which are split, and paths, which are not."""
    words: list[str] = []
    for argument in arguments:
        words += [str(argument)] if isinstance(argument, Path) else argument.split()
    return words


def launch(*arguments: str | Path, torchrun: str | None = None, timeout: float = 300) -> str:
    """Run a launch that must succeed, and return its output."""
    done = run_launch(*arguments, torchrun=torchrun, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_launch(
    *arguments: str | Path,
    torchrun: str | None = None,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a launch, optionally under torchrun with these arguments."""
    prefix = "" if torchrun is None else f"-m torch.distributed.run {torchrun}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "SGL"))}
    return subprocess.run(
        [sys.executable, *split(prefix, "-m launch", *arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**clean, **(env or {})},
    )


def read_schedule(path: Path) -> Schedule:
    """The operations that a launch wrote with ``--schedule``."""
    return schedule_from_json(json.loads(path.read_text()))
