"""One rank of a launch: build, warm up, serve, and hand its spans to rank 0."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.comm import Groups, ScratchComm, TorchComm, make_groups
from launch.compile_spans import cut_compiles
from launch.compute_mode import check_graphs, compute_mode
from launch.deadline import Deadline
from launch.failure import end_process
from launch.gather import RankRecord, RunResult, find_stalls, gather, machine_facts
from launch.graphs import GraphCapture
from launch.jit_setup import RankJit, set_up_jit
from launch.kernel_store import NodeKernels, leaders_group
from launch.locks import CompileLocks
from launch.logits import Logits
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from launch.place import Place, find_place, gpu_of, init_process_group, pick_backend, pick_device
from launch.process import process_start
from launch.rank_sink import RankSink
from launch.streams import DeviceStream
from launch.wait_limit import GlooLimit, NcclLimit, WaitLimit
from launch.watchdog import TORCH_LIMITS, Communication, describe_timeout, wait_for_device
from runner.backend.base import Backend
from runner.backend.step_runner import Communicator
from runner.backend.torch_math import TorchBuffers, TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.config.environ import Environ, available_cores
from runner.driver.model_runner import ModelRunner
from runner.driver.warmup import WarmupPolicy
from runner.planning.weight_size import model_elements
from runner.scenario import Scenario, run_rank
from runner.timeline import Span
from runner.watch.shim import read_records


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
        runner.build.compiler.CompileError: a kernel does not compile.
    """
    place = find_place(environ)
    device = pick_device(options.device, place)
    gpu = gpu_of(device) if device.type == "cuda" else options.meant_gpu
    scenario = options.scenario(environ, gpu=gpu, policy=policy)
    deadline = Deadline(options.timeout, partial(end_process, place.rank))
    phases = [("imports", process_start()), ("process group", time.time())]
    parallel = scenario.parallel
    backend = pick_backend(options.backend, device, place, parallel.ranks_per_node)
    init_process_group(
        device, place, backend=backend, node=parallel.node_of(place.rank), timeout=options.timeout
    )
    folder = work_dir or _shared_work_dir()
    with deadline:
        rank_run = _RankRun(
            options, environ, scenario, place, device, folder, deadline, backend, phases
        )
        result = rank_run.run(say)
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
    deadline: Deadline
    backend: str
    phases: list[tuple[str, float]]
    link: str = "gloo"
    walk_memory: float | None = None
    graphs: GraphCapture | None = None

    def run(self, say: Callable[[str], None]) -> RunResult | None:
        torch.set_num_threads(max(1, available_cores() // self.place.local_world_size))
        compute, reason = compute_mode(self.options, self.device.type, self.scenario.model)
        on_gpu = self.device.type == "cuda" and compute == "real"
        check_graphs(self.scenario, on_gpu=on_gpu, backend=self.backend)
        # Without math the buffers are host memory, so they go over gloo even where there is NCCL.
        self.link = self.backend if compute == "real" else "gloo"
        groups = make_groups(self.scenario.parallel, self._limit, self.link)
        leaders = leaders_group(self.scenario, self._limit)
        self.phases.append(("weights", time.time()))
        jit = set_up_jit(
            self.options,
            self.environ,
            self.scenario,
            self.place.rank,
            self.work_dir,
            library=on_gpu,
        )
        store: NodeKernels | None = None
        sink = self._sink(
            jit, compute, self._progress(jit, say, lambda: store.built if store else 0)
        )
        self.deadline.sink = sink
        comm = TorchComm(groups, self.device, through_host=self.link == "gloo")
        for line in self._introduction(compute, reason, jit):
            say(line)
        store = self._kernel_store(jit, sink, groups, leaders)
        runner = self._build_runner(compute, jit, sink, comm, store)
        self._synchronise()
        self._end_phases(sink, time.time())
        dist.barrier()
        logits = Logits.of_rank(self.options.logits, self.scenario.parallel, self.place.rank)
        with torch.inference_mode():
            run_rank(runner, self.scenario, logits.keep)
        comm.finish()
        self._synchronise()
        if self.graphs is not None:
            self.graphs.release()
        logits.save()
        return gather(self._record(sink, jit, store), self.scenario, self._facts(compute, jit))

    @property
    def _limit(self) -> float:
        """Seconds that a communication may wait."""
        given = self.options.nccl_timeout
        return TORCH_LIMITS[self.link] if given is None else given

    def _sink(self, jit: RankJit, compute: str, on_forward: Callable[[str, str], None]) -> RankSink:
        self.graphs = GraphCapture(self.device if compute == "real" else torch.device("cpu"))
        extra: dict[str, Any] = {}
        if self.options.compile_lock and jit.cache is not None:
            extra["lock"] = CompileLocks(jit.cache.root).held
        if self.link == "nccl":
            extra["arrive"] = lambda: wait_for_device(self.device)
            extra["stream"] = DeviceStream(self.device)
        return RankSink(
            self.place.rank,
            jit.loader,
            self.scenario.table,
            synchronise=self._synchronise,
            inside=jit.inside,
            limit=self._wait_limit(jit.log_dir),
            capture=self.graphs,
            on_forward=on_forward,
            **extra,
        )

    def _wait_limit(self, log_dir: Path) -> WaitLimit:
        place = self.place
        first = place.rank - place.local_rank
        here = range(first, first + place.local_world_size)

        def describe(op: Communication) -> Exception:
            return describe_timeout(op, place.rank, self._limit, log_dir, here=here)

        if self.link == "gloo":
            return GlooLimit(describe)
        return NcclLimit(self._limit, describe, partial(end_process, place.rank))

    def _end_phases(self, sink: RankSink, now: float) -> None:
        """Note the phases before the warm-up."""
        ends = [start for _, start in self.phases[1:]] + [now]
        for (name, start), end in zip(self.phases, ends, strict=True):
            for kind in ("phase", "setup"):
                sink.spans.append(Span(self.place.rank, start, end, kind, name))

    def _free_memory(self) -> float:
        """Bytes that a walk may take."""
        if self.device.type != "cuda":
            return inf
        torch.cuda.empty_cache()
        free = float(torch.cuda.mem_get_info(self.device)[0])
        self.walk_memory = min(free, self.walk_memory or inf)
        return free

    def _warn(self, line: str) -> None:
        print(f"[rank {self.place.rank}] warning: {line}", flush=True)

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

    def _kernel_store(
        self, jit: RankJit, sink: RankSink, groups: Groups, leaders: dist.ProcessGroup | None
    ) -> NodeKernels | None:
        """Where kernels come from; None where nothing is compiled."""
        if jit.compiler is None or jit.cache is None:
            return None
        here = max(1, self.place.local_world_size // self.scenario.parallel.ranks_per_node)
        return NodeKernels(
            rank=self.place.rank,
            scenario=self.scenario,
            cache=jit.cache,
            compiler=jit.compiler,
            loader=jit.loader,
            note=sink.spans.append,
            everyone=groups.everyone,
            leaders=leaders,
            workers=max(1, available_cores() // here),
            environment=os.environ,
        )

    def _build_runner(
        self,
        compute: str,
        jit: RankJit,
        sink: RankSink,
        comm: TorchComm,
        store: NodeKernels | None,
    ) -> ModelRunner:
        scenario = self.scenario
        math: TorchMath | None = None
        link: Communicator = ScratchComm(comm)
        weights: TorchWeights | None = None
        buffers: TorchBuffers | None = None
        if compute == "real":
            math, link = TorchMath(self.device, jit.entry_points), comm
            share = model_elements(scenario.model) > REAL_MATH_LIMIT
            weights = TorchWeights(self.options.seed, self.device, share=share)
            buffers = TorchBuffers(self.device, scenario.model.vocab_size)
        backend = Backend(
            sink,
            scenario.num_sms,
            math,
            link,
            store,
            bf16_fp32_algo=scenario.bf16_fp32_algo,
            hook=scenario.hook(self.place.rank, self._free_memory, self._warn),
        )
        return ModelRunner.build(
            scenario.model,
            scenario.parallel,
            self.place.rank,
            backend=backend,
            weights=weights,
            buffers=buffers,
            overlap=scenario.overlap,
        )

    def _introduction(self, compute: str, reason: str, jit: RankJit) -> list[str]:
        scenario, parallel, link = self.scenario, self.scenario.parallel, self.link
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
            # Not the device: a send to a stage that is late must not hold this one up.
            torch.cuda.current_stream(self.device).synchronize()

    def _record(self, sink: RankSink, jit: RankJit, store: NodeKernels | None) -> RankRecord:
        records = [r for r in read_records(jit.log_dir) if r.rank == self.place.rank]
        names = [jit.key_of(record) for record in records]
        return RankRecord(
            started=self.phases[0][1],
            spans=cut_compiles(sink.spans, records, jit.key_of),
            ops=sink.ops,
            coverage=store.proof(self.scenario.plan) if store else None,
            stalls=find_stalls(records, sink.forwards, names, self.place.rank),
            walk_memory=self.walk_memory,
        )

    def _facts(self, compute: str, jit: RankJit) -> dict[str, Any]:
        return {
            "device": self.device.type,
            "link": self.link,
            "compute": compute,
            "jit": jit.description,
            "hosts": self.place.world_size // self.place.local_world_size,
            "ranks_per_gpu": self._ranks_per_gpu,
            "machine": {**machine_facts(self.device), "probe": self.options.probed},
        }

    @property
    def _ranks_per_gpu(self) -> int:
        if self.device.type != "cuda":
            return 1
        return -(-self.place.local_world_size // torch.cuda.device_count())


def _shared_work_dir() -> Path:
    """A temporary directory of one name on every node."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
    path = Path(tempfile.gettempdir()) / f"deepgemm-coldstart-{name[0]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
