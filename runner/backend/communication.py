"""Steps that communicate."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from runner.backend.announcer import Announcer, bf16_bytes
from runner.schedule import Await, Begin, Collective, Recv, Send


@dataclass(frozen=True, slots=True)
class Begun:
    """A collective under way: its name, and what the communicator keeps of it."""

    name: str
    handle: Any


class Communication(Announcer):
    """Collectives, awaited at once or begun, and messages between stages."""

    def all_reduce(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum over ``group``; nothing happens in a group of one."""
        if len(group) == 1:
            return x
        op = Collective(f"all_reduce {name}", group, x.nbytes)
        return self.sink.run(op, lambda: self.comm.all_reduce(x, group))

    def sum_hidden(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum partial results [T, H] over ``group`` into hidden states, bf16 on the wire.

        The CPU reference really moves wider partial sums; the operation is the real model's.
        """
        if len(group) > 1:
            op = Collective(f"all_reduce {name}", group, bf16_bytes(x))
            x = self.sink.run(op, lambda: self.comm.all_reduce(x, group))
        return self.math.round_hidden(x)

    def all_gather(self, name: str, x: Any, group: tuple[int, ...], dim: int) -> Any:
        """Concatenate over ``group`` along ``dim``; nothing happens in a group of one."""
        if len(group) == 1:
            return x
        op = Collective(f"all_gather {name}", group, x.nbytes)
        return self.sink.run(op, lambda: self.comm.all_gather(x, group, dim))

    def reduce_scatter(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum partial results [T, H] over ``group``; each rank keeps its block of the rows."""
        op = Collective(f"reduce_scatter {name}", group, bf16_bytes(x))
        return self.sink.run(op, lambda: self.comm.end(self.comm.begin("reduce_scatter", x, group)))

    def begin(
        self, kind: str, name: str, x: Any, group: tuple[int, ...], *, width: int = 2
    ) -> Begun:
        """Start a collective that goes on beside what follows; see :meth:`Communicator.begin`.

        Args:
            kind: of the collective.
            name: what is moved; no two that are under way have one.
            x: what a rank gives.
            group: world ranks.
            width: bytes of an element on the wire; the CPU reference may really move more.
        """
        op = Begin(f"{kind} {name}", group, width * int(prod(x.shape)))
        return Begun(op.name, self.sink.run(op, lambda: self.comm.begin(kind, x, group)))

    def finish(self, begun: Begun) -> Any:
        """Wait for a collective and take its result."""
        return self.sink.run(Await(begun.name), lambda: self.comm.end(begun.handle))

    def send(self, name: str, x: Any, peer: int) -> None:
        """Send to a world rank."""
        self.sink.run(Send(name, peer, x.nbytes), lambda: self.comm.send(x, peer))

    def recv(self, name: str, shape: tuple[int, ...], dtype: str, nbytes: int, peer: int) -> Any:
        """Receive from a world rank; blocks until it is there."""
        return self.sink.run(Recv(name, peer, nbytes), lambda: self.comm.recv(shape, dtype, peer))
