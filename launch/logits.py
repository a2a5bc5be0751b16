"""Logits of a launch, kept by the one rank that has all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runner.config.parallel import ParallelConfig
from runner.errors import UserError


@dataclass
class Logits:
    """Those of each forward, on the host, in the order of the forwards.

    Attributes:
        path: the file for them; None keeps none.
    """

    path: Path | None
    _kept: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of_rank(cls, path: Path | None, parallel: ParallelConfig, rank: int) -> Logits:
        """The last stage's first rank keeps them, the others none."""
        at = parallel.coordinates(rank)
        has_all = at.pp_rank == parallel.pp - 1 and at.tp_rank == 0
        return cls(path if has_all else None)

    def keep(self, made: Any) -> None:
        """Copy what a forward made to the host, as fp32; shapes alone are not kept."""
        if self.path is not None and isinstance(made, torch.Tensor):
            self._kept.append(made.float().cpu())

    def save(self) -> None:
        """Write the file, if there is anything for it.

        Raises:
            UserError: it cannot be written.
        """
        if not self._kept or self.path is None:
            return
        try:
            torch.save(self._kept, self.path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {error}") from None
