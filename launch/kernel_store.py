"""A real rank's planned kernels: built on its node, exchanged between nodes, loaded."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist

from launch.comm import Groups
from launch.jit import RankJit, check_holds, lacking
from launch.rank import Rank
from runner.build.builder import BuildResult, Job, KernelBuilder
from runner.build.compiler import CompileError
from runner.cache.lock import locked, say_waiting
from runner.config.environ import available_cores
from runner.driver.warmup import node_shares
from runner.kernels.entry import CUBIN, SOURCE
from runner.kernels.kernel import Kernel
from runner.planning.coverage import node_coverage
from runner.planning.plan import plan_of
from runner.report.progress import progress
from runner.schedule import KernelWork, Walk
from runner.timeline import Span


class NodeKernels:
    """Implements :class:`runner.backend.step_runner.KernelStore` for one rank.

    Attributes:
        spans: this rank's builds so far; the builder times them, not the shim.
    """

    def __init__(self, rank: Rank, jit: RankJit, groups: Groups) -> None:
        assert jit.compiler is not None and jit.cache is not None
        self.rank, self.scenario, self.groups = rank.number, rank.scenario, groups
        self.compiler, self.cache, self.loader = jit.compiler, jit.cache, jit.loader
        ranks_per_node = rank.scenario.parallel.ranks_per_node
        nodes_here = max(1, rank.environ.ranks_on_host // ranks_per_node)
        self.workers = max(1, available_cores() // nodes_here)
        self.spans: list[Span] = []

    @property
    def _planned(self) -> list[Kernel]:
        return [item.kernel for item in plan_of(self.scenario).kernels]

    @property
    def built(self) -> int:
        """Kernels that this rank has built."""
        return sum(span.is_kernel for span in self.spans)

    def work(self, work: KernelWork) -> None:
        """Build, verify or load kernels.

        Raises:
            UserError: kernels that should be in the node's cache are missing or broken.
            CompileError: a kernel does not compile.
        """
        if work.action == "build":
            self.build(work.kernels)
        elif work.action == "verify":
            check_holds(self.cache, self.compiler.keys, work.kernels)
        else:
            self.loader.load(work.kernels)

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Build the kernels that the node's cache lacks, on all its cores."""
        if not kernels:
            return
        keys = self.compiler.keys
        by_key = {keys.cache_key(kernel): kernel for kernel in kernels}
        sources = {key: keys.source(kernel) for key, kernel in by_key.items()}
        # Only rank 0 shows progress: all nodes build shares of about the same size.
        shown = progress("build kernels") if self.rank == 0 else nullcontext(lambda *_: None)
        # The lock is shared because nodes with one directory build their shares at the same time.
        # It keeps out a ``runner compile``, which would remove what they are writing.
        with locked(self.cache.root, shared=True, on_wait=say_waiting), shown as show:
            missing = self.cache.keys_to_build(sources)

            def take(result: BuildResult) -> None:
                self._take(result)
                show(self.built, len(missing), self.built / len(missing))

            builder = KernelBuilder(
                self.compiler, self.workers, os.environ, take, on_shared=self._note
            )
            builder.build([Job(key, by_key[key], sources[key]) for key in missing])

    def _lacking(self) -> list[Kernel]:
        """The planned kernels that the node's cache lacks."""
        return lacking(self.cache, self.compiler.keys, self._planned)

    def _take(self, result: BuildResult) -> None:
        job, kernel = result.job, result.job.kernel
        if result.cubin is None:
            raise CompileError(f"{kernel.name}: {result.error}")
        self.cache.put(job.key, job.source, result.cubin, self.compiler.keys.extra_files)
        self._note(kernel.name, result.started, time.time(), kernel.identity)

    def _note(self, name: str, start: float, end: float, identity: str = "") -> None:
        """Keep the span of a kernel's build, or of a step that several kernels share."""
        self.spans.append(Span(self.rank, start, end, "compile", name, identity))

    def exchange(self) -> None:
        """Wait for everyone; then node leaders send each other the kernels that their caches lack.

        Nodes that share a directory lack nothing and skip this.
        """
        dist.barrier(group=self.groups.everyone)
        if self.groups.leaders is not None and self.scenario.is_node_leader(self.rank):
            self._exchange_lacking(self.groups.leaders)
        if self.scenario.parallel.nodes > 1:
            dist.barrier(group=self.groups.everyone)

    def _exchange_lacking(self, group: dist.ProcessGroup) -> None:
        parallel, key_of = self.scenario.parallel, self.compiler.keys.cache_key
        mine = set(map(key_of, self._lacking()))
        by_node: list[set[str]] = [set() for _ in range(parallel.nodes)]
        dist.all_gather_object(by_node, mine, group=group)
        anywhere = set().union(*by_node)
        for node in range(parallel.nodes):
            leader = node * parallel.ranks_per_node
            share = map(key_of, node_shares(self.scenario)[node])
            keys = [key for key in share if key in anywhere]
            if not keys:
                continue
            entries: list[Any] = [None] * len(keys)
            if leader == self.rank:
                folders = map(self.cache.entry, keys)
                entries = [((f / SOURCE).read_text(), (f / CUBIN).read_bytes()) for f in folders]
            dist.broadcast_object_list(entries, src=leader, group=group)
            received = dict(zip(keys, entries, strict=True))
            mine_here = {key: received[key][0] for key in keys if key in mine}
            with locked(self.cache.root, shared=True):
                for key in self.cache.keys_to_build(mine_here):
                    source, cubin = received[key]
                    self.cache.put(key, source, cubin, self.compiler.keys.extra_files)

    def wait(self) -> None:
        dist.barrier(group=self.groups.everyone)

    def walk(self, walk: Walk) -> None:
        self.loader.walk(walk)

    def coverage(self) -> dict[str, object] | None:
        """How much of the plan the node's cache holds, for the Timeline; None if not a leader."""
        if not self.scenario.is_node_leader(self.rank):
            return None
        present = set(self._planned).difference(self._lacking())
        return node_coverage(self.scenario, self.scenario.parallel.node_of(self.rank), present)
