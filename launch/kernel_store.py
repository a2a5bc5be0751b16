"""A real rank's planned kernels: built on its node, exchanged between nodes, loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from runner.coverage import node_coverage
from runner.errors import UserError
from runner.jit.builder.build import Builder, Built
from runner.jit.builder.scratch import scratch_folder
from runner.jit.builder.unit import Job
from runner.jit.cache import KernelCache
from runner.jit.compiler import CompileError, NvccCompiler
from runner.jit.kernels import Kernel
from runner.jit.plan import Plan
from runner.scenario import Scenario
from runner.timeline import Span

_TAG = "build-"
Entry = tuple[str, bytes]
"""Source and cubin."""


@dataclass
class NodeKernels:
    """Implements :class:`runner.backend.base.KernelStore` for one rank.

    Attributes:
        rank: world rank.
        scenario: says who leads which node.
        cache: this node's.
        compiler: the real one; builds are noted here, not by the shim.
        load_kernels: brings kernels into this process.
        note: takes the spans of builds.
        leaders: process group of the nodes' first ranks, None where there is one node.
        workers: compiler processes that this node may run at a time.
        environment: what the compiler's stages run in.
    """

    rank: int
    scenario: Scenario
    cache: KernelCache
    compiler: NvccCompiler
    load_kernels: Callable[[Sequence[Kernel]], None]
    note: Callable[[Span], None]
    leaders: dist.ProcessGroup | None
    workers: int
    environment: Mapping[str, str]

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Build what the node's cache lacks, on all its cores.

        Raises:
            CompileError: a kernel does not compile.
        """
        keyed = {self.compiler.keys.cache_key(kernel): kernel for kernel in kernels}
        jobs = [
            Job(key, kernel, self.compiler.keys.source(kernel))
            for key, kernel in keyed.items()
            if not self.cache.has(key)
        ]
        if not jobs:
            return
        with scratch_folder() as folder:
            builder = Builder(
                self.compiler, folder, self.workers, self.environment, self._take,
                on_shared=self._note_shared,
            )  # fmt: skip
            builder.build(jobs)

    def _note_shared(self, name: str, start: float, end: float) -> None:
        self.note(Span(self.rank, start, end, "compile", name))

    def _take(self, built: Built) -> None:
        if built.cubin is None:
            raise CompileError(f"{built.job.kernel.name}: {built.words}")
        self.cache.put(built.job.key, built.job.source, built.cubin, tag=_TAG)
        name = built.job.kernel.name
        self.note(Span(self.rank, built.started, time.time(), "compile", name, built.job.key))

    def exchange(self) -> None:
        """Wait for everyone; then leaders hand each other what their caches lack.

        Where nodes share a directory nothing is lacking and nothing moves.
        """
        dist.barrier()
        if self.leaders is not None and self._leads:
            self._hand_over(self.leaders)
        if self.scenario.parallel.nodes > 1:
            dist.barrier()

    @property
    def _leads(self) -> bool:
        return self.rank % self.scenario.parallel.ranks_per_node == 0

    def _hand_over(self, group: dist.ProcessGroup) -> None:
        parallel = self.scenario.parallel
        planned = self._planned_keys()
        lacking: list[list[str]] = [[] for _ in range(parallel.nodes)]
        mine = [key for key in planned if not self.cache.has(key)]
        dist.all_gather_object(lacking, mine, group=group)
        wanted = {key for keys in lacking for key in keys}
        for node in range(parallel.nodes):
            leader = node * parallel.ranks_per_node
            share = self.scenario.kernel_set(leader).share
            keys = [key for key in map(self.compiler.keys.cache_key, share) if key in wanted]
            box: list[Any] = [[self._entry(key) for key in keys] if leader == self.rank else None]
            dist.broadcast_object_list(box, src=leader, group=group)
            for key, entry in zip(keys, box[0], strict=True):
                if not self.cache.has(key):
                    self.cache.put(key, *entry, tag=_TAG)

    def _entry(self, key: str) -> Entry:
        folder = self.cache.entry(key)
        return (folder / "kernel.cu").read_text(), (folder / "kernel.cubin").read_bytes()

    def _planned_keys(self) -> list[str]:
        return [self.compiler.keys.cache_key(item.kernel) for item in self.scenario.plan.kernels]

    def verify(self, kernels: tuple[Kernel, ...]) -> None:
        """See the protocol; one rank a node looks.

        Raises:
            UserError: kernels are missing.
        """
        if not self._leads:
            return
        missing = [
            kernel for kernel in kernels if not self.cache.has(self.compiler.keys.cache_key(kernel))
        ]
        if missing:
            raise UserError(
                f"the cache {self.cache.root} lacks {len(missing)} of {len(kernels)} planned "
                "kernels: build them first (runner compile), or use --warmup planned"
            )

    def load(self, kernels: tuple[Kernel, ...]) -> None:
        """See the protocol."""
        self.load_kernels(kernels)

    def proof(self, plan: Plan) -> dict[str, Any] | None:
        """The node's coverage, from its leader."""
        if not self._leads:
            return None
        keys = self.compiler.keys
        present = {
            item.kernel for item in plan.kernels if self.cache.has(keys.cache_key(item.kernel))
        }
        return node_coverage(self.scenario.parallel.node_of(self.rank), plan, present)


def leaders_group(scenario: Scenario) -> dist.ProcessGroup | None:
    """The group of all nodes' first ranks; every rank must call this."""
    parallel = scenario.parallel
    if parallel.nodes == 1:
        return None
    leaders = list(range(0, parallel.world_size, parallel.ranks_per_node))
    group: dist.ProcessGroup | None = dist.new_group(leaders, backend="gloo")
    return group
