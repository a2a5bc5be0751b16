"""What a ``Backend`` moves tensors between ranks with."""

from __future__ import annotations

from typing import Any, Protocol


class Communicator(Protocol):
    """Moves tensors between ranks; groups and peers are world ranks."""

    def all_reduce(self, x: Any, group: tuple[int, ...]) -> Any:
        """Sum over the group."""

    def all_gather(self, x: Any, group: tuple[int, ...], dim: int) -> Any:
        """Concatenate the group's tensors along ``dim``, in group order."""

    def begin(self, kind: str, x: Any, group: tuple[int, ...]) -> Any:
        """Start a collective and return what :meth:`end` takes.

        Args:
            kind: ``all_gather`` along the first dimension; ``all_to_all``, of which each rank gets
                its block of everyone's rows; or ``reduce_scatter``, which sums these blocks.
            x: [blocks * rows, ...], a block for each rank; for ``all_gather`` [rows, ...].
            group: world ranks.
        """

    def end(self, begun: Any) -> Any:
        """Wait for a collective and return its result."""

    def send(self, x: Any, peer: int) -> None:
        """Send to a world rank."""

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> Any:
        """Receive a tensor of the given shape and element type from a world rank."""
