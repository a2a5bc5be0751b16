"""Tensors between ranks over torch.distributed: gloo or NCCL, one communicator a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import prod

import torch
import torch.distributed as dist

from launch.comm_stream import CommStream, Ran
from launch.watchdog import CommunicationTimeoutError
from runner.backend.tensor import Tensor, TensorSpec
from runner.config.parallel import ParallelConfig

_TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class UnderWay:
    """A collective that was begun.

    Attributes:
        work: its handle, or where it is on the GPU's stream for collectives.
        made: where its result comes.
        source: what it reads, kept until it ended.
        summed: blocks of ``made`` that are still to be summed.
    """

    work: dist.Work | Ran
    made: torch.Tensor
    source: torch.Tensor
    summed: int


@dataclass(frozen=True)
class Groups:
    """Process groups of a run.

    Attributes:
        of: group of each set of ranks that a collective is among.
        pairs: what sends and receives go through.
        everyone: for what all ranks do together on their hosts.
    """

    of: dict[tuple[int, ...], dist.ProcessGroup]
    pairs: dist.ProcessGroup
    everyone: dist.ProcessGroup


def make_groups(parallel: ParallelConfig, limit: float, link: str) -> Groups:
    """One process group per distinct group of more than one rank, made by all ranks in order.

    Args:
        parallel: the layout.
        limit: seconds that a communication may wait.
        link: ``nccl`` or ``gloo``, what tensors go over.

    Raises:
        CommunicationTimeoutError: ranks did not connect within ``limit``.
    """
    wanted: dict[tuple[int, ...], None] = {}
    for rank in range(parallel.world_size):
        for group in _groups_of(parallel, rank):
            if len(group) > 1:
                wanted[group] = None
    timeout = timedelta(seconds=limit)
    # Our own watchdog comes before NCCL's, which can say less.
    later = timeout + timedelta(seconds=30) if link == "nccl" else timeout
    try:
        made = {group: dist.new_group(list(group), timeout=later) for group in wanted}
        pairs = dist.new_group(timeout=later)
        everyone = dist.new_group(timeout=timeout, backend="gloo")
    except dist.DistStoreError:
        waited, more = later.total_seconds(), " and 30 s more" if later > timeout else ""
        raise CommunicationTimeoutError(
            f"the ranks did not connect within {waited:g} s, the limit of --nccl-timeout{more}"
        ) from None
    assert pairs is not None and everyone is not None
    return Groups(made, pairs, everyone)


def _groups_of(parallel: ParallelConfig, rank: int) -> Iterable[tuple[int, ...]]:
    tp_group = parallel.tp_group(rank)
    yield tp_group
    yield parallel.attn_cp_group(rank)
    size = parallel.attn_tp
    first = parallel.coordinates(rank).tp_rank // size * size
    yield tp_group[first : first + size]


class TorchComm:
    """Implements :class:`runner.backend.step_runner.Communicator` on torch tensors.

    gloo moves host memory only, so tensors of a GPU go through the host there. NCCL's collectives
    go to a stream of their own.

    Args:
        groups: process groups.
        device: where the tensors are.
        through_host: whether they go over gloo all the same.
        stream: the GPU's stream for collectives; None makes one where there is use for it.
    """

    def __init__(
        self,
        groups: Groups,
        device: torch.device,
        *,
        through_host: bool,
        stream: CommStream | None = None,
    ) -> None:
        self._groups, self._device, self._through_host = groups, device, through_host
        self._gloo = through_host or device.type == "cpu"
        self._stream = None if self._gloo else stream or CommStream(device)
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []

    def all_reduce(self, x: torch.Tensor, group: tuple[int, ...]) -> torch.Tensor:
        """Sum over the group."""
        buffer = self._outbound(x)
        self._collect(lambda: dist.all_reduce(buffer, group=self._groups.of[group]))
        return self._inbound(buffer)

    def all_gather(self, x: torch.Tensor, group: tuple[int, ...], dim: int) -> torch.Tensor:
        """Concatenate along ``dim``."""
        buffer = self._outbound(x)
        parts = [torch.empty_like(buffer) for _ in group]
        self._collect(lambda: dist.all_gather(parts, buffer, group=self._groups.of[group]))
        return self._inbound(torch.cat(parts, dim))

    def begin(self, kind: str, x: torch.Tensor, group: tuple[int, ...]) -> UnderWay:
        """Start a collective on a stream, or in threads, of its own.

        gloo sums nothing on the way of a reduce-scatter here: its blocks are sent, and summed at
        the end, since gloo tells of an all-to-all when it ended.
        """
        source, process_group = self._outbound(x), self._groups.of[group]
        beside = self._stream is None
        if kind == "all_gather":
            made = source.new_empty(len(group) * source.shape[0], *source.shape[1:])
            parts = list(made.chunk(len(group)))
            start = partial(dist.all_gather, parts, source, group=process_group, async_op=beside)
        elif kind == "reduce_scatter" and not self._gloo:
            made = source.new_empty(source.shape[0] // len(group), *source.shape[1:])
            start = partial(dist.reduce_scatter_tensor, made, source, group=process_group)
        else:
            made = torch.empty_like(source)
            start = partial(
                dist.all_to_all_single, made, source, group=process_group, async_op=beside
            )
        work = start() if self._stream is None else self._stream.start(start)
        assert work is not None
        summed = len(group) if kind == "reduce_scatter" and self._gloo else 1
        return UnderWay(work, made, source, summed)

    def end(self, begun: object) -> torch.Tensor:
        """Wait for it: on a GPU with a communicator of its own, its stream does, not the host."""
        assert isinstance(begun, UnderWay)
        if isinstance(begun.work, Ran):
            assert self._stream is not None
            self._stream.wait(begun.work)
        else:
            begun.work.wait()
        made = begun.made
        if begun.summed > 1:
            made = made.unflatten(0, (begun.summed, -1)).sum(0)
        return self._inbound(made)

    def _collect(self, collective: Callable[[], object]) -> None:
        """Do a collective that what follows waits for."""
        if self._stream is None:
            collective()
        else:
            self._stream.wait(self._stream.start(collective))

    def send(self, x: torch.Tensor, peer: int) -> None:
        """Start a send; it ends on its own, so that a late receiver does not hold us up.

        The first to a peer over NCCL does: it connects the two.
        """
        buffer = self._outbound(x)
        work = dist.isend(buffer, peer, group=self._groups.pairs)
        assert work is not None
        self._sends = [(sent, kept) for sent, kept in self._sends if not sent.is_completed()]
        self._sends.append((work, buffer))

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> torch.Tensor:
        """Wait for a tensor."""
        where = torch.device("cpu") if self._through_host else self._device
        buffer = torch.empty(shape, dtype=_TORCH_DTYPES[dtype], device=where)
        dist.recv(buffer, peer, group=self._groups.pairs)
        return self._inbound(buffer)

    def finish(self) -> None:
        """Wait until all sends have been taken."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()

    def _outbound(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to("cpu", copy=True) if self._through_host else x.clone()

    def _inbound(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device)


class ScratchComm:
    """Really communicates for a forward of shapes: bytes of the right number, no content."""

    def __init__(self, comm: TorchComm) -> None:
        self._comm = comm
        self._scratch: dict[tuple[int, str], torch.Tensor] = {}

    def all_reduce(self, x: Tensor, group: tuple[int, ...]) -> Tensor:
        """Sum zeros over the group."""
        return self._comm.all_reduce(self._buffer(x), group)

    def all_gather(self, x: Tensor, group: tuple[int, ...], dim: int) -> Tensor:
        """Gather zeros."""
        return self._comm.all_gather(self._buffer(x), group, 0)

    def begin(self, kind: str, x: Tensor, group: tuple[int, ...]) -> UnderWay:
        """Start it with zeros."""
        return self._comm.begin(kind, self._buffer(x).view(x.shape), group)

    def end(self, begun: object) -> Tensor:
        """Wait for it."""
        return self._comm.end(begun)

    def send(self, x: Tensor, peer: int) -> None:
        """Send zeros."""
        self._comm.send(self._buffer(x), peer)

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> Tensor:
        """Receive and forget."""
        return self._comm.recv((prod(shape),), dtype, peer)

    def _buffer(self, x: object) -> torch.Tensor:
        assert isinstance(x, TensorSpec)
        key = (prod(x.shape), x.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.zeros(key[0], dtype=_TORCH_DTYPES[x.dtype])
        return self._scratch[key]
