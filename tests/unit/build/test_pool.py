"""The pool: its order, its workers, errors and steps."""

from collections.abc import Callable, Sequence
from threading import Barrier, Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.pool import Pool


def nothing() -> None:
    pass


def run_order(priorities: Sequence[float]) -> list[int]:
    pool, order = Pool(1), []
    for number, to_end in enumerate(priorities):
        pool.add(to_end, lambda number=number: order.append(number), own=1)
    pool.drain()
    return order


@given(st.lists(st.integers(0, 5), max_size=20))
def test_the_longest_way_to_the_end_goes_first(priorities: list[int]) -> None:
    expected = sorted(range(len(priorities)), key=lambda number: -priorities[number])
    assert run_order(priorities) == expected


def test_tasks_add_tasks() -> None:
    pool, order = Pool(1), []

    def task(name: str, *more: tuple[float, str]) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            for to_end, child in more:
                pool.add(to_end, task(child), own=1)

        return run

    pool.add(9, task("first", (1, "late"), (5, "soon")), own=1)
    pool.add(3, task("second"), own=1)
    pool.drain()
    assert order == ["first", "soon", "second", "late"]


def test_a_waiting_thread_takes_what_another_adds() -> None:
    pool, both = Pool(2), Barrier(2, timeout=30)
    pool.add(1, lambda: [pool.add(1, lambda: both.wait() and None, own=1) for _ in "12"], own=1)
    pool.drain()
    assert not both.broken and both.n_waiting == 0


def test_as_many_tasks_at_once_as_workers() -> None:
    pool, all_three = Pool(3), Barrier(3, timeout=30)
    for _ in range(3):
        pool.add(1, lambda: all_three.wait() and None, own=1)
    pool.drain()
    assert not all_three.broken


def test_an_error_stops_the_pool_and_is_raised() -> None:
    pool, order = Pool(1), []

    def fail() -> None:
        order.append("fails")
        raise OSError("disk full")

    pool.add(3, lambda: order.append("before"), own=1)
    pool.add(2, fail, own=1)
    pool.add(1, lambda: order.append("after"), own=1)
    with pytest.raises(OSError, match=r"^disk full$"):
        pool.drain()
    assert order == ["before", "fails"]


def test_what_runs_beside_an_error_ends_before_it_is_raised() -> None:
    pool, failing, order = Pool(2), Event(), []

    def slow() -> None:
        assert failing.wait(30)
        order.append("slow")

    def fail() -> None:
        failing.set()
        raise OSError("first")

    pool.add(2, slow, own=1)
    pool.add(1, fail, own=1)
    with pytest.raises(OSError, match=r"^first$"):
        pool.drain()
    assert order == ["slow"]


def test_steps_are_counted() -> None:
    steps: list[tuple[float, float]] = []
    pool = Pool(1, lambda done, expected: steps.append((done, expected)))
    pool.expect(2)
    pool.expect(5)

    def more() -> None:
        pool.expect(1)
        pool.add(1, nothing, own=1)

    pool.add(9, more, own=2)
    pool.add(5, nothing, own=5)
    pool.drain()
    assert steps == [(2, 8), (7, 8), (8, 8)]


def test_no_tasks() -> None:
    Pool(2).drain()


def test_an_error_of_on_step_is_raised() -> None:
    ran: list[int] = []

    def complain(done: float, expected: float) -> None:
        raise BrokenPipeError

    pool = Pool(1, complain)
    for number in range(3):
        pool.add(1, lambda number=number: ran.append(number), own=1)
    with pytest.raises(BrokenPipeError):
        pool.drain()
