"""One rank of a launch: build, warm up, serve, and hand its spans to rank 0."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from launch.comm import Groups, ScratchComm, TorchComm, make_groups
from launch.device import Device
from launch.gather import Logits, RankRecord, RunResult, find_stalls, gather, machine_facts
from launch.jit import RankJit, set_up_jit
from launch.kernel_store import NodeKernels
from launch.limits import TORCH_TIMEOUTS, Deadline, NcclWaitLimit, WaitingRank, WaitLimit
from launch.loaders import CompileLocks
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from launch.place import (
    Place,
    find_place,
    gpu_of,
    init_process_group,
    pick_backend,
    pick_device,
    process_start,
)
from launch.rank_sink import RankSink, compiled_identity, split_loads
from runner.backend.base import Backend
from runner.backend.communicator import Communicator
from runner.backend.gemm_walks import ExecutionHook
from runner.backend.kernel_store import KernelStore, NoKernels
from runner.backend.math import Math
from runner.backend.shapes import ShapeMath, ShapeWeights
from runner.backend.sink import OpSink
from runner.backend.torch_math import TorchBuffers, TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.backend.weights import WeightSource
from runner.config.environ import Environ, available_cores
from runner.config.model import ModelConfig
from runner.driver.model_runner import BufferSource, ModelRunner, NoBuffers
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError
from runner.planning.weight_size import model_elements
from runner.scenario import Scenario, run_rank
from runner.timeline import Span
from runner.watch.shim import FINISHED, read_records


@dataclass(frozen=True)
class Rank:
    """What one rank runs, and where.

    Attributes:
        options: the launch.
        environ: the environment.
        scenario: what is run.
        place: where this process stands among the ranks.
        device: the rank's device.
        link: what tensors go over, ``nccl`` or ``gloo``.
        compute: ``real``, or ``skip`` for shapes alone.
        reason: why it is that.
    """

    options: LaunchOptions
    environ: Environ
    scenario: Scenario
    place: Place
    device: torch.device
    link: str
    compute: str = "real"
    reason: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does math."""
        return self.device.type == "cuda" and self.compute == "real"

    @property
    def communication_timeout(self) -> float:
        """Seconds that a communication may take."""
        given = self.options.nccl_timeout
        return TORCH_TIMEOUTS[self.link] if given is None else given

    def wait_limit(self, log_dir: Path) -> WaitLimit:
        """What ends communication that takes too long; ``log_dir`` holds this host's compiles."""
        place = self.place
        first = place.rank - place.local_rank
        host_ranks = range(first, first + place.local_world_size)
        waiting = WaitingRank(place.rank, self.communication_timeout, log_dir, host_ranks)
        return NcclWaitLimit(waiting) if self.link == "nccl" else WaitLimit(waiting)


def run_worker(
    options: LaunchOptions,
    environ: Environ,
    policy: WarmupPolicy,
    *,
    say: Callable[[str], None],
    work_dir: Path | None,
) -> RunResult | None:
    """Run this rank from its process group to the gathered Timeline, which rank 0 returns.

    Args:
        options: the launch.
        environ: the environment, which holds this rank's place.
        policy: the policy to run.
        say: prints a line on rank 0.
        work_dir: temporary directory that a parent process will remove; None makes one and removes
            it after a good end.

    Raises:
        UserError: bad input.
        runner.build.compiler.CompileError: a kernel does not compile.
    """
    place = find_place(environ)
    device = pick_device(options.device, place)
    gpu = gpu_of(device) if device.type == "cuda" else options.meant_gpu
    scenario = options.scenario(environ, gpu=gpu, policy=policy)
    with Deadline(options.timeout, place.rank) as deadline:
        starts = [("imports", process_start()), ("process group", time.time())]
        parallel = scenario.parallel
        backend = pick_backend(options.backend, device, place, parallel.ranks_per_node)
        node = parallel.node_of(place.rank)
        init_process_group(device, place, backend=backend, node=node, timeout=options.timeout)
        folder = work_dir or _shared_work_dir()
        compute, reason = compute_mode(options, device.type, scenario.model)
        # Without math the buffers are host memory, so they go over gloo even where there is NCCL.
        link = backend if compute == "real" else "gloo"
        rank = Rank(options, environ, scenario, place, device, link, compute, reason)
        check_graphs(scenario, on_gpu=rank.on_gpu, backend=backend)
        result = _run(rank, folder, deadline, starts, say)
    # Only after a good end: with a rank gone, the others would miss the folder or wait for it.
    dist.barrier()
    if place.local_rank == 0 and work_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    dist.destroy_process_group()
    return result


def compute_mode(options: LaunchOptions, device: str, model: ModelConfig) -> tuple[str, str]:
    """``real`` or ``skip``, and why."""
    if options.compute is not None:
        return options.compute, "as asked"
    if device == "cuda":
        return "real", "on a GPU"
    total = model_elements(model)
    if total > REAL_MATH_LIMIT:
        return "skip", f"{total / 1e9:.0f} G weights are too many for math on a CPU"
    return "real", "the model is small"


def check_graphs(scenario: Scenario, *, on_gpu: bool, backend: str) -> None:
    """Check that CUDA graphs can hold the forwards that are to be captured.

    Args:
        scenario: what is run.
        on_gpu: whether a GPU does math.
        backend: what its tensors go over, ``nccl`` or ``gloo``.

    Raises:
        UserError: a forward that is to be captured goes through the host.
    """
    sizes = scenario.warmup.graph_batch_sizes
    if sizes and on_gpu and backend == "gloo" and scenario.parallel.tp > 1:
        raise UserError(
            "--cuda-graphs with --tp above 1 needs NCCL: over gloo the collectives of a "
            "forward go through the host, which no graph can hold"
        )


def _shared_work_dir() -> Path:
    """A temporary directory with the same name on every node."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
    path = Path(tempfile.gettempdir()) / f"deepgemm-coldstart-{name[0]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _run(
    rank: Rank,
    work_dir: Path,
    deadline: Deadline,
    starts: list[tuple[str, float]],
    say: Callable[[str], None],
) -> RunResult | None:
    """Run a rank that has met the others; ``starts`` are the phases so far."""
    options, scenario, number = rank.options, rank.scenario, rank.place.rank
    torch.set_num_threads(max(1, available_cores() // rank.place.local_world_size))
    groups = make_groups(scenario.parallel, rank.communication_timeout, rank.link)
    starts.append(("weights", time.time()))
    jit = set_up_jit(options, rank.environ, scenario, number, work_dir, library=rank.on_gpu)
    store = _node_kernels(rank, jit, groups)
    device = Device(rank.device if rank.compute == "real" else torch.device("cpu"), rank.link)
    locks = CompileLocks(jit.cache.root) if options.compile_lock and jit.cache else None
    limit = rank.wait_limit(jit.log_dir)
    progress = _Progress(jit.log_dir, store, say)
    sink = RankSink(number, jit.loader, device, limit, locks=locks, on_forward=progress.show)
    deadline.sink = sink
    comm = TorchComm(groups, rank.device, rank.link)
    for line in _introduction(rank, jit):
        say(line)
    memory = _WalkMemory(rank)
    hook = scenario.hook(number, memory.free, memory.warn)
    runner = build_runner(rank, jit, sink, comm, kernels=store, hook=hook)
    device.synchronise()
    setup = _setup_spans(number, starts, time.time())
    dist.barrier()
    logits = Logits(options.logits, scenario.parallel, number)
    with torch.inference_mode():
        run_rank(runner, scenario, logits.keep)
    comm.finish()
    device.synchronise()
    device.release_graphs()
    logits.save()

    compiles = [record for record in read_records(jit.log_dir) if record.rank == number]
    names = [compiled_identity(record) for record in compiles]
    builds = store.spans if store else []
    record = RankRecord(
        started=starts[0][1],
        spans=split_loads([*setup, *builds, *sink.spans], compiles),
        ops=sink.ops,
        coverage=store.coverage(scenario.plan) if store else None,
        stalls=find_stalls(compiles, sink.forwards, names, number),
        walk_memory=memory.least,
    )
    return gather(record, scenario, _facts(rank, jit))


def _node_kernels(rank: Rank, jit: RankJit, groups: Groups) -> NodeKernels | None:
    """Where kernels come from; None if nothing is compiled."""
    if jit.compiler is None or jit.cache is None:
        return None
    nodes_here = max(1, rank.place.local_world_size // rank.scenario.parallel.ranks_per_node)
    return NodeKernels(
        rank=rank.place.rank,
        scenario=rank.scenario,
        cache=jit.cache,
        compiler=jit.compiler,
        loader=jit.loader,
        groups=groups,
        workers=max(1, available_cores() // nodes_here),
    )


def build_runner(
    rank: Rank,
    jit: RankJit,
    sink: OpSink,
    comm: TorchComm,
    *,
    kernels: KernelStore | None = None,
    hook: ExecutionHook | None = None,
) -> ModelRunner:
    """Build the rank's part of the model, with weights unless nothing is computed."""
    scenario, place, model = rank.scenario, rank.place, rank.scenario.model
    math: Math
    link: Communicator
    weights: WeightSource
    buffers: BufferSource
    if rank.compute == "skip":
        math, link = ShapeMath(), ScratchComm(comm)
        weights, buffers = ShapeWeights(), NoBuffers()
    else:
        math, link = TorchMath(rank.device, jit.entry_points), comm
        share = model_elements(model) > REAL_MATH_LIMIT
        weights = TorchWeights(rank.options.seed, rank.device, share=share)
        buffers = TorchBuffers(rank.device, model.vocab_size)
    backend = Backend(
        math,
        link,
        sink,
        scenario.num_sms,
        bf16_fp32_algo=scenario.bf16_fp32_algo,
        kernels=kernels or NoKernels(),
        hook=hook or ExecutionHook(),
    )
    return ModelRunner.build(
        model,
        scenario.parallel,
        place.rank,
        backend=backend,
        weights=weights,
        buffers=buffers,
        overlap=scenario.overlap,
    )


class _WalkMemory:
    """Asks for the GPU memory that a walk may take, and keeps the least that it was told."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.least: float | None = None

    def free(self) -> float:
        """Bytes; infinite on a CPU."""
        device = self._rank.device
        if device.type != "cuda":
            return inf
        torch.cuda.empty_cache()
        free = float(torch.cuda.mem_get_info(device)[0])
        self.least = min(free, self.least or inf)
        return free

    def warn(self, line: str) -> None:
        print(f"[rank {self._rank.place.rank}] warning: {line}", flush=True)


class _Progress:
    """Prints a line for each forward: when it began, and how much was compiled before."""

    def __init__(
        self, log_dir: Path, store: NodeKernels | None, say: Callable[[str], None]
    ) -> None:
        self._log_dir, self._store, self._say = log_dir, store, say
        self._began = time.time()

    def show(self, phase: str, name: str) -> None:
        compiles = sum(1 for _ in self._log_dir.glob(FINISHED))
        compiles += self._store.built if self._store else 0
        seconds = time.time() - self._began
        self._say(f"{seconds:7.1f} s  {phase}: {name}, {compiles} compiles so far")


def _setup_spans(rank: int, starts: Sequence[tuple[str, float]], end: float) -> list[Span]:
    """Spans of the phases before the warm-up, each of which ends where the next begins."""
    ends = [start for _, start in starts[1:]] + [end]
    return [
        Span(rank, start, end, kind, name)
        for (name, start), end in zip(starts, ends, strict=True)
        for kind in ("phase", "setup")
    ]


def _introduction(rank: Rank, jit: RankJit) -> list[str]:
    scenario, parallel = rank.scenario, rank.scenario.parallel
    sizes = ",".join(map(str, scenario.batch_sizes))
    return [
        f"{scenario.model.name}, {scenario.model.num_hidden_layers} layers: "
        f"pp {parallel.pp} x tp {parallel.tp} = {parallel.world_size} ranks over {rank.link} on "
        f"{rank.device.type}, {parallel.nodes} node(s), {scenario.num_sms} SMs",
        f"policy {scenario.warmup.policy.value}, batch sizes {sizes}, "
        f"math: {rank.compute} ({rank.reason})",
        f"JIT: {jit.description}",
    ]


def _facts(rank: Rank, jit: RankJit) -> dict[str, object]:
    """What the Timeline's metadata holds besides the scenario."""
    place = rank.place
    gpus = torch.cuda.device_count() if rank.device.type == "cuda" else place.local_world_size
    return {
        "device": rank.device.type,
        "link": rank.link,
        "compute": rank.compute,
        "jit": jit.description,
        "hosts": place.world_size // place.local_world_size,
        "ranks_per_gpu": -(-place.local_world_size // gpus),
        "machine": {**machine_facts(rank.device), "probe": rank.options.probed},
    }
