"""One rank of a launch: build, warm up, serve, and send the spans to rank 0."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from launch.comm import ScratchComm, TorchComm, make_groups
from launch.device import Device
from launch.gather import Logits, RankRecord, RunResult, find_stalls, gather, machine_facts
from launch.jit import RankJit, set_up_jit
from launch.kernel_store import NodeKernels
from launch.limits import Deadline
from launch.loaders import CompileLocks
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from launch.rank import Rank
from launch.rank_sink import RankSink, split_loads
from runner.backend.base import Backend
from runner.backend.gemm_walks import ExecutionHook
from runner.backend.step_runner import Communicator, KernelStore, OpSink
from runner.backend.torch_math import TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.config.environ import Environ, available_cores
from runner.driver.run import run_rank
from runner.driver.warmup import execution_hook
from runner.model.model_runner import ModelRunner
from runner.planning.weight_size import model_elements
from runner.report.console import counted
from runner.watch.shim import FINISHED, read_records


def run_worker(options: LaunchOptions, environ: Environ, work_dir: Path | None) -> RunResult | None:
    """Run this rank, from joining the process group to gathering the Timeline on rank 0.

    Args:
        options: the launch, of one policy.
        environ: the environment, which says what rank this is.
        work_dir: temporary directory, removed by the process that started the ranks; None makes
            one and removes it after a successful run.

    Raises:
        UserError: bad options or environment variables.
        runner.build.compiler.CompileError: a kernel does not compile.
    """
    with Deadline(options.timeout, environ.rank) as deadline:
        rank = Rank.connect(options, environ)
        folder = work_dir or _shared_work_dir()
        torch.set_num_threads(max(1, available_cores() // environ.ranks_on_host))
        result = _run(rank, folder, deadline)
    # Only after a successful run: if a rank failed, the others may still need the folder.
    dist.barrier()
    if environ.local_rank == 0 and work_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    dist.destroy_process_group()
    return result


def _shared_work_dir() -> Path:
    """A temporary directory with the same name on every node."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
    path = Path(tempfile.gettempdir()) / f"deepgemm-coldstart-{name[0]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _run(rank: Rank, work_dir: Path, deadline: Deadline) -> RunResult | None:
    options, scenario, number = rank.options, rank.scenario, rank.number
    groups = make_groups(scenario.parallel, rank.communication_timeout)
    rank.phases.append(("weights", time.time()))
    jit = set_up_jit(rank, work_dir)
    store = NodeKernels(rank, jit, groups) if jit.compiler else None
    real = rank.compute == "real"
    device = Device(rank.device if real else torch.device("cpu"), rank.link)
    comm = TorchComm(groups, rank.device, rank.link) if real else ScratchComm(groups)
    sink = _make_sink(rank, jit, device, store)
    deadline.where = lambda: sink.last
    if number == 0:
        print(_introduction(rank, jit), flush=True)
    hook = _execution_hook(rank)
    runner = build_runner(rank, jit, sink, comm, kernels=store, hook=hook)
    device.synchronise()
    setup = rank.setup_spans(time.time())
    dist.barrier()
    logits = Logits(options.logits, scenario.parallel, number)
    with torch.inference_mode():
        run_rank(runner, scenario, logits.keep)
    comm.finish()
    device.synchronise()
    device.release_graphs()
    logits.save()
    compiles = [record for record in read_records(jit.log_dir) if record.rank == number]
    spans = split_loads([*setup, *sink.spans, *(store.spans if store else ())], compiles)
    record = RankRecord(
        started=rank.phases[0][1],
        spans=spans,
        ops=sink.ops,
        coverage=store.coverage() if store else None,
        stalls=find_stalls(spans, sink.served),
        walk_memory=None if hook.least == inf else hook.least,
    )
    return gather(record, scenario, _facts(rank, jit))


def _make_sink(rank: Rank, jit: RankJit, device: Device, store: NodeKernels | None) -> RankSink:
    """The rank's sink; rank 0's prints at each forward how many kernels were compiled so far."""
    began = time.time()

    def report(phase: str, name: str) -> None:
        compiles = len(list(jit.log_dir.glob(FINISHED))) + (store.built if store else 0)
        seconds = time.time() - began
        print(f"{seconds:7.1f} s  {phase}: {name}, {compiles} compiles so far", flush=True)

    return RankSink(
        rank.number,
        jit.loader,
        device,
        rank.wait_limit(jit.log_dir),
        locks=CompileLocks(jit.cache.root) if rank.scenario.compile_lock and jit.cache else None,
        on_forward=report if rank.number == 0 else None,
    )


def build_runner(
    rank: Rank,
    jit: RankJit,
    sink: OpSink,
    comm: Communicator,
    *,
    kernels: KernelStore | None = None,
    hook: ExecutionHook | None = None,
) -> ModelRunner:
    """Build the rank's part of the model, with weights if it does real math."""
    scenario, model = rank.scenario, rank.scenario.model
    math: TorchMath | None = None
    weights: TorchWeights | None = None
    if rank.compute == "real":
        math = TorchMath(rank.device, jit.entry_points)
        share = model_elements(model) > REAL_MATH_LIMIT
        weights = TorchWeights(rank.options.seed, rank.device, share=share)
    backend = Backend(
        sink,
        scenario.num_sms,
        math,
        comm,
        kernels,
        bf16_fp32_algo=scenario.bf16_fp32_algo,
        hook=hook or ExecutionHook(),
    )
    return ModelRunner.build(
        model,
        scenario.parallel,
        rank.number,
        backend=backend,
        weights=weights,
        overlap=scenario.overlap,
    )


def _execution_hook(rank: Rank) -> ExecutionHook:
    """What this rank walks, limited by its GPU's free memory; a CPU has no limit."""

    def free() -> float:
        if rank.device.type != "cuda":
            return inf
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(rank.device)[0])

    def warn(line: str) -> None:
        print(f"[rank {rank.number}] warning: {line}", flush=True)

    return execution_hook(rank.scenario, rank.number, free, warn)


def _introduction(rank: Rank, jit: RankJit) -> str:
    scenario, parallel = rank.scenario, rank.scenario.parallel
    sizes = ",".join(map(str, scenario.resolved_batch_sizes))
    return (
        f"{scenario.model.name}, {counted(scenario.model.num_hidden_layers, 'layer')}: "
        f"pp {parallel.pp} x tp {parallel.tp} = {parallel.world_size} ranks over {rank.link} on "
        f"{rank.device.type}, {counted(parallel.nodes, 'node')}, {scenario.num_sms} SMs\n"
        f"policy {scenario.policy.value}, batch sizes {sizes}, "
        f"math: {rank.compute} ({rank.reason})\n"
        f"JIT: {jit.description}"
    )


def _facts(rank: Rank, jit: RankJit) -> dict[str, object]:
    """Facts about this run that the Timeline's metadata has besides the scenario."""
    here = rank.environ.ranks_on_host
    gpus = torch.cuda.device_count() if rank.device.type == "cuda" else here
    return {
        "device": rank.device.type,
        "link": rank.link,
        "compute": rank.compute,
        "jit": jit.description,
        "hosts": rank.environ.hosts,
        "ranks_per_gpu": -(-here // gpus),
        "machine": {**machine_facts(rank.device), "probe": rank.options.probed},
    }
