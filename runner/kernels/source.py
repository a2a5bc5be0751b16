"""Where tables come from, as everything that needs one sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from runner.kernels.table import Demand, KernelTable, Origin


class KernelSource(Protocol):
    """Gives tables of one library on one GPU.

    Attributes:
        origin: whose answers they are.
    """

    def __hash__(self) -> int:
        """Sources are asked once for each deployment."""

    @property
    def origin(self) -> Origin:
        """See the class."""

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """A table that knows at least what ``demands()`` names.

        Sources that know everything never call ``demands``.

        Raises:
            UserError: the source cannot tell; the message says what can.
        """
