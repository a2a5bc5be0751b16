"""What a rank says that waited too long for others."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from launch.watchdog import (
    Communication,
    CommunicationTimeoutError,
    describe_timeout,
    is_timeout,
)
from runner.kernels.rules_sm90 import transpose_fp32
from runner.schedule import Begin, Collective, Recv, Send

RECV = Recv("hidden_states", 0, 64)
SUM = Collective("all_reduce attention", (0, 1, 2), 64)


def running(log_dir: Path, rank: int, start: float, ending: str = "running") -> None:
    """A record as the shim leaves it."""
    source = "// Includes' hash value: 0\n" + transpose_fp32(512).body
    log_dir.mkdir(exist_ok=True)
    (log_dir / f"{start}-{rank}.{ending}").write_text(
        f"start {start}\nend 0\nrank {rank}\npid 7\nexit -1\ncommand x\noutput y\n\n{source}"
    )


def words(op: Communication, rank: int, log_dir: Path, limit: float = 30.0) -> str:
    return str(describe_timeout(op, rank, limit, log_dir, here=range(4)))


def test_nobody_compiles(tmp_path: Path) -> None:
    assert words(RECV, 1, tmp_path) == (
        "hidden_states waited 30 s for rank 0, the limit of --nccl-timeout: "
        "none of them is compiling"
    )
    assert words(RECV, 1, tmp_path / "none", 0.5).startswith(
        "hidden_states waited 0.5 s for rank 0,"
    )


def test_those_it_waits_for_compile(tmp_path: Path) -> None:
    running(tmp_path, 2, 10.5)
    running(tmp_path, 0, 11.5)
    assert words(SUM, 1, tmp_path) == (
        "all_reduce attention waited 30 s for ranks 0, 2, the limit of --nccl-timeout: "
        "rank 2 compiles transpose_fp32; rank 0 compiles transpose_fp32"
    )
    assert words(Send("hidden_states", 2, 64), 1, tmp_path) == (
        "hidden_states waited 30 s for rank 2, the limit of --nccl-timeout: "
        "rank 2 compiles transpose_fp32"
    )


def test_what_was_begun_waits_for_its_group(tmp_path: Path) -> None:
    running(tmp_path, 2, 10.5)
    assert words(Begin("all_to_all tokens of 1", (0, 1, 2), 64), 1, tmp_path) == (
        "all_to_all tokens of 1 waited 30 s for ranks 0, 2, the limit of --nccl-timeout: "
        "rank 2 compiles transpose_fp32"
    )


def test_those_that_it_waits_for_may_wait_themselves(tmp_path: Path) -> None:
    running(tmp_path, 5, 12.5)
    running(tmp_path, 4, 13.5)
    for op in (RECV, SUM):
        assert words(op, 1, tmp_path).endswith(
            ": none of them is compiling, but rank 5 compiles transpose_fp32; "
            "rank 4 compiles transpose_fp32"
        )
    running(tmp_path, 0, 14.5)
    assert words(RECV, 1, tmp_path).endswith(": rank 0 compiles transpose_fp32")


def test_what_other_hosts_do_is_not_seen(tmp_path: Path) -> None:
    far = Recv("hidden_states", 6, 64)
    assert words(far, 1, tmp_path).endswith(": rank 6 cannot be seen from this host")
    running(tmp_path, 3, 12.5)
    assert words(far, 1, tmp_path).endswith(
        ": rank 6 cannot be seen from this host, but rank 3 compiles transpose_fp32"
    )
    both = Collective("all_reduce attention", (1, 2, 6, 7), 64)
    assert words(both, 1, tmp_path).endswith(
        ": ranks 6, 7 cannot be seen from this host, but rank 3 compiles transpose_fp32"
    )
    running(tmp_path, 2, 12.5)
    assert words(both, 1, tmp_path).endswith(": rank 2 compiles transpose_fp32")


def test_what_is_finished_does_not_count(tmp_path: Path) -> None:
    running(tmp_path, 0, 10.5, "compile")
    for op in (RECV, SUM):
        assert words(op, 1, tmp_path).endswith(": none of them is compiling")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting 3000ms for recv"),
        RuntimeError("wait timeout after 3000ms"),
        RuntimeError("Operation timed out!"),
        RuntimeError("Timeout waiting for key"),
        RuntimeError("[..] Timed out waiting 3000ms for send operation to complete"),
        RuntimeError("[..] Application timeout caused pair closure"),
        RuntimeError("Wait timeout"),
        RuntimeError("waitForInput: socket 7 timed out after 3000ms"),
    ],
)
def test_timeouts(error: Exception) -> None:
    assert is_timeout(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer [127.0.0.1]:4"),
        ValueError("Timed out waiting 3000ms for recv"),
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        RuntimeError("Invalid timeout"),
        RuntimeError("ProcessGroupGloo does not support setting timeout"),
        TimeoutError("timed out"),
    ],
)
def test_other_errors(error: Exception) -> None:
    assert not is_timeout(error)


def test_a_timeout_is_an_error_of_its_own(tmp_path: Path) -> None:
    assert isinstance(
        describe_timeout(RECV, 1, 3.0, tmp_path, here=range(4)), CommunicationTimeoutError
    )
