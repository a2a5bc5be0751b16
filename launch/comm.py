"""Process groups, and communicators over them: gloo or NCCL, moving tensors or only shapes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from launch.device import CollectiveEvents, CollectiveStream
from launch.limits import CommunicationTimeoutError
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
    """Process groups: ``of`` has one for each set of ranks, ``pairs`` is for sends and receives.

    ``everyone`` connects all ranks over gloo. ``leaders`` connects the nodes' first ranks over
    gloo; it is None on other ranks, and on a single node.
    """

    of: dict[tuple[int, ...], dist.ProcessGroup]
    pairs: dist.ProcessGroup
    everyone: dist.ProcessGroup
    leaders: dist.ProcessGroup | None


def make_groups(parallel: ParallelConfig, timeout: float) -> Groups:
    """Make all process groups; ``timeout`` is the longest wait of a communication, in seconds.

    Raises:
        CommunicationTimeoutError: the ranks did not connect in time.
    """
    groups_of = (parallel.tp_group, parallel.attn_cp_group, parallel.attn_tp_group)
    # torch requires all ranks to make the groups in the same order.
    needed = dict.fromkeys(of(rank) for rank in range(parallel.world_size) for of in groups_of)
    # Our own limit ends the wait before torch's does: our message says more.
    new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout + 30))
    leaders: dist.ProcessGroup | None = None
    try:
        of = {group: new_group(list(group)) for group in needed if len(group) > 1}
        pairs, everyone = new_group(), new_group(backend="gloo")
        if parallel.nodes > 1:
            # Without local synchronisation, torch (2.11, 2.13) makes the other ranks split the
            # NCCL communicator. This group is gloo's and takes no part, so they wait forever.
            first_ranks = list(range(0, parallel.world_size, parallel.ranks_per_node))
            leaders = new_group(first_ranks, backend="gloo", use_local_synchronization=True)
    except dist.DistStoreError:
        raise CommunicationTimeoutError(
            f"the ranks did not connect within {timeout + 30:g} s (--nccl-timeout {timeout:g} "
            "and 30 s more)"
        ) from None
    assert pairs is not None and everyone is not None
    return Groups(of, pairs, everyone, leaders)


@dataclass(frozen=True)
class AsyncCollective:
    """A collective in flight: ``work`` is gloo's handle, or the events on the GPU's stream.

    ``source`` is held to keep it alive; at the end ``blocks`` blocks of ``result`` are summed.
    """

    work: dist.Work | CollectiveEvents
    result: torch.Tensor
    source: torch.Tensor
    blocks: int


class TorchComm:
    """Implements :class:`runner.backend.step_runner.Communicator` over process groups.

    NCCL's collectives run on ``stream``; with gloo it is None.
    """

    def __init__(self, groups: Groups, device: torch.device, link: str) -> None:
        self._groups, self._gloo, self._device = groups, link == "gloo", device
        # gloo moves only host memory, so a GPU's tensors go through the host.
        self._where = torch.device("cpu") if self._gloo else device
        self.stream = None if self._gloo else CollectiveStream(device)
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []

    def _outbound(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of ``x`` to send, in memory that the link can read."""
        return x.detach().to("cpu", copy=True) if self._gloo else x.clone()

    def _inbound(self, moved: torch.Tensor) -> torch.Tensor:
        return moved.to(self._device)

    def all_gather(self, x: torch.Tensor, group: tuple[int, ...], dim: int) -> torch.Tensor:
        gathered = self._finished(self.begin("all_gather", x, group))
        parts = gathered.chunk(len(group))
        return self._inbound(gathered if dim == 0 else torch.cat(parts, dim))

    def begin(self, kind: str, x: torch.Tensor, group: tuple[int, ...]) -> AsyncCollective:
        """Start a collective on the GPU's stream, or in gloo's threads.

        gloo cannot reduce-scatter asynchronously, so ranks exchange blocks and sum them at the end.
        """
        source = self._outbound(x)
        if kind == "all_gather":
            result = source.new_empty(len(group) * source.shape[0], *source.shape[1:])
            start = partial(dist.all_gather, list(result.chunk(len(group))), source)
        elif kind == "all_reduce":
            result, start = source, partial(dist.all_reduce, source)
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

    def end(self, begun: object) -> torch.Tensor:
        """Wait for a collective; over NCCL only the current stream waits, not the host."""
        assert isinstance(begun, AsyncCollective)
        return self._inbound(self._finished(begun))

    def _finished(self, begun: AsyncCollective) -> torch.Tensor:
        if isinstance(begun.work, CollectiveEvents):
            assert self.stream is not None
            self.stream.wait(begun.work)
        else:
            begun.work.wait()
        result = begun.result
        if begun.blocks > 1:
            result = result.unflatten(0, (begun.blocks, -1)).sum(0)
        return result

    def send(self, x: torch.Tensor, peer: int) -> None:
        """Start a send; it does not wait for the receiver.

        The exception is the first NCCL send to a peer, which waits until the two are connected.
        """
        buffer = self._outbound(x)
        work = dist.isend(buffer, peer, group=self._groups.pairs)
        assert work is not None
        self._sends = [(sent, kept) for sent, kept in self._sends if not sent.is_completed()]
        self._sends.append((work, buffer))

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> torch.Tensor:
        """Wait for a tensor from ``peer``."""
        buffer = torch.empty(shape, dtype=_TORCH_DTYPES[dtype], device=self._where)
        dist.recv(buffer, peer, group=self._groups.pairs)
        return self._inbound(buffer)

    def finish(self) -> None:
        """Wait until the peers have received everything that was sent."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()


class ScratchComm(TorchComm):
    """Moves zeros, as many bytes as the real tensors of a forward on shapes would have."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, torch.device("cpu"), "gloo")
        self._zeros: dict[TensorSpec, torch.Tensor] = {}

    def _outbound(self, x: object) -> torch.Tensor:
        assert isinstance(x, TensorSpec)
        if x not in self._zeros:
            self._zeros[x] = torch.zeros(x.shape, dtype=_TORCH_DTYPES[x.dtype])
        return self._zeros[x]
