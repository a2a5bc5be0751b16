"""A real rank's planned kernels: built on its node, exchanged between nodes, loaded."""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from launch.comm import Groups
from launch.jit import RankJit, check_holds
from launch.rank import Rank
from runner.build.build import Builder, Built
from runner.build.compiler import CompileError
from runner.build.scratch import scratch_folder
from runner.build.unit import Job
from runner.cache.entry import CUBIN, SOURCE
from runner.cache.manifest import locked
from runner.config.environ import available_cores
from runner.kernels.kernel import Kernel
from runner.planning.coverage import node_coverage
from runner.planning.plan import Plan
from runner.report.progress import Show, progress
from runner.schedule import Walk
from runner.timeline import Span


class NodeKernels:
    """Implements :class:`runner.backend.kernel_store.KernelStore` for one rank.

    Attributes:
        spans: of this rank's builds so far, which the builder times, not the shim.
    """

    def __init__(self, rank: Rank, jit: RankJit, groups: Groups) -> None:
        assert jit.compiler is not None and jit.cache is not None
        self.rank, self.scenario, self.groups = rank.place.rank, rank.scenario, groups
        self.compiler, self.cache, self.loader = jit.compiler, jit.cache, jit.loader
        ranks_per_node = rank.scenario.parallel.ranks_per_node
        nodes_here = max(1, rank.place.local_world_size // ranks_per_node)
        self.workers = max(1, available_cores() // nodes_here)
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def built(self) -> int:
        """Kernels that this rank has built."""
        with self._lock:
            return sum(span.is_kernel for span in self.spans)

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Build the kernels that the node's cache lacks, on all its cores.

        Raises:
            CompileError: a kernel does not compile.
        """
        if not kernels:
            return
        # Nodes that share a directory build their shares at the same time; a ``runner compile``
        # in it would remove what they are writing.
        with locked(self.cache.root, shared=True):
            self._build_missing([kernel for kernel in kernels if not self._holds(kernel)])

    def _build_missing(self, kernels: list[Kernel]) -> None:
        keys = self.compiler.keys
        jobs = [Job(keys.cache_key(kernel), kernel, keys.source(kernel)) for kernel in kernels]
        for job in jobs:
            self.cache.discard(job.key)
        with scratch_folder() as folder, self._progress() as show:
            builder = Builder(
                self.compiler,
                folder,
                self.workers,
                os.environ,
                self._take,
                on_shared=self._note,
                on_step=lambda done, all_: show(self.built, len(jobs), done / max(done, all_)),
            )
            builder.build(jobs)

    def _progress(self) -> AbstractContextManager[Show]:
        """Shown on rank 0 alone: all nodes build shares of about the same size."""
        return progress("build kernels") if self.rank == 0 else nullcontext(lambda *_: None)

    def _holds(self, kernel: Kernel) -> bool:
        keys = self.compiler.keys
        return self.cache.holds(keys.cache_key(kernel), keys.source(kernel))

    def _take(self, built: Built) -> None:
        kernel = built.job.kernel
        if built.cubin is None:
            raise CompileError(f"{kernel.name}: {built.words}")
        self._put(built.job.key, built.job.source, built.cubin)
        self._note(kernel.name, built.started, time.time(), kernel.identity)

    def _note(self, name: str, start: float, end: float, identity: str = "") -> None:
        """Keep the span of a kernel's build, or of a step that several kernels share."""
        with self._lock:
            self.spans.append(Span(self.rank, start, end, "compile", name, identity))

    def _put(self, key: str, source: str, cubin: bytes) -> None:
        self.cache.put(key, source, cubin, extra=self.compiler.keys.extra_files, tag="build-")

    def exchange(self) -> None:
        """Wait for everyone; then leaders give each other the kernels that their caches lack.

        Nodes that share a directory lack nothing.
        """
        dist.barrier(group=self.groups.everyone)
        if self.groups.leaders is not None and self.scenario.leads(self.rank):
            self._exchange_lacking(self.groups.leaders)
        if self.scenario.parallel.nodes > 1:
            dist.barrier(group=self.groups.everyone)

    def _exchange_lacking(self, group: dist.ProcessGroup) -> None:
        parallel, key_of = self.scenario.parallel, self.compiler.keys.cache_key
        planned = [item.kernel for item in self.scenario.plan.kernels]
        mine = {key_of(kernel) for kernel in planned if not self._holds(kernel)}
        by_node: list[set[str]] = [set() for _ in range(parallel.nodes)]
        dist.all_gather_object(by_node, mine, group=group)
        lacking = set().union(*by_node)
        for node in range(parallel.nodes):
            leader = node * parallel.ranks_per_node
            share = self.scenario.kernel_set(leader).share
            keys = [key for key in map(key_of, share) if key in lacking]
            if not keys:
                continue
            entries: list[Any] = [None] * len(keys)
            if leader == self.rank:
                folders = map(self.cache.entry, keys)
                entries = [((f / SOURCE).read_text(), (f / CUBIN).read_bytes()) for f in folders]
            dist.broadcast_object_list(entries, src=leader, group=group)
            for key, (source, cubin) in zip(keys, entries, strict=True):
                if key in mine:
                    self.cache.discard(key)
                    self._put(key, source, cubin)

    def verify(self, kernels: tuple[Kernel, ...]) -> None:
        """Check that the node's cache holds kernels, whole.

        Raises:
            UserError: kernels are missing.
        """
        check_holds(self.cache, self.compiler.keys, kernels)

    def wait(self) -> None:
        dist.barrier(group=self.groups.everyone)

    def load(self, kernels: tuple[Kernel, ...]) -> None:
        self.loader.load(kernels)

    def walk(self, walk: Walk) -> None:
        self.loader.walk(walk)

    def coverage(self, plan: Plan) -> dict[str, object] | None:
        """What the node's cache holds of the plan, as a Timeline keeps it; leaders only."""
        if not self.scenario.leads(self.rank):
            return None
        present = {item.kernel for item in plan.kernels if self._holds(item.kernel)}
        parallel = self.scenario.parallel
        return node_coverage(parallel.node_of(self.rank), parallel, plan, present)
