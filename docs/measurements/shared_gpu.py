"""Seconds of NCCL's collectives among ranks that share GPUs, as virtual nodes do.

torchrun --nproc-per-node 8 docs/measurements/shared_gpu.py RESULT.json

Rank r is on GPU r modulo the number of GPUs, and each run of so many ranks is a host of its own to
NCCL. What a profile says of ``gpu.time_slice`` is from here: small messages, so that what is
measured is the waiting for each other's turns at the GPUs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from launch.gather import machine_facts

CALLS, BYTES = 40, 8192


def median_seconds(call: Callable[[], object]) -> float:
    """Of one call that ends on the GPU before the next begins; all ranks make it."""
    found = []
    call()
    dist.barrier()
    for _ in range(CALLS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return sorted(found)[CALLS // 2]


def hand_round(x: torch.Tensor, y: torch.Tensor, step: int) -> None:
    """Send to the rank ``step`` further on, and receive from the one as far before."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ends = [
        dist.P2POp(dist.isend, x, (rank + step) % world),
        dist.P2POp(dist.irecv, y, (rank - step) % world),
    ]
    for work in dist.batch_isend_irecv(ends):
        work.wait()


def collectives(gpus: int) -> list[list[object]]:
    """[kind, ranks, ranks a GPU, bytes of a rank's input, seconds] of each."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), []
    x = torch.zeros(BYTES // 2, dtype=torch.bfloat16, device="cuda")
    for size in sorted({min(2, world), world}):
        groups = [dist.new_group(list(range(at, at + size))) for at in range(0, world, size)]
        group = groups[rank // size]
        wide = torch.zeros(size * BYTES // 2, dtype=torch.bfloat16, device="cuda")
        part, other = x[: BYTES // 2 // size].clone(), x.clone()
        runs = {
            "all_reduce": partial(dist.all_reduce, x, group=group),
            "all_gather": partial(dist.all_gather_into_tensor, wide, x, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, x, group=group),
            "all_to_all": partial(dist.all_to_all_single, other, x, group=group),
        }
        for kind, run in runs.items():
            found.append([kind, size, world // gpus, BYTES, median_seconds(run)])
    passed = median_seconds(partial(hand_round, x, x.clone(), gpus))
    found.append(["send", world, world // gpus, BYTES, passed])
    return found


if __name__ == "__main__":
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    os.environ["NCCL_HOSTID"] = f"virtual-node-{rank // gpus}"
    torch.cuda.set_device(rank % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank % gpus))
    data = {"collectives": collectives(gpus), "nccl": list(torch.cuda.nccl.version())}
    if rank == 0:
        data["machine"] = machine_facts(torch.device("cuda", 0))
        Path(sys.argv[1]).write_text(json.dumps(data))
        print("wrote", sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
