"""Seconds of single kernels and collectives, each in a CUDA graph of many.

torchrun --nproc-per-node 2 docs/measurements/parts.py RESULT.json

What a profile says of its GPU and its ``nvlink`` is held against this. Kernels take turns over
buffers that the GPU's cache does not hold.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from launch.gather import machine_facts
from runner.config.environ import Environ
from runner.deep_gemm_wrapper.calls import make_call
from runner.deep_gemm_wrapper.configurer import import_deep_gemm
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.kernels.installed import find_library
from runner.kernels.nvcc import find_nvcc
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

CALLS, ROUNDS, COPIES_BYTES = 24, 5, 200e6
SHAPES = [
    (T.GEMM_NT_F8F8BF16, 1536, 4096, 1),
    (T.GEMM_NT_F8F8BF16, 16384, 1024, 1),
    (T.GEMM_NT_F8F8BF16, 4096, 4096, 1),
    (T.GEMM_NT_F8F8BF16, 4096, 2048, 1),
    (T.TF32_HC_PRENORM_GEMM, 24, 16384, 16),
    (T.GEMM_NT_BF16BF16F32, 256, 4096, 1),
    (T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 4096, 4096, 32),
]
MS = (16, 64, 256, 1024, 4096)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26)


def seconds_each(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of ``CALLS`` calls, of several in turn, in a graph; the median round."""
    turns = [calls[index % len(calls)] for index in range(CALLS)]
    for call in turns:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    found = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / CALLS)
    return sorted(found)[ROUNDS // 2]


def kernels() -> list[list[object]]:
    """[type, m, n, k, groups, SMs, seconds] of each."""
    nvcc = find_nvcc(Environ.read(os.environ))
    assert nvcc is not None
    library = find_library()
    assert library is not None
    lib = import_deep_gemm(library.root, cache_dirs="/tmp/parts-cache", nvcc=nvcc, pdl=False)
    wrapper = DeepGemmWrapper(lib, sanity_check=False)
    found: list[list[object]] = []
    for kind, n, k, groups in SHAPES:
        for sms in (132, 112) if kind is T.GEMM_NT_F8F8BF16 else (132,):
            copies = max(1, min(CALLS, int(COPIES_BYTES / (groups * n * k))))
            shape = GemmShape(kind, n, k, groups, sms)
            calls = [make_call(wrapper, shape, MS[-1]) for _ in range(copies)]
            for m in MS:
                if kind is not T.GROUPED_GEMM_NT_F8F8BF16_CONTIG or m % 128 == 0:
                    with wrapper.configure_deep_gemm_num_sms(sms), torch.inference_mode():
                        each = seconds_each([partial(call, m) for call in calls])
                    found.append([kind.name, m, n, k, groups, sms, each])
    return found


def collectives() -> list[list[object]]:
    """[kind, ranks, bytes of a rank's input, seconds] of each."""
    world, found = dist.get_world_size(), []
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device="cuda")
        wide = torch.zeros(world * size // 2, dtype=torch.bfloat16, device="cuda")
        part, other = x[: size // 2 // world].clone(), x.clone()
        runs = {
            "all_reduce": partial(dist.all_reduce, x),
            "all_gather": partial(dist.all_gather_into_tensor, wide, x),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, x),
            "all_to_all": partial(dist.all_to_all_single, other, x),
        }
        for kind, run in runs.items():
            dist.barrier()
            found.append([kind, world, size, seconds_each([run])])
    return found


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    data = {"collectives": collectives()}
    if rank == 0:
        data["kernels"] = kernels()
        data["machine"] = machine_facts(torch.device("cuda", 0))
        Path(sys.argv[1]).write_text(json.dumps(data))
        print("wrote", sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
