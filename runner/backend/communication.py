"""Steps that communicate: collectives, blocking or asynchronous, and messages between stages."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from runner.backend.step_runner import StepRunner
from runner.backend.tensor import Tensor, bf16_bytes, reshaped, spec
from runner.schedule import Await, Begin, Collective, Recv, Send


@dataclass(frozen=True, slots=True)
class Begun:
    """A collective in flight: its name, its result's shape, and the communicator's handle."""

    name: str
    shape: Tensor
    handle: object


class Communication(StepRunner):
    """Communication among world ranks; ``all_reduce`` and ``all_gather`` skip groups of one."""

    def all_reduce(self, name: str, x: Tensor, group: tuple[int, ...]) -> Tensor:
        """Sum [T, H] over ``group``.

        The operation counts bf16 bytes, as on a GPU, although a CPU moves wider partial sums.
        """
        return x if len(group) == 1 else self._sum("all_reduce", name, x, group)

    def all_gather(self, name: str, x: Tensor, group: tuple[int, ...], dim: int) -> Tensor:
        if len(group) == 1:
            return x
        sizes = list(x.shape)
        sizes[dim] *= len(group)
        op = Collective(f"all_gather {name}", group, x.nbytes)
        return self._communicate(
            op, reshaped(x, *sizes), lambda comm: comm.all_gather(x, group, dim)
        )

    def reduce_scatter(self, name: str, x: Tensor, group: tuple[int, ...]) -> Tensor:
        """Sum [T, H] over ``group``; each rank keeps its block of the rows."""
        return self._sum("reduce_scatter", name, x, group)

    def _sum(self, kind: str, name: str, x: Tensor, group: tuple[int, ...]) -> Tensor:
        return self._communicate(
            Collective(f"{kind} {name}", group, bf16_bytes(x)),
            _result_shape(kind, x, len(group)),
            lambda comm: comm.end(comm.begin(kind, x, group)),
        )

    def begin(
        self, kind: str, name: str, x: Tensor, group: tuple[int, ...], *, width: int = 2
    ) -> Begun:
        """Start a collective that runs in the background; see :meth:`Communicator.begin`.

        Collectives in flight must have different names; ``width`` is the bytes sent per element.
        """
        op = Begin(f"{kind} {name}", group, width * prod(x.shape))
        comm = self.comm
        handle = self.sink.run(op, lambda: None if comm is None else comm.begin(kind, x, group))
        return Begun(op.name, _result_shape(kind, x, len(group)), handle)

    def finish(self, begun: Begun) -> Tensor:
        return self._communicate(
            Await(begun.name), begun.shape, lambda comm: comm.end(begun.handle)
        )

    def send(self, name: str, x: Tensor, peer: int) -> None:
        comm = self.comm
        self.sink.run(
            Send(name, peer, x.nbytes), lambda: None if comm is None else comm.send(x, peer)
        )

    def recv(self, name: str, shape: tuple[int, ...], dtype: str, peer: int) -> Tensor:
        """Receive from a world rank; blocks until the tensor is there."""
        expected = spec(*shape, dtype=dtype)
        op = Recv(name, peer, expected.nbytes)
        return self._communicate(op, expected, lambda comm: comm.recv(shape, dtype, peer))


def _result_shape(kind: str, x: Tensor, ranks: int) -> Tensor:
    """Shape of a collective's result, from its input on one rank."""
    rows, *rest = x.shape
    if kind == "all_gather":
        rows *= ranks
    elif kind == "reduce_scatter":
        rows //= ranks
    return reshaped(x, rows, *rest)
