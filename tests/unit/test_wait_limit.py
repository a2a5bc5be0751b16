"""What ends waits that are too long."""

from __future__ import annotations

import subprocess
import sys
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
from runner.schedule import Begin, Recv, Send

FIRST, SECOND = Send("hidden_states", 1, 64), Recv("hidden_states", 0, 64)
BEGUN = Begin("all_to_all tokens of 1", (0, 1), 64)
ENOUGH = 30.0


class Ended:
    """Keeps what the limit ended the process for, were it not for this."""

    def __init__(self) -> None:
        self.ops: list[Communication] = []
        self.event = threading.Event()

    def __call__(self, op: Communication) -> None:
        self.ops.append(op)
        self.event.set()


def handle(query: Callable[[], bool]) -> UnderWay:
    """Of a collective on a GPU that is, or is not, done whenever it is asked."""
    done: Any = SimpleNamespace(query=query)
    nothing = torch.zeros(0)
    return UnderWay(Ran(done, done, done), nothing, nothing, 1)


def test_gloos_time_outs_say_more() -> None:
    limit = GlooLimit(lambda op: ValueError(f"{op.name} was too long"))
    late = RuntimeError("Timed out waiting 3000ms for recv")
    lost = RuntimeError("Connection closed by peer")
    with pytest.raises(ValueError, match="hidden_states was too long") as caught, limit.over(FIRST):
        raise late
    assert caught.value.__cause__ is late
    with pytest.raises(RuntimeError, match="Connection closed"), limit.over(FIRST):
        raise lost
    with limit.over(FIRST), limit.quiet():
        limit.begun(BEGUN, None)


def test_a_call_that_does_not_come_back_ends_the_process() -> None:
    ended = Ended()
    limit = NcclLimit(0.3, ended)
    with limit.over(FIRST):
        pass
    with limit.over(SECOND):
        assert ended.event.wait(ENOUGH)
    assert ended.ops == [SECOND]


def test_what_goes_on_beside_may_not_take_longer_either() -> None:
    ended = Ended()
    limit = NcclLimit(0.3, ended)
    limit.begun(Begin("done", (0, 1), 64), handle(lambda: True))
    limit.begun(BEGUN, handle(lambda: False))
    assert ended.event.wait(ENOUGH)
    assert ended.ops == [BEGUN]


def test_the_device_is_not_asked_while_it_is_to_be_quiet() -> None:
    asked = threading.Event()

    def query() -> bool:
        asked.set()
        return False

    ended = Ended()
    limit = NcclLimit(10 * ENOUGH, ended)
    limit.begun(BEGUN, handle(query))
    with limit.quiet():
        asked.clear()
        assert not asked.wait(0.5)
    assert asked.wait(ENOUGH)
    assert not ended.ops


def test_without_a_limit_nothing_ends() -> None:
    limit = NoLimit()
    with limit.over(FIRST), limit.quiet():
        limit.begun(BEGUN, None)


def test_a_process_ends_from_a_thread_while_its_host_is_held_up() -> None:
    program = (
        "import threading\n"
        "from launch.failure import end_process\n"
        "from launch.wait_limit import NcclLimit\n"
        "from launch.watchdog import CommunicationTimeoutError\n"
        "from runner.schedule import Recv\n"
        "limit = NcclLimit(0.2, lambda op: end_process(3, CommunicationTimeoutError(op.name)))\n"
        "with limit.over(Recv('hidden_states', 0, 64)):\n"
        "    threading.Event().wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "error: rank 3: hidden_states\n")
