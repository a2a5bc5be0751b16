"""One rank of a launch: build, warm up, serve, and hand its spans to rank 0."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import runner
from launch.comm import ScratchComm, TorchComm, make_groups
from launch.jit_setup import RankJit, set_up_jit
from launch.kernel_store import NodeKernels, leaders_group
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from launch.rank_sink import RankSink, cut_compiles
from runner.backend.base import Backend, Communicator, NoKernels
from runner.backend.math import Math
from runner.backend.shapes import NoComm, ShapeMath, ShapeWeights
from runner.backend.sink import ScheduleRecorder
from runner.backend.torch_math import TorchBuffers, TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.backend.weights import WeightRequest, WeightSource
from runner.environ import Environ
from runner.errors import UserError
from runner.jit.shim import read_records
from runner.model_runner import BufferSource, ModelRunner, NoBuffers
from runner.scenario import Scenario, run_meta, run_rank
from runner.schedule import Op, Schedule
from runner.timeline import Span, Timeline, merge
from runner.warmup import WarmupPolicy


@dataclass(frozen=True)
class Place:
    """Where this process stands among the job's."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class RunResult:
    """What rank 0 has after a run; the other ranks have None."""

    timeline: Timeline
    schedule: Schedule


def run_worker(
    options: LaunchOptions,
    environ: Environ,
    policy: WarmupPolicy,
    *,
    say: Callable[[str], None],
    work_dir: Path | None,
) -> RunResult | None:
    """Run this rank from process group to gathered Timeline.

    Args:
        options: the launch.
        environ: the environment, read at the entry; holds this rank's place.
        policy: the one policy to run.
        say: prints a line, on rank 0 only.
        work_dir: temporary directory that the process that started the ranks will remove; None
            makes one and removes it after a good end.

    Raises:
        UserError: bad input.
        runner.jit.compiler.CompileError: a kernel does not compile.
    """
    place = _place(environ)
    device = _pick_device(options, place)
    num_sms = options.num_sms
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    scenario = options.scenario(environ, num_sms=num_sms, policy=policy)
    started = time.time()
    deadline = _Deadline(options.timeout, place.rank)
    exclusive = device.type == "cuda" and torch.cuda.device_count() >= place.local_world_size
    _init_process_group(device, exclusive=exclusive, timeout=options.timeout)
    folder = work_dir or _shared_work_dir()
    with deadline:
        rank_run = _RankRun(options, environ, scenario, place, device, folder, deadline)
        result = rank_run.run(started, exclusive=exclusive, say=say)
    # Only after a good end: with a rank gone, the others would miss the folder or wait for it.
    dist.barrier()
    if place.local_rank == 0 and work_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    dist.destroy_process_group()
    return result


@dataclass
class _RankRun:
    """The steps of one rank's run; only here to keep them small."""

    options: LaunchOptions
    environ: Environ
    scenario: Scenario
    place: Place
    device: torch.device
    work_dir: Path
    deadline: _Deadline

    def run(
        self, started: float, *, exclusive: bool, say: Callable[[str], None]
    ) -> RunResult | None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.place.local_world_size))
        compute, reason = self._compute_mode()
        jit = set_up_jit(
            self.options, self.environ, self.scenario, self.place.rank, self.work_dir,
            library=self.device.type == "cuda" and compute == "real",
        )  # fmt: skip
        sink = RankSink(
            self.place.rank, jit.loader, synchronise=self._synchronise, inside=jit.inside,
            on_forward=self._progress(jit, say, lambda: store.built if store else 0),
        )  # fmt: skip
        self.deadline.sink = sink
        # Without math the buffers are host memory, so they go over gloo even where there is NCCL.
        comm = TorchComm(
            make_groups(self.scenario.parallel),
            self.device,
            through_host=not exclusive or compute == "skip",
        )
        for line in self._introduction(compute, reason, jit, exclusive=exclusive):
            say(line)
        store = self._kernel_store(jit, sink)
        runner = self._build_runner(compute, jit, sink, comm, store)
        ready = time.time()
        dist.barrier()
        origin = time.time()
        logits: list[torch.Tensor] = []
        keep = self._keeper(logits)
        with torch.inference_mode():
            run_rank(runner, self.scenario, keep)
        comm.finish()
        self._synchronise()
        self._save(logits)
        meta = {
            "startup_seconds": round(ready - started, 3),
            "compute": compute,
            "coverage": store.proof(self.scenario.plan) if store else None,
        }
        return self._gather(sink, jit, origin, meta, exclusive=exclusive)

    def _progress(
        self, jit: RankJit, say: Callable[[str], None], built: Callable[[], int]
    ) -> Callable[[str, str], None]:
        """Prints a line a forward on rank 0: how long, where, and how much is compiled so far."""
        began = time.time()

        def tell(phase: str, name: str) -> None:
            if self.place.rank == 0:
                compiled = built() + sum(1 for _ in jit.log_dir.glob("*.compile"))
                say(f"{time.time() - began:7.1f} s  {phase}: {name}, {compiled} compiles so far")

        return tell

    def _compute_mode(self) -> tuple[str, str]:
        """``real`` or ``skip``, and why."""
        if self.options.compute is not None:
            return self.options.compute, "as asked"
        if self.device.type == "cuda":
            return "real", "on a GPU"
        total = self._total_elements()
        if total > REAL_MATH_LIMIT:
            return "skip", f"{total / 1e9:.0f} G weights are too many for math on a CPU"
        return "real", "the model is small"

    def _total_elements(self) -> int:
        """Weights of all ranks, which every rank must count alike to decide alike."""
        parallel = self.scenario.parallel
        stages = [parallel.rank_of(stage, 0) for stage in range(parallel.pp)]
        return parallel.tp * sum(weight_elements(self.scenario, rank) for rank in stages)

    def _kernel_store(self, jit: RankJit, sink: RankSink) -> NodeKernels | None:
        """What planned policies build with; None where nothing is compiled."""
        group = leaders_group(self.scenario)
        if jit.compiler is None or jit.cache is None:
            return None
        here = max(1, self.place.local_world_size // self.scenario.parallel.ranks_per_node)
        return NodeKernels(
            rank=self.place.rank, scenario=self.scenario, cache=jit.cache, compiler=jit.compiler,
            load_kernels=jit.loader.load, note=sink.spans.append, leaders=group,
            workers=max(1, (os.cpu_count() or 1) // here), environment=os.environ,
        )  # fmt: skip

    def _build_runner(
        self, compute: str, jit: RankJit, sink: RankSink, comm: TorchComm,
        store: NodeKernels | None,
    ) -> ModelRunner:  # fmt: skip
        scenario = self.scenario
        math: Math
        link: Communicator
        weights: WeightSource
        buffers: BufferSource
        if compute == "skip":
            math, link = ShapeMath(), ScratchComm(comm)
            weights, buffers = ShapeWeights(), NoBuffers()
        else:
            math, link = TorchMath(self.device, jit.entry_points), comm
            share = self._total_elements() > REAL_MATH_LIMIT
            weights = TorchWeights(self.options.seed, self.device, share=share)
            buffers = TorchBuffers(self.device, scenario.model.vocab_size)
        backend = Backend(
            math, link, sink, scenario.num_sms,
            bf16_fp32_algo=scenario.bf16_fp32_algo,
            kernels=store or NoKernels(),
        )  # fmt: skip
        return ModelRunner.build(
            scenario.model, scenario.parallel, self.place.rank,
            backend=backend, weights=weights, buffers=buffers,
        )  # fmt: skip

    def _introduction(
        self, compute: str, reason: str, jit: RankJit, *, exclusive: bool
    ) -> list[str]:
        scenario, parallel = self.scenario, self.scenario.parallel
        link = "nccl" if exclusive else "gloo"
        sizes = ",".join(map(str, scenario.batch_sizes))
        return [
            f"{scenario.model.name}, {scenario.model.num_hidden_layers} layers: "
            f"pp {parallel.pp} x tp {parallel.tp} = {parallel.world_size} ranks over {link} on "
            f"{self.device.type}, {parallel.nodes} node(s), {scenario.num_sms} SMs",
            f"policy {scenario.warmup.policy.value}, batch sizes {sizes}, "
            f"math: {compute} ({reason})",
            f"JIT: {jit.description}",
        ]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _keeper(self, logits: list[torch.Tensor]) -> Callable[[Any], None]:
        """Keeps logits where they were asked for: on the last stage's first rank."""
        at = self.scenario.parallel.coordinates(self.place.rank)
        last = at.pp_rank == self.scenario.parallel.pp - 1 and at.tp_rank == 0
        if self.options.logits is None or not last:
            return lambda logits: None

        def keep(made: Any) -> None:
            if isinstance(made, torch.Tensor):
                logits.append(made.float().cpu())

        return keep

    def _save(self, logits: list[torch.Tensor]) -> None:
        if logits and self.options.logits is not None:
            try:
                torch.save(logits, self.options.logits)
            except (OSError, RuntimeError) as error:
                raise UserError(f"cannot write {self.options.logits}: {error}") from None

    def _gather(
        self, sink: RankSink, jit: RankJit, origin: float, meta: dict[str, Any],
        *, exclusive: bool,
    ) -> RunResult | None:  # fmt: skip
        records = [r for r in read_records(jit.log_dir) if r.rank == self.place.rank]
        spans = cut_compiles(sink.spans, records, jit.key_of)
        mine = (origin, spans, sink.ops, meta)
        everyone: list[Any] | None = (
            [None] * self.place.world_size if self.place.rank == 0 else None
        )
        dist.gather_object(mine, everyone)
        if everyone is None:
            return None
        return self._assemble(everyone, jit, exclusive=exclusive)

    def _assemble(
        self,
        everyone: list[tuple[float, list[Span], list[Op], dict[str, Any]]],
        jit: RankJit,
        *,
        exclusive: bool,
    ) -> RunResult:
        origin = min(item[0] for item in everyone)
        spans = [
            Span(s.rank, max(0.0, s.start - origin), s.end - origin, s.kind, s.name, s.key)
            for item in everyone
            for s in item[1]
        ]
        parallel = self.scenario.parallel
        timeline = Timeline(
            policy=self.scenario.warmup.policy.value,
            source="measured",
            world_size=parallel.world_size,
            spans=merge(spans),
            meta={
                **run_meta(self.scenario),
                "device": self.device.type,
                "link": "nccl" if exclusive else "gloo",
                "compute": everyone[0][3]["compute"],
                "jit": jit.description,
                "machine": _machine(self.device),
                "startup_seconds": [item[3]["startup_seconds"] for item in everyone],
                "coverage": [item[3]["coverage"] for item in everyone if item[3]["coverage"]],
            },
        )
        schedule = Schedule(tuple(tuple(item[2]) for item in everyone))
        return RunResult(timeline, schedule)


def _machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made: the provenance of its figures."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "deepgemm_coldstart": runner.__version__,
    }


def weight_elements(scenario: Scenario, rank: int) -> int:
    """Elements of one rank's weights, counted without making them."""
    counter = _CountingWeights()
    backend = Backend(ShapeMath(), NoComm(), ScheduleRecorder(), scenario.num_sms)
    ModelRunner.build(
        scenario.model, scenario.parallel, rank,
        backend=backend, weights=counter, buffers=NoBuffers(),
    )  # fmt: skip
    return counter.elements


class _CountingWeights(ShapeWeights):
    def __init__(self) -> None:
        self.elements = 0

    def make(self, request: WeightRequest) -> Any:
        self.elements += prod(request.view)
        return super().make(request)


def _place(environ: Environ) -> Place:
    rank, world = environ.rank or 0, environ.world_size or 1
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world}: torchrun sets both")
    return Place(rank, world, environ.local_rank or 0, environ.local_world_size or world)


def _pick_device(options: LaunchOptions, place: Place) -> torch.device:
    if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, *, exclusive: bool, timeout: float) -> None:
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


def _shared_work_dir() -> Path:
    """A temporary directory of one name on every node."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
    path = Path(tempfile.gettempdir()) / f"deepgemm-coldstart-{name[0]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


class _Deadline:
    """Ends the process when a run takes longer than its limit, saying where it stood."""

    def __init__(self, seconds: float, rank: int) -> None:
        self.sink: RankSink | None = None
        self._seconds, self._rank = seconds, rank
        self._timer = threading.Timer(seconds, self._abort)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _abort(self) -> None:
        where = self.sink.last if self.sink else "setting up"
        print(
            f"[rank {self._rank}] error: no end after --timeout {self._seconds:g} s, in: {where}",
            flush=True,
        )
        os._exit(1)
