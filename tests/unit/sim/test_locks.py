"""Locks of a node."""

from __future__ import annotations

from collections.abc import Callable

from sim.engine.locks import Locks


class Clock:
    """Keeps what is scheduled, and does it when told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._scheduled: list[tuple[float, Callable[[float], None]]] = []
        self.locks = Locks(lambda time, action: self._scheduled.append((time, action)))

    def acquire(self, key: str | None, time: float, name: str) -> None:
        self.locks.acquire(
            key,
            time,
            lambda when: self.told.append(f"{name} has it at {when:g}"),
            lambda since, when: self.told.append(f"{name} waited from {since:g} to {when:g}"),
        )

    def run(self) -> None:
        for time, action in self._scheduled:
            action(time)
        self._scheduled.clear()


def test_no_lock_is_had_at_once() -> None:
    clock = Clock()
    for name in ("a", "b"):
        clock.acquire(None, 1, name)
    clock.locks.release(None, 2)
    assert clock.told == ["a has it at 1", "b has it at 1"]


def test_the_first_has_it_and_the_others_get_it_in_order() -> None:
    clock = Clock()
    for time, name in ((1, "a"), (2, "b"), (3, "c")):
        clock.acquire("k", time, name)
    assert clock.told == ["a has it at 1"]
    clock.locks.release("k", 7)
    assert clock.told[1:] == ["b waited from 2 to 7"]
    clock.run()
    assert clock.told[2:] == ["b has it at 7"]
    clock.acquire("k", 8, "d")
    clock.locks.release("k", 9)
    clock.run()
    clock.locks.release("k", 10)
    clock.run()
    assert clock.told[3:] == [
        "c waited from 3 to 9",
        "c has it at 9",
        "d waited from 8 to 10",
        "d has it at 10",
    ]


def test_a_lock_that_nobody_wants_any_more_is_free() -> None:
    clock = Clock()
    clock.acquire("k", 1, "a")
    clock.locks.release("k", 2)
    clock.acquire("k", 5, "b")
    assert clock.told == ["a has it at 1", "b has it at 5"]


def test_keys_are_locks_of_their_own() -> None:
    clock = Clock()
    clock.acquire("k", 1, "a")
    clock.acquire("l", 1, "b")
    assert clock.told == ["a has it at 1", "b has it at 1"]
