"""Simulated nodes: the disk and the cores that their ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from runner.kernels.kernel import Kernel
from runner.planning.residency import STALLS_AFTER
from sim.costs.model import CostModel
from sim.engine.cores import Cores
from sim.engine.rank import Rank
from sim.engine.rank_program import used_before

At = Callable[..., None]
"""``at(time, action, priority)`` has ``action(time)`` called at a time."""


class Nodes:
    """Disks and cores of all nodes.

    Args:
        costs: how long compiles and loads take.
        node_of: node of each rank.
        host_of: machine of each node, where several share one's cores; None is one for each.
        cached: kernels that every disk holds from the start.
        at: the engine's events.
    """

    def __init__(
        self,
        costs: CostModel,
        node_of: Sequence[int],
        host_of: Sequence[int] | None,
        cached: frozenset[Kernel],
        at: At,
    ) -> None:
        self._costs, self._node_of, self._cached, self._at = costs, node_of, cached, at
        nodes = set(node_of)
        self.disks: dict[int, set[Kernel]] = {node: set(cached) for node in nodes}
        hosts = dict(enumerate(host_of)) if host_of is not None else {node: node for node in nodes}
        pools = {host: Cores(costs.slowdown) for host in hosts.values()}
        self._cores = {node: pools[hosts[node]] for node in nodes}
        self._exchanged: set[int] = set()

    def bring_in(
        self,
        rank: Rank,
        kernels: Sequence[Kernel],
        time: float,
        done: Callable[[float], None],
        *,
        bulk: bool,
    ) -> None:
        """Find the first kernel on disk or compile it, then the others, then ``done(end)``."""
        if not kernels:
            done(time)
            return
        kernel, rest = kernels[0], kernels[1:]

        def load(ready: float) -> None:
            end = ready + self._costs.load_seconds(kernel, bulk=bulk)
            if end > ready:
                rank.note(ready, end, "load", kernel.name)
            self._at(end, lambda now: self.bring_in(rank, rest, now, done, bulk=bulk))

        def compiled(end: float) -> None:
            rank.note(time, end, "compile", kernel.name, kernel.identity)
            self.disks[rank.node].add(kernel)
            load(end)

        if kernel in self.disks[rank.node]:
            load(time)
            return
        seconds = self._costs.compile_seconds(kernel)
        self._cores[rank.node].start(time, seconds, compiled)
        self._plan_end(rank.node)

    def _plan_end(self, node: int) -> None:
        cores = self._cores[node]
        end, version = cores.next_end(), cores.version
        if end is None:
            return

        def act(time: float) -> None:
            if cores.version == version:
                cores.finish(time)
                self._plan_end(node)

        self._at(end, act, priority=0)

    def exchange(self, group: Sequence[int]) -> None:
        """Give the nodes of these ranks what any of them has."""
        nodes = {self._node_of[index] for index in group}
        self._exchanged |= nodes
        disks = [self.disks[node] for node in nodes]
        everything = set().union(*disks)
        for disk in disks:
            disk.update(everything)

    def up(self, ranks: Iterable[Rank]) -> dict[int, frozenset[Kernel]]:
        """What each node has once its ranks have done what comes before further requests."""
        held = {node: set(self._cached) for node in self.disks}
        for rank in ranks:
            held[rank.node].update(used_before(rank.program, STALLS_AFTER))
        if self._exchanged:
            everything = set().union(*(held[node] for node in self._exchanged))
            for node in self._exchanged:
                held[node] |= everything
        return {node: frozenset(kernels) for node, kernels in held.items()}
