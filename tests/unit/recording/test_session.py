"""A server that is recorded: readiness, requests with their errors, and its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.recording.session import Session, running_group
from tests.unit.recording.fake_server import TITLE, FakeServer

pytestmark = pytest.mark.timeout(120)


@contextmanager
def started(fake: FakeServer, *options: str) -> Iterator[tuple[Session, subprocess.Popen[bytes]]]:
    """The server and its session; what the session says is in ``fake.root / "said"``."""
    said = fake.root / "said"

    def say(line: str) -> None:
        with said.open("a") as file:
            file.write(f"{line}\n")

    session = Session(fake.command(*options), fake.records, say)
    with running_group(session.command, session.environment(os.environ)) as child:
        yield session, child


def ask(fake: FakeServer, tokens: Sequence[int], timeout: float = 30.0) -> Session:
    with started(fake) as (session, child):
        assert session.wait_until_ready(fake.endpoint(), child, 60.0)
        session.ask(fake.endpoint(), tokens, timeout)
    return session


def test_each_request_is_a_phase_of_its_own(fake: FakeServer) -> None:
    session = ask(fake, [5, 70])
    assert session.ready is not None
    assert [(each.tokens, each.error) for each in session.requests] == [(5, ""), (70, "")]
    first, second = session.requests
    assert session.ready <= first.start <= first.end <= second.start <= second.end
    recording = session.recording(gpu="h200")
    (group,) = recording.groups
    assert group.title == TITLE
    assert {phase: seen.counts for phase, seen in group.phases.items()} == {
        "load": {1: 2},  # An equal call before it is ready is counted where it was first made.
        "warm-up": {2: 2},
        "request of 5 tokens": {5: 1},
        "request of 70 tokens": {70: 1},
    }
    assert recording.entries(["request of 70 tokens"]) == ["kernel.1"]
    assert recording.entries() == ["kernel.0", "kernel.1"]
    assert (recording.command, recording.gpu) == (fake.command(), "h200")
    assert recording.library == str(fake.library)
    assert recording.problems == []
    ((pid, peak),) = recording.peak_bytes.items()
    assert pid > 1 and peak > 1 << 20


def test_request_that_the_server_refuses_does_not_end_the_others(fake: FakeServer) -> None:
    session = ask(fake, [404, 9])
    assert [(each.tokens, each.error) for each in session.requests] == [
        (404, 'HTTP 404: {"error": "too long"}'),
        (9, ""),
    ]
    said = (fake.root / "said").read_text().splitlines()
    assert said[0] == 'request of 404 tokens: HTTP 404: {"error": "too long"}'
    assert said[1].startswith("request of 9 tokens: ") and said[1].endswith(" s")


def test_request_that_takes_too_long_does_not_end_the_others(fake: FakeServer) -> None:
    session = ask(fake, [408, 9], timeout=2.0)
    late, done = session.requests
    assert "timed out" in late.error and done.error == ""


def test_server_that_dies_of_a_request_is_asked_no_more(fake: FakeServer) -> None:
    with started(fake) as (session, child):
        assert session.wait_until_ready(fake.endpoint(), child, 60.0)
        session.ask(fake.endpoint(), [3, 500, 9], 30.0)
        assert child.wait(30) == 5
    assert [each.tokens for each in session.requests] == [3, 500]
    assert session.requests[0].error == "" and session.requests[1].error != ""
    (group,) = session.recording().groups
    assert group.ms == [1, 2, 3]


def test_server_that_does_not_answer_in_time_is_not_ready(fake: FakeServer) -> None:
    with started(fake, "--silent") as (session, child):
        assert not session.wait_until_ready(fake.endpoint(), child, 0.5)
        assert child.poll() is None
    assert session.ready is None and session.recording().ready is None
    assert child.poll() is not None


def test_server_that_ends_early_is_not_ready(fake: FakeServer) -> None:
    with started(fake, "--die", "7") as (session, child):
        assert not session.wait_until_ready(fake.endpoint(), child)
        assert child.poll() == 7
    (group,) = session.recording().groups
    assert list(group.phases) == ["load"]


def test_processes_of_the_server_end_with_the_block(fake: FakeServer) -> None:
    code = (
        "import subprocess, sys, time\n"
        "wait = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', wait])\n"
        f"open({str(fake.root / 'pid')!r}, 'w').write(f'{{child.pid}}\\n')\n"
        f"open({str(fake.root / 'done')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    with running_group([sys.executable, "-c", code], os.environ) as child:
        while not (fake.root / "done").exists():
            assert child.poll() is None
            time.sleep(0.02)
    assert child.poll() is not None
    pid = int((fake.root / "pid").read_text())
    deadline = time.monotonic() + 30
    while state_of(pid) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.02)  # A killed process takes a moment to end.
    assert state_of(pid) in ("", "Z")


def state_of(pid: int) -> str:
    """One letter; nothing if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_command_that_cannot_be_run_is_refused(fake: FakeServer) -> None:
    missing = str(fake.root / "missing")
    with pytest.raises(UserError, match=r"^cannot run .*missing: No such file"):  # noqa: SIM117
        with running_group([missing], os.environ):
            raise AssertionError("it runs")


def test_environment_has_the_hook_before_the_servers_own_paths(tmp_path: Path) -> None:
    session = Session(["vllm"], tmp_path, print)
    alone = session.environment({"A": "b"})
    site = alone["PYTHONPATH"]
    assert alone == {"A": "b", "PYTHONPATH": site, "DEEPGEMM_RECORD": str(tmp_path)}
    assert (Path(site) / "sitecustomize.py").is_file()
    assert session.environment({"PYTHONPATH": "/x:/y"})["PYTHONPATH"] == f"{site}:/x:/y"
    assert session.environment({"PYTHONPATH": ""})["PYTHONPATH"] == site
    rehearsed = session.environment({}, rehearse=True)
    assert rehearsed == {**session.environment({}), "DEEPGEMM_REHEARSE": "1"}


def test_counts_and_problems_are_those_of_all_processes(tmp_path: Path) -> None:
    for pid, count in ((7, 2), (8, 3)):
        events = [
            {"event": "process", "pid": pid, "argv": []},
            {"event": "counts", "counts": {"bypass x": count, f"fallback {pid}": 1}},
            {"event": "stopped", "error": "OSError('full')"},
        ]
        lines = "".join(json.dumps(event) + "\n" for event in events[: 3 if pid == 8 else 2])
        (tmp_path / f"{pid}-{pid}.jsonl").write_text(lines)
    session = Session(["vllm"], tmp_path, print, problems=["one"])
    recording = session.recording()
    assert recording.counts == {"bypass x": 5, "fallback 7": 1, "fallback 8": 1}
    assert recording.problems == ["one", "recording stopped in 8: OSError('full')"]
    assert recording.library == ""
    assert session.problems == ["one"]
