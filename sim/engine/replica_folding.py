"""Simulate one of several replicas that behave alike, and of the others only the shared part.

Replicas on their own nodes and hosts meet only in operations of all ranks (the exchange of built
kernels). After the last of these, all replicas start from the same state at the same time and do
the same, so the spans of the others are those of the first, shifted by rank.
"""

from __future__ import annotations

from dataclasses import replace

from runner.config.parallel import ParallelConfig
from runner.timeline import Span
from sim.engine.engine import Outcome


def can_fold(parallel: ParallelConfig, hosts: int) -> bool:
    """Whether each node, and each host, belongs to one replica only."""
    replicas = parallel.replicas
    return replicas > 1 and parallel.nodes % replicas == 0 and hosts % replicas == 0


def unfold(outcome: Outcome, parallel: ParallelConfig) -> Outcome:
    """Extend an outcome to all replicas; its spans are merged, later replicas cut off.

    Raises:
        AssertionError: the replicas did not part at the same time.
    """
    ranks = parallel.world_size // parallel.replicas
    nodes = parallel.nodes // parallel.replicas
    parted = set(outcome.ends[ranks:])
    assert len(parted) == 1, f"replicas part at different times: {sorted(parted)}"
    (since,) = parted
    # Only phases, which enclose other spans, extend across that point.
    own = [s for s in outcome.spans if s.rank < ranks and (s.end > since or s.start == since)]
    copies = [
        # Other replicas have other message keys, but the same kernels.
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
