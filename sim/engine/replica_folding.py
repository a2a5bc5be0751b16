"""Replicas that behave alike: simulate the first whole, and of the others only what is shared.

Replicas on nodes and hosts of their own meet only in operations of all ranks (the exchange of built
kernels). After the last of these every replica starts from the same state at the same time and does
the same, so the first one's spans are the others', shifted by rank.
"""

from __future__ import annotations

from dataclasses import replace

from runner.config.parallel import ParallelConfig
from runner.timeline import Span
from sim.engine.engine import Outcome


def can_fold(parallel: ParallelConfig, hosts: int) -> bool:
    """Whether no node holds ranks of two replicas, and no host nodes of two."""
    replicas = parallel.replicas
    return replicas > 1 and parallel.nodes % replicas == 0 and hosts % replicas == 0


def unfold(outcome: Outcome, parallel: ParallelConfig) -> Outcome:
    """The outcome of all replicas, from merged spans of one whose later replicas were cut off.

    Raises:
        AssertionError: the replicas did not part at the same time.
    """
    ranks = parallel.world_size // parallel.replicas
    nodes = parallel.nodes // parallel.replicas
    parted = set(outcome.ends[ranks:])
    assert len(parted) == 1, f"replicas part at different times: {sorted(parted)}"
    (since,) = parted
    # Only phases, which enclose others, lie across that point.
    own = [s for s in outcome.spans if s.rank < ranks and (s.end > since or s.start == since)]
    copies = [
        # Messages of another replica have other keys; kernels are the same.
        Span(rank + shift, start, end, kind, name, prefix + key if kind == "comm" else key)
        for replica in range(1, parallel.replicas)
        for shift, prefix in [(replica * ranks, f"{replica}:")]
        for rank, start, end, kind, name, key in own
    ]
    return replace(
        outcome,
        spans=[*outcome.spans, *copies],
        disks={node: outcome.disks[node % nodes] for node in range(parallel.nodes)},
        up={node: outcome.up[node % nodes] for node in range(parallel.nodes)},
    )
