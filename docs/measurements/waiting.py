"""Seconds of the reference compile on rank 0 while the other ranks wait for it.

torchrun --nproc-per-node 8 docs/measurements/waiting.py RESULT.json

Three ways to wait, in turn: on the host in gloo, in NCCL with a host that looks every 0.2 ms as
launch's do, and in NCCL with a host that is in CUDA meanwhile. Rank r is on GPU r modulo the number
of GPUs, and each run of so many ranks is a host of its own to NCCL.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launch.device import wait_for_device
from launch.gather import machine_facts
from runner.build.compiler import NvccCompiler
from runner.config.environ import Environ
from runner.kernels.installed import find_library
from runner.kernels.nvcc import find_nvcc

WAYS = ("on the host", "in NCCL, polled", "in NCCL")
TURNS, COMPILES = 2, 3


def wait(way: str, x: torch.Tensor) -> None:
    """Meet the others in NCCL, or do not."""
    if way == "on the host":
        return
    dist.all_reduce(x)
    if way == "in NCCL":
        torch.cuda.synchronize()
    else:
        wait_for_device(x.device)


def main() -> None:
    """Let rank 0 compile beside each way to wait, and write what it took."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if world > gpus:
        os.environ["NCCL_HOSTID"] = f"virtual-node-{rank // gpus}"
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    everyone = dist.new_group(backend="gloo")
    environ = Environ.read(os.environ)
    nvcc, library = find_nvcc(environ), find_library()
    if nvcc is None or library is None:
        sys.exit("error: this needs nvcc and DeepGEMM's headers")
    compiler = NvccCompiler(nvcc, library, environ)
    x = torch.zeros(4096, device=device)
    wait("in NCCL", x)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS * TURNS:
        dist.barrier(group=everyone)
        if rank == 0:
            found[way].append(round(compiler.reference_seconds(COMPILES), 4))
        wait(way, x)
        dist.barrier(group=everyone)
    if rank == 0:
        result = {"ranks": world, "gpus": gpus, "machine": machine_facts(device), "seconds": found}
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
