"""The input of a forward: its mode, batch and tokens, and the tensors between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

from runner.backend.tensor import Tensor
from runner.config.model import ModelConfig

Ids = Sequence[int] | None


class SequenceCache(Protocol):
    """A key-value cache of a batch's sequences."""

    def part(self, first: int, last: int) -> SequenceCache:
        """A view of sequences ``first`` to ``last`` - 1; writing to it writes here."""


class ForwardMode(Enum):
    """Kinds of forward, named as in SGLang."""

    EXTEND = "extend"
    DECODE = "decode"

    @property
    def is_extend(self) -> bool:
        return self is ForwardMode.EXTEND


@dataclass(frozen=True)
class ForwardBatch:
    """One batch of sequences.

    Attributes:
        mode: EXTEND processes ``extend_seq_lens[i]`` new tokens of each sequence, DECODE one.
        seq_lens: length of each sequence after this forward, in tokens.
        extend_seq_lens: new tokens of each sequence; all 1 in DECODE.
        input_ids: token ids, one per new token, sequence after sequence; a recording has none.
        cache: key-value cache of these sequences; a recording has none.
    """

    mode: ForwardMode
    seq_lens: tuple[int, ...]
    extend_seq_lens: tuple[int, ...]
    input_ids: Ids = None
    cache: SequenceCache | None = None

    @classmethod
    def extend(
        cls, lengths: Sequence[int], *, input_ids: Ids = None, cache: SequenceCache | None = None
    ) -> ForwardBatch:
        """A batch of new prompts of the given lengths, without a cached prefix."""
        return cls(ForwardMode.EXTEND, tuple(lengths), tuple(lengths), input_ids, cache)

    @classmethod
    def decode(
        cls, seq_lens: Sequence[int], *, input_ids: Ids = None, cache: SequenceCache | None = None
    ) -> ForwardBatch:
        """A batch of one more token per sequence; ``seq_lens`` include that token."""
        return cls(ForwardMode.DECODE, tuple(seq_lens), (1,) * len(seq_lens), input_ids, cache)

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    @cached_property
    def num_tokens(self) -> int:
        """Number of new tokens over all sequences."""
        return sum(self.extend_seq_lens)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self, 0, self.num_tokens)

    @cached_property
    def halves(self) -> tuple[ForwardBatch, ForwardBatch] | None:
        """Two batches with about the same number of tokens; None if there is only one sequence.

        The cut is between sequences; an odd DECODE's second half is the larger, as in SGLang. Every
        call returns the same objects, so that their cache can reuse what it made for them.
        """
        if self.batch_size < 2:
            return None
        sums = list(accumulate(self.extend_seq_lens))
        cut = min(range(1, self.batch_size), key=lambda cut: abs(sums[-1] - 2 * sums[cut - 1]))
        return self._part(0, cut), self._part(cut, self.batch_size)

    def _part(self, first: int, last: int) -> ForwardBatch:
        start, stop = sum(self.extend_seq_lens[:first]), sum(self.extend_seq_lens[:last])
        return ForwardBatch(
            self.mode,
            self.seq_lens[first:last],
            self.extend_seq_lens[first:last],
            None if self.input_ids is None else self.input_ids[start:stop],
            None if self.cache is None else self.cache.part(first, last),
        )

    def compressed_entries(self, ratio: int) -> int:
        """Compressed entries of the longest sequence; at least 1, because pages are never empty."""
        return max(1, max(self.seq_lens) // ratio)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The new tokens that a rank works on: ``start`` to ``stop`` - 1 in the batch's token list."""

    batch: ForwardBatch
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


PPProxyTensors = dict[str, Tensor]
"""Tensors that a pipeline stage sends to the next.

DSV4: ``hidden_states`` [tokens, hc_mult * hidden] bf16 only. DSV3: ``hidden_states`` and
``residual``, each [tokens, hidden] bf16.
"""


C = TypeVar("C", bound=ModelConfig)


class LayerTokens(NamedTuple, Generic[C]):
    """The tokens that an attention step works on, the layer whose cache it uses, and the model."""

    tokens: Tokens
    layer: int
    config: C
