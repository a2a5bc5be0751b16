"""How a rank that failed says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from launch.failure import lost_a_peer, rank_failure
from launch.watchdog import CommunicationTimeoutError
from runner.errors import UserError

HELD_UP = (
    "import threading\n"
    "from functools import partial\n"
    "from launch.failure import end_process\n"
    "from launch.wait_limit import NcclLimit\n"
    "from launch.watchdog import CommunicationTimeoutError\n"
    "from runner.schedule import Recv\n"
    "limit = NcclLimit(\n"
    "    0.2, lambda op: CommunicationTimeoutError(op.name), partial(end_process, 3)\n"
    ")\n"
    "with limit.over(Recv('hidden_states', 0, 64)):\n"
    "    threading.Event().wait()\n"
)
"""A process whose host does not come back from a call."""


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (UserError("no nvcc"), "rank 2: no nvcc", 2),
        (CommunicationTimeoutError("waited 3 s"), "rank 2: waited 3 s", 1),
        (
            ConnectionError("Connection closed by peer"),
            "rank 2: ConnectionError: Connection closed by peer",
            1,
        ),
        (ValueError(), "rank 2: ValueError: ValueError", 1),
    ],
)
def test_a_failure_is_one_line(
    error: Exception, words: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    failure = rank_failure(2, error)
    assert (str(failure), failure.exit_code) == (words, code)
    assert str(error) in json.loads(record.read_text())["message"]["message"]


def test_only_the_lack_of_a_peer_is_one() -> None:
    assert lost_a_peer(RuntimeError("[..] Connection reset by peer"))
    assert not lost_a_peer(RuntimeError("CUDA out of memory"))


@pytest.mark.parametrize("record", ["error.json", "gone/error.json"])
def test_a_process_ends_from_a_thread_while_its_host_is_held_up(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the launcher's file for the error cannot be written."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / record))
    done = subprocess.run(
        [sys.executable, "-c", HELD_UP], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "error: rank 3: hidden_states\n")


def test_it_ends_though_nobody_listens() -> None:
    with subprocess.Popen([sys.executable, "-c", HELD_UP], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(120) == 1
