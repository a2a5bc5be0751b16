"""Key-value cache of a batch of sequences, and the place of each new token in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from runner.backend.forward_batch import ForwardBatch, Tokens

K = TypeVar("K")


class Places(NamedTuple):
    """Sequence and position of each token, int64 [T]."""

    sequence: Tensor
    position: Tensor


class KVCache:
    """Rows per (layer, name), sequence and position; allocated at the first write, as zeros."""

    def __init__(self, sequences: int, max_len: int, device: torch.device) -> None:
        self.sequences, self.max_len = sequences, max_len
        self._device = device
        self._rows: dict[tuple[int, str], Tensor] = {}
        self._kept: tuple[ForwardBatch, dict[str, object]] | None = None

    def write(self, layer: int, name: str, rows: Tensor, at: Places) -> None:
        """Store [T, width] rows at their places."""
        key = (layer, name)
        if key not in self._rows:
            shape = (self.sequences, self.max_len, rows.shape[1])
            self._rows[key] = torch.zeros(shape, dtype=rows.dtype, device=self._device)
        self._rows[key][at.sequence, at.position] = rows

    def read(self, layer: int, name: str) -> Tensor:
        """[sequences, max_len, width]."""
        return self._rows[(layer, name)]

    def part(self, first: int, last: int) -> KVCache:
        """A view of sequences ``first`` to ``last`` - 1; writing to it writes here."""
        return _Part(self, first, last)

    def keep(self, batch: ForwardBatch, name: str, make: Callable[[], K]) -> K:
        """The result of ``make`` for the current batch, computed once.

        A second forward of a batch then copies nothing from host to GPU; a CUDA graph needs that.
        """
        if self._kept is None or self._kept[0] is not batch:
            self._kept = (batch, {})
        kept = self._kept[1]
        if name not in kept:
            kept[name] = make()
        return cast(K, kept[name])

    def places(self, batch: ForwardBatch) -> Places:
        """Places of all the batch's new tokens."""
        return self.keep(batch, "places", lambda: self._compute_places(batch))

    def _compute_places(self, batch: ForwardBatch) -> Places:
        new = torch.tensor(batch.extend_seq_lens)
        ends = torch.tensor(batch.seq_lens)
        sequence = torch.repeat_interleave(torch.arange(len(new)), new)
        offset = torch.arange(batch.num_tokens) - (new.cumsum(0) - new)[sequence]
        position = (ends - new)[sequence] + offset
        return Places(sequence.to(self._device), position.to(self._device))


class _Part(KVCache):
    """Sequences ``first`` to ``last`` - 1 of another cache."""

    def __init__(self, whole: KVCache, first: int, last: int) -> None:
        super().__init__(last - first, whole.max_len, whole._device)
        self._whole, self._first = whole, first

    def write(self, layer: int, name: str, rows: Tensor, at: Places) -> None:
        self._whole.write(layer, name, rows, Places(at.sequence + self._first, at.position))

    def read(self, layer: int, name: str) -> Tensor:
        return self._whole.read(layer, name)[self._first : self._first + self.sequences]


def cache_of(batch: ForwardBatch) -> KVCache:
    """The batch's cache; a real forward always has one."""
    assert isinstance(batch.cache, KVCache)
    return batch.cache


def places_of(tokens: Tokens) -> Places:
    """Places of this rank's tokens."""
    every = cache_of(tokens.batch).places(tokens.batch)
    part = slice(tokens.start, tokens.stop)
    return Places(every.sequence[part], every.position[part])


def ids_of(tokens: Tokens, device: torch.device) -> Tensor:
    """Token ids of this rank's tokens, int64 [T]."""
    batch, ids = tokens.batch, tokens.batch.input_ids
    assert ids is not None
    every = cache_of(batch).keep(batch, "ids", lambda: torch.tensor(ids, device=device))
    own = every[tokens.start : tokens.stop]
    # The block may end in padding rows, which have no token.
    short = tokens.count - len(own)
    return torch.nn.functional.pad(own, (0, short)) if short else own


def last_places(batch: ForwardBatch, device: torch.device) -> Tensor:
    """Index of each sequence's last new token, int64 [sequences]."""

    def make() -> Tensor:
        return (torch.tensor(batch.extend_seq_lens).cumsum(0) - 1).to(device)

    return cache_of(batch).keep(batch, "last", make)
