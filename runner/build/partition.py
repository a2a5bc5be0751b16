"""Share kernels out over nodes so that all nodes finish at about the same time."""

from __future__ import annotations

from collections.abc import Sequence

from runner.build.estimates import expected_assemble_seconds, front_end_seconds
from runner.kernels.kernel import Kernel


def share_out(kernels: Sequence[Kernel], nodes: int) -> list[tuple[Kernel, ...]]:
    """One share per node: costliest first, each kernel goes to the node with the least work so far.

    Every process that calls this with the same arguments gets the same shares.
    """
    loads = [0.0] * nodes
    shares: list[list[Kernel]] = [[] for _ in range(nodes)]
    costs = {
        kernel: front_end_seconds(kernel) + expected_assemble_seconds(kernel) for kernel in kernels
    }
    for kernel in sorted(kernels, key=lambda kernel: -costs[kernel]):
        node = min(range(nodes), key=loads.__getitem__)
        shares[node].append(kernel)
        loads[node] += costs[kernel]
    return [tuple(share) for share in shares]
