"""Where a process stands among the ranks of its job, and how it meets them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

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


def check_nccl(device: str, ranks_per_node: int) -> None:
    """Check that NCCL can connect the ranks of a node.

    Args:
        device: what ranks run on, or ``auto``.
        ranks_per_node: ranks of a node, maybe a virtual one.

    Raises:
        UserError: there is no GPU, or not one for each.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        raise UserError("--backend nccl: it moves what is on a GPU, and the ranks run on CPUs")
    if ranks_per_node > gpus:
        raise UserError(
            f"--backend nccl: {ranks_per_node} ranks of a node would share {gpus} GPU(s), which "
            f"NCCL refuses; --virtual-nodes of at most {gpus} rank(s) each can share them"
        )


def pick_backend(wanted: str, device: torch.device, place: Place, ranks_per_node: int) -> str:
    """What CUDA tensors go over, of ``--backend``: ``nccl`` or ``gloo``.

    ``auto`` takes NCCL where each rank of this machine has a GPU of its own.

    Raises:
        UserError: see :func:`check_nccl`.
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
        device: the rank's.
        place: where it stands.
        backend: see :func:`pick_backend`.
        node: the rank's node, maybe a virtual one.
        timeout: seconds that a communication may wait.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.setdefault(name, {"RANK": "0", "WORLD_SIZE": "1"}[name])
    if backend == "nccl" and place.local_world_size > torch.cuda.device_count():
        # NCCL lets two ranks of one host share no GPU, and this is what it tells hosts apart by.
        os.environ["NCCL_HOSTID"] = f"virtual-node-{node}"
    # Stages send and receive in one order, so that it costs nothing that NCCL keeps to it.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        # A little longer than the deadline, which can say more about where a rank stood.
        timeout=timedelta(seconds=timeout + 30),
        device_id=None if backend == "gloo" else device,
    )


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device, in the numbers that kernels are chosen by.

    Raises:
        UserError: a GPU that DeepGEMM has no kernels for.
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
