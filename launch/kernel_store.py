"""A real rank's planned kernels: built on its node, exchanged between nodes, loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from launch.loaders import KernelLoader
from runner.build.build import Builder, Built
from runner.build.compiler import CompileError, NvccCompiler
from runner.build.scratch import scratch_folder
from runner.build.unit import Job
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys
from runner.cache.manifest import locked
from runner.cli.progress import Show, progress
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.planning.coverage import node_coverage
from runner.planning.plan import Plan
from runner.scenario import Scenario
from runner.schedule import Walk
from runner.timeline import Span

_TAG = "build-"
Entry = tuple[str, bytes]
"""Source and cubin."""


@dataclass
class NodeKernels:
    """Implements :class:`runner.backend.step_runner.KernelStore` for one rank.

    Attributes:
        rank: world rank.
        scenario: says who leads which node.
        cache: this node's.
        compiler: the real one; builds are noted here, not by the shim.
        loader: brings kernels into this process and walks.
        note: takes the spans of builds.
        everyone: process group of all ranks.
        leaders: process group of the nodes' first ranks, None where there is one node.
        workers: compiler processes that this node may run at a time.
        environment: what the compiler's stages run in.
        built: kernels that this rank has built.
    """

    rank: int
    scenario: Scenario
    cache: KernelCache
    compiler: NvccCompiler
    loader: KernelLoader
    note: Callable[[Span], None]
    everyone: dist.ProcessGroup
    leaders: dist.ProcessGroup | None
    workers: int
    environment: Mapping[str, str]
    built: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Build what the node's cache lacks, on all its cores.

        Raises:
            CompileError: a kernel does not compile.
        """
        if not kernels:
            return
        # Nodes that share a directory build their shares side by side; a ``runner compile`` in it
        # would clear away what they are writing.
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
                self.environment,
                self._take,
                on_shared=self._note_shared,
                on_step=lambda done, all_: show(self.built, len(jobs), done / max(done, all_)),
            )
            builder.build(jobs)

    def _progress(self) -> AbstractContextManager[Show]:
        """Told on rank 0 alone: nodes build shares of about the same size."""
        return progress("build kernels") if self.rank == 0 else nullcontext(lambda *_: None)

    def _holds(self, kernel: Kernel) -> bool:
        keys = self.compiler.keys
        return self.cache.holds(keys.cache_key(kernel), keys.source(kernel))

    def _note_shared(self, name: str, start: float, end: float) -> None:
        self.note(Span(self.rank, start, end, "compile", name))

    def _take(self, built: Built) -> None:
        if built.cubin is None:
            raise CompileError(f"{built.job.kernel.name}: {built.words}")
        self._put(built.job.key, built.job.source, built.cubin)
        name = built.job.kernel.name
        self.note(Span(self.rank, built.started, time.time(), "compile", name, built.job.key))
        with self._guard:
            self.built += 1

    def _put(self, key: str, source: str, cubin: bytes) -> None:
        extra = self.compiler.keys.extra_files
        self.cache.put(key, source, cubin, extra=extra, tag=_TAG)

    def exchange(self) -> None:
        """Wait for everyone; then leaders hand each other what their caches lack.

        Where nodes share a directory nothing is lacking and nothing moves.
        """
        dist.barrier(group=self.everyone)
        if self.leaders is not None and self._leads:
            self._hand_over(self.leaders)
        if self.scenario.parallel.nodes > 1:
            dist.barrier(group=self.everyone)

    @property
    def _leads(self) -> bool:
        return self.rank % self.scenario.parallel.ranks_per_node == 0

    def _hand_over(self, group: dist.ProcessGroup) -> None:
        parallel = self.scenario.parallel
        keys_of = self.compiler.keys.cache_key
        lacking: list[list[str]] = [[] for _ in range(parallel.nodes)]
        planned = (item.kernel for item in self.scenario.plan.kernels)
        mine = [keys_of(kernel) for kernel in planned if not self._holds(kernel)]
        dist.all_gather_object(lacking, mine, group=group)
        wanted = {key for keys in lacking for key in keys}
        for node in range(parallel.nodes):
            leader = node * parallel.ranks_per_node
            share = self.scenario.kernel_set(leader).share
            keys = [key for key in map(keys_of, share) if key in wanted]
            box: list[Any] = [[self._entry(key) for key in keys] if leader == self.rank else None]
            dist.broadcast_object_list(box, src=leader, group=group)
            for key, entry in zip(keys, box[0], strict=True):
                if key in mine:
                    self.cache.discard(key)
                    self._put(key, *entry)

    def _entry(self, key: str) -> Entry:
        folder = self.cache.entry(key)
        return (folder / "kernel.cu").read_text(), (folder / "kernel.cubin").read_bytes()

    def verify(self, kernels: tuple[Kernel, ...]) -> None:
        """See the protocol.

        Raises:
            UserError: kernels are missing.
        """
        check_holds(self.cache, self.compiler.keys, kernels)

    def wait(self) -> None:
        """See the protocol."""
        dist.barrier(group=self.everyone)

    def load(self, kernels: tuple[Kernel, ...]) -> None:
        """See the protocol."""
        self.loader.load(kernels)

    def walk(self, walk: Walk) -> None:
        """See the protocol."""
        self.loader.walk(walk)

    def proof(self, plan: Plan) -> dict[str, Any] | None:
        """The node's coverage, from its leader."""
        if not self._leads:
            return None
        present = {item.kernel for item in plan.kernels if self._holds(item.kernel)}
        parallel = self.scenario.parallel
        return node_coverage(parallel.node_of(self.rank), parallel, plan, present)


def check_holds(cache: KernelCache, keys: CacheKeys, kernels: Sequence[Kernel]) -> None:
    """Raise UserError where a cache does not hold all of the kernels, whole."""
    held = (cache.holds(keys.cache_key(kernel), keys.source(kernel)) for kernel in kernels)
    missing = sum(not there for there in held)
    if missing:
        raise UserError(
            f"the cache {cache.root} lacks {missing} of {len(kernels)} planned kernels: build them "
            "first (runner compile), or use --warmup planned"
        )


def leaders_group(scenario: Scenario, limit: float) -> dist.ProcessGroup | None:
    """The group of all nodes' first ranks, which wait ``limit`` seconds; None to other ranks."""
    parallel = scenario.parallel
    if parallel.nodes == 1:
        return None
    leaders = list(range(0, parallel.world_size, parallel.ranks_per_node))
    group: dist.ProcessGroup | None = dist.new_group(
        leaders,
        backend="gloo",
        timeout=timedelta(seconds=limit),
        # Else torch (2.11, 2.13) has those outside split the NCCL communicator, which a gloo group
        # has no part in: they wait for ever.
        use_local_synchronization=True,
    )
    return group
