"""The end of a run that takes too long."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from launch.deadline import Deadline, OutOfTimeError

ENOUGH = 30.0


class Ended:
    """Keeps what the deadline ended the process with, were it not for this."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.event = threading.Event()

    def __call__(self, error: Exception) -> None:
        self.errors.append(error)
        self.event.set()


def test_it_says_where_the_rank_stood() -> None:
    ended = Ended()
    with Deadline(0.5, ended) as deadline:
        deadline.sink = SimpleNamespace(last="all_reduce attention")
        assert ended.event.wait(ENOUGH)
    (error,) = ended.errors
    assert isinstance(error, OutOfTimeError)
    assert str(error) == "no end after --timeout 0.5 s, in: all_reduce attention"


def test_before_the_first_operation_it_is_setting_up() -> None:
    ended = Ended()
    Deadline(0.01, ended)
    assert ended.event.wait(ENOUGH)
    assert str(ended.errors[0]) == "no end after --timeout 0.01 s, in: setting up"


def test_a_run_that_ends_in_time_is_left_alone() -> None:
    ended, before = Ended(), threading.enumerate()
    with Deadline(4 * ENOUGH, ended):
        (timer,) = set(threading.enumerate()) - set(before)
    timer.join(ENOUGH)
    assert not timer.is_alive()
    assert not ended.errors
