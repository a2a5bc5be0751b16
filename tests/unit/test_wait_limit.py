"""What ends waits that are too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from launch.comm import UnderWay
from launch.comm_stream import Ran
from launch.wait_limit import GlooLimit, NcclLimit, NoLimit
from launch.watchdog import Communication
from runner.schedule import BARRIER, Begin, Collective, Recv, Send

FIRST, SECOND = Send("hidden_states", 1, 64), Recv("hidden_states", 0, 64)
BEGUN = Begin("all_to_all tokens of 1", (0, 1), 64)
ENOUGH = 30.0


class Ended:
    """Keeps what the limit ended the process with, were it not for this."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.event = threading.Event()

    def __call__(self, error: Exception) -> None:
        self.words.append(str(error))
        self.event.set()


def describe(op: Communication) -> Exception:
    return ValueError(f"{type(op).__name__} {op.name}")


def handle(query: Callable[[], bool]) -> UnderWay:
    """Of a collective on a GPU that is, or is not, done whenever it is asked."""
    done: Any = SimpleNamespace(query=query)
    nothing = torch.zeros(0)
    return UnderWay(Ran(done, done, done), nothing, nothing, 1)


def test_gloos_time_outs_say_more() -> None:
    limit = GlooLimit(describe)
    late = RuntimeError("Timed out waiting 3000ms for recv")
    lost = RuntimeError("Connection closed by peer")
    with pytest.raises(ValueError, match="Send hidden_states") as caught, limit.over(FIRST):
        raise late
    assert caught.value.__cause__ is late
    with pytest.raises(RuntimeError, match="Connection closed"), limit.over(FIRST):
        raise lost
    with limit.over(FIRST), limit.quiet():
        limit.begun(BEGUN, None)


def test_a_call_that_does_not_come_back_ends_the_process() -> None:
    ended = Ended()
    limit = NcclLimit(0.3, describe, ended)
    with limit.over(FIRST):
        pass
    with limit.over(SECOND):
        assert ended.event.wait(ENOUGH)
    assert ended.words == ["Recv hidden_states"]


def test_what_goes_on_beside_may_not_take_longer_either() -> None:
    ended = Ended()
    limit = NcclLimit(0.3, describe, ended)
    limit.begun(Begin("done", (0, 1), 64), handle(lambda: True))
    limit.begun(BEGUN, handle(lambda: False))
    assert ended.event.wait(ENOUGH)
    assert ended.words == ["Begin all_to_all tokens of 1"]


def test_what_hosts_do_among_themselves_is_gloos_to_end() -> None:
    ended = Ended()
    limit = NcclLimit(0.1, describe, ended)
    barrier = Collective(BARRIER, (0, 1), 0)
    with limit.over(barrier):
        assert not ended.event.wait(0.5)
    with pytest.raises(ValueError, match=f"Collective {BARRIER}"), limit.over(barrier):
        raise RuntimeError("Timed out waiting 3000ms for recv")


def test_an_error_of_the_device_is_the_hosts_to_find() -> None:
    def query() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended = Ended()
    limit = NcclLimit(0.3, describe, ended)
    limit.begun(BEGUN, handle(query))
    with limit.over(SECOND):
        assert ended.event.wait(ENOUGH)
    assert ended.words == ["Recv hidden_states"]


def test_a_wait_ends_though_nothing_can_be_said_of_it() -> None:
    def fail(op: Communication) -> Exception:
        raise PermissionError("no records")

    ended = Ended()
    with NcclLimit(0.3, fail, ended).over(SECOND):
        assert ended.event.wait(ENOUGH)
    assert ended.words == ["hidden_states waited 0.3 s (no records)"]


def test_the_device_is_not_asked_while_it_is_to_be_quiet() -> None:
    asked = threading.Event()

    def query() -> bool:
        asked.set()
        return False

    ended = Ended()
    limit = NcclLimit(10 * ENOUGH, describe, ended)
    limit.begun(BEGUN, handle(query))
    with limit.quiet():
        asked.clear()
        assert not asked.wait(0.5)
    assert asked.wait(ENOUGH)
    assert not ended.words


def test_without_a_limit_nothing_ends() -> None:
    limit = NoLimit()
    with limit.over(FIRST), limit.quiet():
        limit.begun(BEGUN, None)
