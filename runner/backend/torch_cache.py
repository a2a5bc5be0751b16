"""Key-value cache of a batch of sequences, and where each new token stands in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from runner.backend.math import Tokens
from runner.forward_batch import ForwardBatch


@dataclass(frozen=True)
class Places:
    """Sequence and position of each token, int64 [T]."""

    sequence: torch.Tensor
    position: torch.Tensor


class KVCache:
    """Rows per (layer, name), sequence and position; made on first use, zero where not written."""

    def __init__(self, sequences: int, max_len: int, device: torch.device) -> None:
        self.sequences, self.max_len = sequences, max_len
        self._device = device
        self._rows: dict[tuple[int, str], torch.Tensor] = {}
        self._places: tuple[ForwardBatch, Places] | None = None

    def write(self, layer: int, name: str, rows: torch.Tensor, at: Places) -> None:
        """Store [T, width] rows at their places."""
        key = (layer, name)
        if key not in self._rows:
            shape = (self.sequences, self.max_len, rows.shape[1])
            self._rows[key] = torch.zeros(shape, dtype=rows.dtype, device=self._device)
        self._rows[key][at.sequence, at.position] = rows

    def read(self, layer: int, name: str) -> torch.Tensor:
        """[sequences, max_len, width]."""
        return self._rows[(layer, name)]

    def places(self, batch: ForwardBatch) -> Places:
        """Places of all the batch's new tokens; remembered for the batch at hand."""
        if self._places is None or self._places[0] is not batch:
            self._places = (batch, self._compute_places(batch))
        return self._places[1]

    def _compute_places(self, batch: ForwardBatch) -> Places:
        new = torch.tensor(batch.extend_seq_lens)
        ends = torch.tensor(batch.seq_lens)
        sequence = torch.repeat_interleave(torch.arange(len(new)), new)
        offset = torch.arange(batch.num_tokens) - (new.cumsum(0) - new)[sequence]
        position = (ends - new)[sequence] + offset
        return Places(sequence.to(self._device), position.to(self._device))


def cache_of(batch: ForwardBatch) -> KVCache:
    """The batch's cache."""
    return cast(KVCache, batch.cache)


def places_of(tokens: Tokens) -> Places:
    """Places of this rank's tokens."""
    every = cache_of(tokens.batch).places(tokens.batch)
    part = slice(tokens.start, tokens.stop)
    return Places(every.sequence[part], every.position[part])
