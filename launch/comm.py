"""Process groups, and communicators over them: gloo or NCCL, with tensors or with shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import prod

import torch
import torch.distributed as dist

from launch.device import CollectiveEvents, CollectiveStream
from launch.limits import CommunicationTimeoutError
from runner.backend.shapes import NoComm
from runner.backend.tensor import TensorSpec
from runner.config.parallel import ParallelConfig

_TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class Groups:
    """Process groups of a run.

    Attributes:
        of: group of each set of ranks that run collectives.
        pairs: for sends and receives.
        everyone: gloo group of all ranks' hosts.
        leaders: gloo group of each node's first rank; None on a single node and on other ranks.
    """

    of: dict[tuple[int, ...], dist.ProcessGroup]
    pairs: dist.ProcessGroup
    everyone: dist.ProcessGroup
    leaders: dist.ProcessGroup | None


def make_groups(parallel: ParallelConfig, timeout: float, link: str) -> Groups:
    """Make a process group of each distinct set of ranks, in the same order on every rank.

    Args:
        parallel: the layout.
        timeout: seconds that a communication may take.
        link: what tensors go over, ``nccl`` or ``gloo``.

    Raises:
        CommunicationTimeoutError: the ranks did not connect in time.
    """
    needed: dict[tuple[int, ...], None] = {}
    for rank in range(parallel.world_size):
        needed.update(dict.fromkeys(group for group in _groups_of(parallel, rank) if group[1:]))
    ours = timedelta(seconds=timeout)
    # Our own limit comes before NCCL's watchdog, which says less.
    later = ours + timedelta(seconds=30) if link == "nccl" else ours
    try:
        of = {group: dist.new_group(list(group), timeout=later) for group in needed}
        pairs = dist.new_group(timeout=later)
        everyone = dist.new_group(timeout=ours, backend="gloo")
        leaders = _group_of_leaders(parallel, ours) if parallel.nodes > 1 else None
    except dist.DistStoreError:
        waited, more = later.total_seconds(), " and 30 s more" if later > ours else ""
        raise CommunicationTimeoutError(
            f"the ranks did not connect within {waited:g} s, the limit of --nccl-timeout{more}"
        ) from None
    assert pairs is not None and everyone is not None
    return Groups(of, pairs, everyone, leaders)


def _groups_of(parallel: ParallelConfig, rank: int) -> Iterable[tuple[int, ...]]:
    tp_group = parallel.tp_group(rank)
    yield tp_group
    yield parallel.attn_cp_group(rank)
    size = parallel.attn_tp
    first = parallel.coordinates(rank).tp_rank // size * size
    yield tp_group[first : first + size]


def _group_of_leaders(parallel: ParallelConfig, timeout: timedelta) -> dist.ProcessGroup | None:
    group: dist.ProcessGroup | None = dist.new_group(
        list(range(0, parallel.world_size, parallel.ranks_per_node)),
        backend="gloo",
        timeout=timeout,
        # Otherwise torch (2.11, 2.13) lets the ranks outside split the NCCL communicator, in which
        # a gloo group has no part, and they wait forever.
        use_local_synchronization=True,
    )
    return group


@dataclass(frozen=True)
class AsyncCollective:
    """A collective that was started and not yet awaited.

    Attributes:
        work: gloo's handle, or the collective's events on the GPU's stream.
        result: where its result arrives.
        source: what it reads; kept alive until it ends.
        blocks: blocks of ``result`` that are to be summed at the end.
    """

    work: dist.Work | CollectiveEvents
    result: torch.Tensor
    source: torch.Tensor
    blocks: int


def events_of(handle: object) -> CollectiveEvents | None:
    """Events of a collective that was started on a GPU's stream; None for any other handle."""
    work = handle.work if isinstance(handle, AsyncCollective) else None
    return work if isinstance(work, CollectiveEvents) else None


class TorchComm:
    """Implements :class:`runner.backend.communicator.Communicator` on torch tensors.

    gloo moves host memory only, so a GPU's tensors take the way through the host. NCCL's
    collectives run on a stream of their own.

    Args:
        groups: process groups.
        device: where the tensors are.
        link: what they go over, ``nccl`` or ``gloo``.
    """

    def __init__(self, groups: Groups, device: torch.device, link: str) -> None:
        self._groups, self._device, self._gloo = groups, device, link == "gloo"
        self.stream = None if self._gloo else CollectiveStream(device)
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []

    def all_reduce(self, x: torch.Tensor, group: tuple[int, ...]) -> torch.Tensor:
        """Sum over the group."""
        buffer = self._outbound(x)
        self._run(partial(dist.all_reduce, buffer, group=self._groups.of[group]))
        return self._inbound(buffer)

    def all_gather(self, x: torch.Tensor, group: tuple[int, ...], dim: int) -> torch.Tensor:
        """Concatenate along ``dim``."""
        buffer = self._outbound(x)
        parts = [torch.empty_like(buffer) for _ in group]
        self._run(partial(dist.all_gather, parts, buffer, group=self._groups.of[group]))
        return self._inbound(torch.cat(parts, dim))

    def begin(self, kind: str, x: torch.Tensor, group: tuple[int, ...]) -> AsyncCollective:
        """Start a collective on the GPU's stream, or in gloo's threads.

        gloo cannot reduce-scatter asynchronously: blocks are exchanged, and summed at the end.
        """
        source = self._outbound(x)
        if kind == "all_gather":
            result = source.new_empty(len(group) * source.shape[0], *source.shape[1:])
            start = partial(dist.all_gather, list(result.chunk(len(group))), source)
        elif kind == "reduce_scatter" and not self._gloo:
            result = source.new_empty(source.shape[0] // len(group), *source.shape[1:])
            start = partial(dist.reduce_scatter_tensor, result, source)
        else:
            result = torch.empty_like(source)
            start = partial(dist.all_to_all_single, result, source)
        start = partial(start, group=self._groups.of[group], async_op=self.stream is None)
        work = start() if self.stream is None else self.stream.start(start)
        assert work is not None
        blocks = len(group) if kind == "reduce_scatter" and self._gloo else 1
        return AsyncCollective(work, result, source, blocks)

    def end(self, begun: AsyncCollective) -> torch.Tensor:
        """Wait for a collective; over NCCL the current stream waits, not the host."""
        if isinstance(begun.work, CollectiveEvents):
            assert self.stream is not None
            self.stream.wait(begun.work)
        else:
            begun.work.wait()
        result = begun.result
        if begun.blocks > 1:
            result = result.unflatten(0, (begun.blocks, -1)).sum(0)
        return self._inbound(result)

    def send(self, x: torch.Tensor, peer: int) -> None:
        """Start a send, which a late receiver does not hold up.

        Only the first NCCL send to a peer waits for it: it connects the two.
        """
        buffer = self._outbound(x)
        work = dist.isend(buffer, peer, group=self._groups.pairs)
        assert work is not None
        self._sends = [(sent, kept) for sent, kept in self._sends if not sent.is_completed()]
        self._sends.append((work, buffer))

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> torch.Tensor:
        """Wait for a tensor."""
        where = torch.device("cpu") if self._gloo else self._device
        buffer = torch.empty(shape, dtype=_TORCH_DTYPES[dtype], device=where)
        dist.recv(buffer, peer, group=self._groups.pairs)
        return self._inbound(buffer)

    def finish(self) -> None:
        """Wait until all sends have been received."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()

    def _run(self, collective: Callable[[], object]) -> None:
        if self.stream is None:
            collective()
        else:
            self.stream.wait(self.stream.start(collective))

    def _outbound(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to("cpu", copy=True) if self._gloo else x.clone()

    def _inbound(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device)


class ScratchComm:
    """Communicator for a forward on shapes: really moves as many bytes, all of them zeros."""

    def __init__(self, comm: TorchComm) -> None:
        self._comm, self._shapes = comm, NoComm()
        self._zeros: dict[tuple[int, str], torch.Tensor] = {}

    def all_reduce(self, x: TensorSpec, group: tuple[int, ...]) -> TensorSpec:
        self._comm.all_reduce(self._buffer(x), group)
        return x

    def all_gather(self, x: TensorSpec, group: tuple[int, ...], dim: int) -> TensorSpec:
        self._comm.all_gather(self._buffer(x), group, 0)
        return self._shapes.all_gather(x, group, dim)

    def begin(
        self, kind: str, x: TensorSpec, group: tuple[int, ...]
    ) -> tuple[AsyncCollective, TensorSpec]:
        begun = self._comm.begin(kind, self._buffer(x).view(x.shape), group)
        return begun, self._shapes.begin(kind, x, group)

    def end(self, begun: tuple[AsyncCollective, TensorSpec]) -> TensorSpec:
        self._comm.end(begun[0])
        return begun[1]

    def send(self, x: TensorSpec, peer: int) -> None:
        self._comm.send(self._buffer(x), peer)

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> TensorSpec:
        self._comm.recv((prod(shape),), dtype, peer)
        return TensorSpec(shape, dtype)

    def _buffer(self, x: TensorSpec) -> torch.Tensor:
        key = (prod(x.shape), x.dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(key[0], dtype=_TORCH_DTYPES[x.dtype])
        return self._zeros[key]
