"""Time limits and failures of ranks: when the process ends, and its error message."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist

from launch import limits
from launch.comm import make_groups
from launch.limits import (
    CommunicationTimeoutError,
    Deadline,
    Message,
    OutOfTimeError,
    WaitLimit,
    lost_a_peer,
    rank_failure,
)
from launch.rank import Rank
from runner.config.environ import Environ
from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.kernels.rules import transpose_fp32
from runner.schedule import Begin, Collective, Recv, Send
from tests.unit.test_launch_options import parsed

RECV = Recv("hidden_states", 0, 64)
SUM = Collective("all_reduce attention", (0, 1, 2), 64)
BEGUN = Begin("all_to_all tokens of 1", (0, 1, 2), 64)
IDLE = "none of them is compiling"
ENOUGH = 30.0


class Ended:
    """Records the errors that would have ended the process."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.event = threading.Event()

    def __call__(self, rank: int, error: Exception) -> None:
        assert rank == 1
        self.errors.append(error)
        self.event.set()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    made = Ended()
    monkeypatch.setattr(limits, "end_process", made)
    return made


# -- message of a rank that waited too long -------------------------------------------------------


def compile_on(log_dir: Path, rank: int, start: float, ending: str = "running") -> None:
    """Write a compile record like the shim's."""
    source = "// Includes' hash value: 0\n" + transpose_fp32(512).body
    (log_dir / f"{start}-{rank}.{ending}").write_text(
        f"start {start}\nend 0\nrank {rank}\npid 7\nexit -1\ncommand x\noutput y\n\n{source}"
    )


def reason(op: Message, log_dir: Path) -> str:
    """The reason in the time-out message of rank 1, with ranks 0 to 3 on this host."""
    error = WaitLimit(1, 30.0, log_dir, range(4)).timeout_error(op)
    assert isinstance(error, CommunicationTimeoutError)
    return str(error).partition(": ")[2]


def test_timeout_message_names_operation_ranks_and_limit(tmp_path: Path) -> None:
    waiting = WaitLimit(1, 0.5, tmp_path / "none", range(4))
    assert str(waiting.timeout_error(RECV)) == (
        "hidden_states waited 0.5 s for rank 0, the limit of --nccl-timeout: " + IDLE
    )
    assert str(waiting.timeout_error(SUM)).startswith(
        "all_reduce attention waited 0.5 s for ranks 0, 2, the limit of --nccl-timeout: "
    )


def test_timeout_message_names_kernels_that_awaited_ranks_compile(tmp_path: Path) -> None:
    compile_on(tmp_path, 2, 10.5)
    compile_on(tmp_path, 0, 11.5)
    both = "rank 2 compiles transpose_fp32; rank 0 compiles transpose_fp32"
    assert reason(SUM, tmp_path) == reason(BEGUN, tmp_path) == both
    assert reason(Send("hidden_states", 2, 64), tmp_path) == "rank 2 compiles transpose_fp32"


def test_timeout_message_names_other_compiling_ranks_if_awaited_ones_do_not(tmp_path: Path) -> None:
    compile_on(tmp_path, 5, 12.5)
    compile_on(tmp_path, 4, 13.5)
    for op in (RECV, SUM):
        assert reason(op, tmp_path) == (
            f"{IDLE}, but rank 5 compiles transpose_fp32; rank 4 compiles transpose_fp32"
        )
    compile_on(tmp_path, 0, 14.5)
    assert reason(RECV, tmp_path) == "rank 0 compiles transpose_fp32"


def test_timeout_message_says_if_ranks_are_on_other_hosts(tmp_path: Path) -> None:
    far = Recv("hidden_states", 6, 64)
    both = Collective("all_reduce attention", (1, 2, 6, 7), 64)
    assert reason(far, tmp_path) == "rank 6 cannot be seen from this host"
    compile_on(tmp_path, 3, 12.5)
    but = "cannot be seen from this host, but rank 3 compiles transpose_fp32"
    assert reason(far, tmp_path) == f"rank 6 {but}"
    assert reason(both, tmp_path) == f"ranks 6, 7 {but}"
    compile_on(tmp_path, 2, 12.5)
    assert reason(both, tmp_path) == "rank 2 compiles transpose_fp32"


def test_timeout_message_ignores_finished_compiles(tmp_path: Path) -> None:
    compile_on(tmp_path, 0, 10.5, "compile")
    assert reason(RECV, tmp_path) == reason(SUM, tmp_path) == IDLE


# -- limits of waits ------------------------------------------------------------------------------


def short_limit(log_dir: Path) -> WaitLimit:
    options = parsed("--model", "dsv4-tiny", "--nccl-timeout", "0.3", "--no-jit")
    scenario = options.scenario(Environ(), policy=WarmupPolicy.NONE)
    environ = Environ(rank=1, world_size=16, local_rank=1, local_world_size=8)
    cpu = torch.device("cpu")
    rank = Rank(options, environ, scenario, cpu, "gloo", "real", "as given", [])
    return rank.wait_limit(log_dir)


def test_blocking_call_above_the_limit_ends_the_process(ended: Ended, tmp_path: Path) -> None:
    limit = short_limit(tmp_path)
    with limit.over(SUM):
        pass
    with limit.over(Recv("hidden_states", 8, 64)):
        assert ended.event.wait(ENOUGH)
    assert [str(error) for error in ended.errors] == [
        "hidden_states waited 0.3 s for rank 8, the limit of --nccl-timeout: "
        "rank 8 cannot be seen from this host"
    ]


def test_asynchronous_collective_above_the_limit_ends_the_process(
    ended: Ended, tmp_path: Path
) -> None:
    limit = short_limit(tmp_path)
    limit.started(SUM, lambda: True)
    limit.started(BEGUN, lambda: False)
    assert ended.event.wait(ENOUGH)
    assert [str(error).partition(" waited")[0] for error in ended.errors] == [BEGUN.name]


def test_gpu_error_during_query_does_not_stop_the_watcher(ended: Ended, tmp_path: Path) -> None:
    def query() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    limit = short_limit(tmp_path)
    limit.started(BEGUN, query)
    with limit.over(RECV):
        assert ended.event.wait(ENOUGH)
    assert str(ended.errors[0]).startswith("hidden_states waited")


def test_process_ends_even_if_compile_records_cannot_be_read(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(log_dir: Path) -> None:
        raise PermissionError("no records")

    monkeypatch.setattr(limits, "read_unfinished", fail)
    with short_limit(tmp_path).over(RECV):
        assert ended.event.wait(ENOUGH)
    assert str(ended.errors[0]).endswith("the limit of --nccl-timeout: no records")


def test_gpu_is_not_queried_during_graph_capture(ended: Ended, tmp_path: Path) -> None:
    asked = threading.Event()

    def query() -> bool:
        asked.set()
        return True

    limit = WaitLimit(1, 10 * ENOUGH, tmp_path, range(4))
    with limit.quiet:
        threading.Thread(target=limit.started, args=(BEGUN, query), daemon=True).start()
        assert not asked.wait(0.5)
    assert asked.wait(ENOUGH)
    assert not ended.errors


def test_failed_rendezvous_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise dist.DistStoreError("wait timeout after 1000ms, keys: /x\nframe #0")

    monkeypatch.setattr(dist, "new_group", too_late)
    with pytest.raises(CommunicationTimeoutError) as caught:
        make_groups(ParallelConfig(pp=2), 1.5)
    assert str(caught.value) == (
        "the ranks did not connect within 31.5 s (--nccl-timeout 1.5 and 30 s more)"
    )


# -- the limit of a run ---------------------------------------------------------------------------


def test_run_above_its_timeout_names_the_current_operation(ended: Ended) -> None:
    with Deadline(0.5, 1) as deadline:
        deadline.where = lambda: "all_reduce attention"
        assert ended.event.wait(ENOUGH)
    (error,) = ended.errors
    assert isinstance(error, OutOfTimeError)
    assert str(error) == "not finished after --timeout 0.5 s, in: all_reduce attention"


def test_run_that_times_out_before_its_first_operation_was_setting_up(ended: Ended) -> None:
    Deadline(0.01, 1)
    assert ended.event.wait(ENOUGH)
    assert str(ended.errors[0]) == "not finished after --timeout 0.01 s, in: setting up"


def test_deadline_is_cancelled_when_the_run_ends_in_time(ended: Ended) -> None:
    before = threading.enumerate()
    with Deadline(4 * ENOUGH, 1):
        (timer,) = set(threading.enumerate()) - set(before)
    timer.join(ENOUGH)
    assert not timer.is_alive()
    assert not ended.errors


# -- failure of a rank ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line", "code"),
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
def test_rank_failure_is_one_line_and_is_recorded_for_the_launcher(
    error: Exception, line: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    failure = rank_failure(2, error)
    assert (str(failure), failure.exit_code) == (line, code)
    assert str(error) in json.loads(record.read_text())["message"]["message"]


def test_lost_connection_is_recognised() -> None:
    assert lost_a_peer(RuntimeError("[..] Connection reset by peer"))
    assert not lost_a_peer(RuntimeError("CUDA out of memory"))


STUCK = """
import threading
from pathlib import Path
from launch.limits import WaitLimit
from runner.schedule import Recv
limit = WaitLimit(3, 0.2, Path("none"), range(4))
with limit.over(Recv("hidden_states", 0, 64)):
    threading.Event().wait()
"""
"""A process whose main thread does not return from a call."""


@pytest.mark.parametrize("record", ["error.json", "gone/error.json"])
def test_process_ends_although_its_main_thread_is_blocked(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the launcher's error file cannot be written."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / record))
    done = subprocess.run(
        [sys.executable, "-c", STUCK], check=False, capture_output=True, text=True, timeout=120
    )
    line = (
        f"error: rank 3: hidden_states waited 0.2 s for rank 0, the limit of --nccl-timeout: {IDLE}"
    )
    assert (done.returncode, done.stderr) == (1, f"{line}\n")


def test_process_ends_although_its_stderr_is_closed() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(120) == 1
