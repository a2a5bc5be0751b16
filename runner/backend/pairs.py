"""How many (query, key) pairs attention works on: what its cost follows."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain, islice

from runner.backend.math import Tokens
from runner.config.model import Dsv4Config


def causal_pairs(tokens: Tokens) -> int:
    """(query, key) pairs under full causal attention."""
    return sum(count * (position + 1) for position, count in _positions(tokens))


def visible_entries(tokens: Tokens, config: Dsv4Config, layer: int) -> int:
    """(query, key) pairs of one DSV4 layer: window plus compressed entries."""
    return _count_visible(
        _positions(tokens), config.compress_ratio(layer), config.sliding_window, config.index_topk
    )


@lru_cache(maxsize=256)
def _count_visible(
    positions: tuple[tuple[int, int], ...], ratio: int, window: int, top_k: int
) -> int:
    total = 0
    for position, count in positions:
        visible = min(position + 1, window)
        if ratio:
            entries = (position + 1) // ratio
            visible += min(entries, top_k) if ratio == 4 else entries
        total += count * visible
    return total


def _positions(tokens: Tokens) -> tuple[tuple[int, int], ...]:
    """(position, number of tokens there) over the rank's tokens."""
    batch = tokens.batch
    return _count_positions(batch.seq_lens, batch.extend_seq_lens, tokens.start, tokens.stop)


@lru_cache(maxsize=64)
def _count_positions(
    seq_lens: tuple[int, ...], new_lens: tuple[int, ...], start: int, stop: int
) -> tuple[tuple[int, int], ...]:
    each = (range(length - new, length) for length, new in zip(seq_lens, new_lens, strict=True))
    return tuple(Counter(islice(chain.from_iterable(each), start, stop)).items())
