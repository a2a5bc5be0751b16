"""``runner record`` around a server: what is recorded, printed and passed on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runner.recording.recording import Recording, read_recording
from tests.unit.build_machine import REPOSITORY, error_line
from tests.unit.recording.fake_server import TITLE, FakeServer

pytestmark = pytest.mark.timeout(120)


def start(fake: FakeServer, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runner", "record", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def run(fake: FakeServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = start(fake, *arguments)
    out, err = job.communicate(timeout=60)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def recorded(fake: FakeServer, *command: str) -> tuple[subprocess.CompletedProcess[str], Recording]:
    path = fake.root / "out.json"
    done = run(fake, "--json", str(path), "--", *command)
    return done, read_recording(path)


def end(fake: FakeServer, code: int) -> None:
    data = json.dumps({"code": code}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{fake.port}/end", data) as answer:
        assert answer.status == 200


def serve(fake: FakeServer, job: subprocess.Popen[str], tokens: list[int], code: int) -> list[str]:
    """Wait until the server is known to be ready, ask it, and end it; its lines until then."""
    assert job.stdout is not None
    lines = [job.stdout.readline(), job.stdout.readline()]
    for number, count in enumerate(tokens):
        assert fake.endpoint().ask(count, number, 30.0) == ""
    end(fake, code)
    return lines


def test_server_is_recorded_from_its_start_to_its_end(fake: FakeServer) -> None:
    path = fake.root / "out.json"
    job = start(fake, "--json", str(path), "--", *fake.command())
    lines = serve(fake, job, [70, 2, 70], code=3)
    out, err = job.communicate(timeout=60)
    assert "".join(lines) + out == "loading\nnoticed\nbye\n"
    assert job.returncode == 3, err
    report = err.splitlines()
    assert report[0] == "a warning"
    assert report[2].startswith("ready after ") and report[2].endswith(" s on the GPU here")
    assert "Compiled after it was ready" in err and "bf16_gemm_nt(" in err
    assert report[-1] == "error: the command ended with 3"
    recording = read_recording(path)
    assert recording.command == fake.command()
    assert (recording.gpu, recording.library) == ("", str(fake.library))
    assert recording.ready is not None and recording.ready > 0
    assert (recording.requests, recording.problems, recording.counts) == ([], [], {})
    (group,) = recording.groups
    assert group.title == TITLE
    assert {phase: seen.counts for phase, seen in group.phases.items()} == {
        "load": {1: 2},
        "warm-up": {2: 2},
        "ready": {2: 1, 70: 2},
    }
    assert recording.entries(["load", "warm-up"]) == ["kernel.0"]
    assert recording.entries(["ready"]) == ["kernel.1"]
    assert len(recording.peak_bytes) == 1


def test_server_that_ends_well_has_exit_code_0_and_no_stall(fake: FakeServer) -> None:
    job = start(fake, "--", *fake.command())
    serve(fake, job, [2], code=0)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert "error:" not in err and "Compiled after" not in err


def test_server_that_dies_is_recorded_until_then(fake: FakeServer) -> None:
    done, recording = recorded(fake, *fake.command("--die", "7"))
    assert done.stdout == "loading\n"
    assert error_line(done, 7) == "the command ended with 7"
    assert "the server never became ready (on the GPU here)\n" in done.stderr
    assert recording.ready is None
    (group,) = recording.groups
    assert {phase: seen.counts for phase, seen in group.phases.items()} == {"load": {1: 1}}


def test_signal_goes_to_the_server_and_the_report_is_printed(fake: FakeServer) -> None:
    path = fake.root / "out.json"
    job = start(fake, "--json", str(path), "--", *fake.command("--silent"))
    assert job.stdout is not None and job.stdout.readline() == "loading\n"
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "error: the command ended with 143"
    assert read_recording(path).ready is None


LIBRARY_CALL = "import sys; sys.path.insert(0, {!r}); from deep_gemm import *; {}"
CALL = "bf16_gemm_nt(Tensor(9, 64), Tensor(256, 64), Tensor(9, 256))"


def script(fake: FakeServer, code: str) -> list[str]:
    return [sys.executable, "-c", LIBRARY_CALL.format(str(fake.library.parent), code)]


def test_command_that_is_no_server_is_recorded(fake: FakeServer) -> None:
    done, recording = recorded(fake, *script(fake, f"{CALL}; print('done')"))
    assert (done.returncode, done.stdout) == (0, "done\n")
    (group,) = recording.groups
    assert {phase: seen.counts for phase, seen in group.phases.items()} == {"start": {9: 1}}
    assert recording.ready is None


def test_command_that_is_killed_is_recorded(fake: FakeServer) -> None:
    done, recording = recorded(fake, *script(fake, f"{CALL}; import os; os.kill(os.getpid(), 9)"))
    assert error_line(done, 137) == "the command ended with 137"
    (group,) = recording.groups
    assert group.ms == [9]


def test_number_that_json_does_not_have_does_not_cost_the_recording(fake: FakeServer) -> None:
    call = "bf16_gemm_nt(Tensor(9, 64), float('inf'), [Tensor(9, 256)])"
    done, recording = recorded(fake, *script(fake, call))
    assert done.returncode == 0, done.stderr
    assert recording.groups[0].call.args[1] == {"object": "inf"}


def test_command_without_the_library_has_an_empty_recording(fake: FakeServer) -> None:
    done, recording = recorded(fake, sys.executable, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert (recording.groups, recording.library, recording.peak_bytes) == ([], "", {})


def test_command_that_cannot_be_run_is_refused_in_one_line(fake: FakeServer) -> None:
    missing = str(fake.root / "vllm")
    assert error_line(run(fake, "--", missing, "serve"), 2) == (
        f"cannot run {missing}: no such program"
    )


def test_output_that_cannot_be_written_is_refused_before_the_run(fake: FakeServer) -> None:
    path = Path("/nowhere/out.json")
    done = run(fake, "--json", str(path), "--", *fake.command())
    assert str(path) in error_line(done, 2)
    assert done.stdout == ""
