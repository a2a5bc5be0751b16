"""Where a process stands among the ranks of its job, and how it meets them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from runner.environ import Environ
from runner.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where this process stands among the job's."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(environ: Environ) -> Place:
    """This process's place, as torchrun's variables say it.

    Raises:
        UserError: a rank beyond the world's size.
    """
    rank, world = environ.rank or 0, environ.world_size or 1
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world}: torchrun sets both")
    return Place(rank, world, environ.local_rank or 0, environ.local_world_size or world)


def pick_device(wanted: str, place: Place) -> torch.device:
    """The device of ``--device``: auto, cpu or cuda; on one with several GPUs the rank's own.

    Raises:
        UserError: a GPU was asked for, and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def init_process_group(device: torch.device, *, exclusive: bool, timeout: float) -> None:
    """Meet the other ranks: over NCCL where each has a GPU of its own, else over gloo."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.setdefault(name, {"RANK": "0", "WORLD_SIZE": "1"}[name])
    backend = "cpu:gloo,cuda:nccl" if exclusive else "gloo"
    dist.init_process_group(
        backend,
        # A little longer than the deadline, which can say more about where a rank stood.
        timeout=timedelta(seconds=timeout + 30),
        device_id=device if exclusive else None,
    )
