"""Where a process stands among the ranks of its job, on which device, and how it meets them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runner.config.environ import Environ
from runner.errors import UserError
from runner.standin.gpus import GPUS, Gpu, gpu_named


@dataclass(frozen=True)
class Place:
    """Where this process stands among the job's."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_START_TIME = 21
"""Field of /proc/PID/stat, counted from 0."""


def process_start() -> float:
    """Seconds since the epoch at which the kernel started this process, to about 10 ms."""
    # The second field is the program's name in brackets, which may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME - 2]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def find_place(environ: Environ) -> Place:
    """This process's place, from torchrun's variables.

    Raises:
        UserError: a rank beyond the world's size.
    """
    rank, world = environ.rank or 0, environ.world_size or 1
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world}: torchrun sets both")
    return Place(rank, world, environ.local_rank or 0, environ.local_world_size or world)


def pick_device(wanted: str, place: Place) -> torch.device:
    """The device that ``--device`` (auto, cpu or cuda) means on this rank.

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


def check_nccl(device: str, ranks_per_node: int) -> None:
    """Check that NCCL can connect the ranks of a node.

    Args:
        device: what ranks run on, or ``auto``.
        ranks_per_node: ranks of a real or virtual node.

    Raises:
        UserError: there is no GPU, or not one for each rank.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        raise UserError("--backend nccl moves data on GPUs, but the ranks run on CPUs")
    if ranks_per_node > gpus:
        raise UserError(
            f"--backend nccl: {ranks_per_node} ranks of a node would share {gpus} GPU(s), which "
            f"NCCL refuses; --virtual-nodes of at most {gpus} rank(s) each can share them"
        )


def pick_backend(wanted: str, device: torch.device, place: Place, ranks_per_node: int) -> str:
    """What ``--backend`` (auto, nccl or gloo) means here: ``nccl`` or ``gloo``.

    ``auto`` is NCCL if each rank of this machine has a GPU of its own.

    Raises:
        UserError: NCCL cannot connect the ranks of a node.
    """
    if wanted == "nccl":
        check_nccl(device.type, ranks_per_node)
    if wanted != "auto":
        return wanted
    own = device.type == "cuda" and torch.cuda.device_count() >= place.local_world_size
    return "nccl" if own else "gloo"


def init_process_group(
    device: torch.device, place: Place, *, backend: str, node: int, timeout: float
) -> None:
    """Meet the other ranks.

    Args:
        device: the rank's device.
        place: its place.
        backend: ``nccl`` or ``gloo``.
        node: its real or virtual node.
        timeout: seconds that the whole run may take.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if backend == "nccl" and place.local_world_size > torch.cuda.device_count():
        # NCCL refuses two ranks of one host on one GPU; this is how it recognises a host.
        os.environ["NCCL_HOSTID"] = f"virtual-node-{node}"
    # NCCL keeps sends and receives in order; stages never need another one.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        # A little longer than our own deadline, which says more about where a rank was.
        timeout=timedelta(seconds=timeout + 30),
        device_id=None if backend == "gloo" else device,
    )


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device, with the numbers that decide which kernels run.

    Raises:
        UserError: DeepGEMM has no kernels for it.
    """
    found = torch.cuda.get_device_properties(device)
    named = {gpu.device_name: gpu for gpu in reversed(GPUS)}
    alike = {(gpu.major, gpu.minor): gpu for gpu in reversed(GPUS)}
    gpu = named.get(found.name) or alike.get((found.major, found.minor))
    if gpu is None:
        raise UserError(
            f"{found.name} has compute capability {found.major}.{found.minor}: DeepGEMM has no "
            "kernels for it; use --device cpu"
        )
    return gpu_named(gpu.name, found.multi_processor_count)
