"""Replicas that behave alike: simulate the first whole, and of the others only what is shared.

Replicas on nodes and hosts of their own meet only in operations of all ranks (the exchange of built
kernels). Behind the last of these every replica starts from the same state at the same time and
does the same, so the first one's spans are the others', shifted by rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runner.config.parallel import ParallelConfig
from runner.timeline import Span
from sim.engine.engine import Outcome


def can_fold(parallel: ParallelConfig, hosts: int) -> bool:
    """Whether no node holds ranks of two replicas, and no host nodes of two."""
    replicas = parallel.replicas
    return replicas > 1 and parallel.nodes % replicas == 0 and hosts % replicas == 0


def unfold(outcome: Outcome, parallel: ParallelConfig) -> Outcome:
    """The outcome of all replicas, from one whose later replicas were cut off, spans merged.

    Raises:
        AssertionError: the replicas did not part in the same state; they cannot be folded.
    """
    ranks = parallel.pp * parallel.tp
    nodes = parallel.nodes // parallel.replicas
    parted = {outcome.ends[rank] for rank in range(ranks, parallel.world_size)}
    assert len(parted) == 1, f"replicas part at different times: {sorted(parted)}"
    (since,) = parted
    spans = [*outcome.spans, *_copies(outcome.spans, parallel, ranks, since)]
    disks = {node: outcome.disks[node % nodes] for node in range(parallel.nodes)}
    up = {node: outcome.up[node % nodes] for node in range(parallel.nodes)}
    return replace(outcome, spans=spans, disks=disks, up=up)


def _copies(
    spans: list[Span], parallel: ParallelConfig, ranks: int, since: float
) -> Iterator[Span]:
    """What the first replica did after the replicas parted, for each of the others."""
    own = [span for span in spans if span.rank < ranks and _is_after(span, since)]
    for replica in range(1, parallel.replicas):
        for span in own:
            key = f"{replica}:{span.key}" if span.kind == "comm" else span.key
            rank = span.rank + replica * ranks
            yield Span(rank, span.start, span.end, span.kind, span.name, key)


def _is_after(span: Span, since: float) -> bool:
    """Phases enclose; of all else nothing lies across the point where replicas part."""
    return span.end > since or span.end == span.start == since
