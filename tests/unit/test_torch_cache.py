"""The key-value cache: places of tokens, and values kept between forwards of a batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from runner.backend.forward_batch import ForwardBatch, ForwardMode, Tokens  # noqa: E402
from runner.backend.torch_cache import (  # noqa: E402
    KVCache,
    ids_of,
    last_places,
    places_of,
)

CPU = torch.device("cpu")


def batch(lens: tuple[int, ...]) -> ForwardBatch:
    cache = KVCache(len(lens), max(lens), CPU)
    return ForwardBatch.extend(lens, input_ids=range(100, 100 + sum(lens)), cache=cache)


def test_kept_values_are_made_once_per_batch_and_name() -> None:
    cache = KVCache(2, 4, CPU)
    one, two = (ForwardBatch.extend((2, 1), cache=cache) for _ in range(2))
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    for _ in range(3):
        assert cache.keep(one, "a", lambda: make("one a")) == "one a"
        assert cache.keep(one, "b", lambda: make("one b")) == "one b"
    assert made == ["one a", "one b"]
    # Equal batches do not share values: their sequences may have grown differently.
    assert one == two
    assert cache.keep(two, "a", lambda: make("two a")) == "two a"
    assert cache.keep(one, "a", lambda: make("again")) == "again"
    assert made == ["one a", "one b", "two a", "again"]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_ids_and_last_places_of_any_batch(lens: list[int], data: st.DataObject) -> None:
    """Computed twice, because the second result comes from the kept values."""
    made = batch(tuple(lens))
    count = sum(lens)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    for _ in range(2):
        ids = ids_of(Tokens(made, start, stop), CPU)
        assert ids.dtype == torch.int64
        assert ids.tolist() == list(range(100 + start, 100 + stop))
        assert ids_of(Tokens(made, 0, count), CPU).tolist() == list(range(100, 100 + count))
        expected = [sum(lens[: i + 1]) - 1 for i in range(len(lens))]
        assert last_places(made, CPU).tolist() == expected


def test_second_forward_reuses_the_same_tensors() -> None:
    made = batch((2, 3))
    tokens = Tokens(made, 0, 5)
    first = ids_of(tokens, CPU), last_places(made, CPU), places_of(tokens)
    again = ids_of(tokens, CPU), last_places(made, CPU), places_of(tokens)
    assert first[0].data_ptr() == again[0].data_ptr()
    assert first[1] is again[1]
    assert first[2].position.data_ptr() == again[2].position.data_ptr()


def test_places_continue_where_a_sequence_ended() -> None:
    grown = ForwardBatch(ForwardMode.EXTEND, (5, 2), (2, 2), cache=KVCache(2, 5, CPU))
    at = places_of(Tokens(grown, 0, 4))
    assert at.sequence.tolist() == [0, 0, 1, 1]
    assert at.position.tolist() == [3, 4, 0, 1]
    part = places_of(Tokens(grown, 1, 3))
    assert (part.sequence.tolist(), part.position.tolist()) == ([0, 1], [4, 0])


def test_next_batch_has_its_own_places() -> None:
    cache = KVCache(2, 4, CPU)
    prompt = ForwardBatch.extend((3, 1), cache=cache)
    step = ForwardBatch.decode((4, 2), cache=cache)
    assert places_of(Tokens(prompt, 0, 4)).position.tolist() == [0, 1, 2, 0]
    assert places_of(Tokens(step, 0, 2)).position.tolist() == [3, 1]
    assert last_places(step, CPU).tolist() == [0, 1]


def test_written_rows_are_read_at_their_places() -> None:
    cache = KVCache(2, 3, CPU)
    prompt = ForwardBatch.extend((2, 1), cache=cache)
    rows = torch.arange(6.0).view(3, 2)
    cache.write(7, "kv", rows, places_of(Tokens(prompt, 0, 3)))
    assert cache.read(7, "kv").tolist() == [
        [[0, 1], [2, 3], [0, 0]],
        [[4, 5], [0, 0], [0, 0]],
    ]
