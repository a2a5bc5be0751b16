"""``runner watch``: exit codes, signals and invalid input."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.watch.command import watch
from runner.watch.shim import CompileRecord
from tests.unit.watched_server import (
    RUNNER,
    SMALL_WORDS,
    environment,
    reports,
    run,
    server,
    summary,
    watched,
)

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("step", "code"),
    [("exit=0", 0), ("exit=3", 3), ("exit=97", 97), ("kill=9", 137), ("kill=15", 143)],
)
def test_watch_exits_with_the_commands_exit_code(
    room: Path, fake_nvcc: Path, step: str, code: int
) -> None:
    ran = run(room, fake_nvcc, server(room, step), "--json", "out.json")
    assert ran.code == code
    assert summary(ran.err[0], 0, 0)
    assert ran.err[1:] == ([f"error: the command ended with {code}"] if code else [])
    assert json.loads((room / "out.json").read_text())["exit_code"] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_forwarded_to_the_command(room: Path, fake_nvcc: Path, number: int) -> None:
    command = [*RUNNER, "--", *server(room, "compile=../small.cu", "wait")]
    with subprocess.Popen(
        command,
        cwd=room,
        env=environment(fake_nvcc),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        before = [process.stdout.readline() for _ in range(3)]
        assert before[1:] == ["compile 0 \n", "waiting\n"]
        assert reports(process.stderr.readline().rstrip("\n"), SMALL_WORDS)
        process.send_signal(number)
        assert process.stdout.read() == f"stopped by {number}\n"
        last = process.stderr.read().splitlines()
    assert summary(last[0], 1, 1, ", pid .*: 1")
    assert last[1:] == ["error: the command ended with 5"]
    assert process.returncode == 5


def wait_for(path: Path, *numbers: int) -> None:
    """Wait until a server has counted all these signals, in any order."""
    while not (path.exists() and {*map(str, numbers)} <= {*path.read_text().split()}):
        time.sleep(0.01)


def test_interrupt_reaches_each_process_of_the_command_exactly_once(
    room: Path, fake_nvcc: Path
) -> None:
    """A terminal sends SIGINT to watch's whole process group.

    Watch is paused meanwhile: signals that reach the server before our SIGTERM came from the
    terminal, later ones from watch.
    """
    steps = ["child=count=child await=go", "await=child", "count=parent", "await=go"]
    with subprocess.Popen(
        [*RUNNER, "--", *server(room, *steps)],
        cwd=room,
        env=environment(fake_nvcc),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        try:
            pid = int(process.stdout.readline().removeprefix("pid "))
            wait_for(room / "parent")
            process.send_signal(signal.SIGSTOP)
            os.killpg(process.pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
            wait_for(room / "parent", signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
            wait_for(room / "parent", signal.SIGINT)
            wait_for(room / "child", signal.SIGINT)
            process.send_signal(signal.SIGHUP)
            wait_for(room / "parent", signal.SIGHUP)
        finally:
            process.send_signal(signal.SIGCONT)
            (room / "go").touch()
        assert process.stdout.read() == ""
        assert summary(process.stderr.read().rstrip("\n"), 0, 0)
    assert process.returncode == 0
    expected = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    assert [int(word) for word in (room / "parent").read_text().split()] == expected
    assert (room / "child").read_text().split() == ["2"]


def test_exception_in_watch_terminates_the_command(
    room: Path, fake_nvcc: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(record: CompileRecord, seconds: float) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        watched(room, fake_nvcc, "compile=../small.cu", "wait", on_compile=fail)
    assert capfd.readouterr().out.splitlines()[-1] == "stopped by 15"


# Bad input: one line, exit code 2, and the command does not run


def refused(
    room: Path, nvcc: Path, *options: str, line: str, program: str = "", **values: str
) -> None:
    command = [program] if program else server(room, "touch=ran")
    ran = run(room, nvcc, command, *options, **values)
    assert (ran.code, ran.out, ran.err) == (2, [], [f"error: {line}"])
    assert not (room / "ran").exists()


def test_command_that_cannot_be_run_is_refused(room: Path, fake_nvcc: Path) -> None:
    line = "cannot run no-such-server: No such file or directory"
    refused(room, fake_nvcc, line=line, program="no-such-server")
    (room / "text").write_text("")
    refused(room, fake_nvcc, line="cannot run ./text: Permission denied", program="./text")


@pytest.mark.parametrize("name", ["DG_JIT_USE_NVRTC", "SGLANG_DG_USE_NVRTC"])
def test_watch_refuses_nvrtc(room: Path, fake_nvcc: Path, name: str) -> None:
    line = f"{name} is set: compiles inside the process cannot be seen; unset it"
    refused(room, fake_nvcc, line=line, **{name: "1"})


def test_watch_accepts_nvrtc_variable_set_to_0(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), DG_JIT_USE_NVRTC="0")
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--forbid-after", "-1"], "--forbid-after -1 must be at least 0 seconds, or a file"),
        (["--forbid-after", "nan"], "--forbid-after nan must be at least 0 seconds, or a file"),
        (["--forbid-after", "inf"], "--forbid-after inf must be at least 0 seconds, or a file"),
        (["--forbid-after", ""], "--forbid-after '' must be at least 0 seconds, or a file"),
        (
            ["--forbid-after", "no/ready"],
            "--forbid-after no/ready: its folder does not exist; create it first",
        ),
        (
            ["--forbid-after", "../small.cu"],
            "--forbid-after ../small.cu exists already: remove it, or give 0 seconds",
        ),
        (["--json", "-"], "--json needs a file: standard output belongs to the command"),
        (["--json", "no/x.json"], "cannot write no/x.json: its folder does not exist"),
        (["--json", "."], "Invalid value for '--json': File '.' is a directory."),
        (["--plan", "gone"], "Invalid value for '--plan': File 'gone' does not exist."),
    ],
)
def test_invalid_options_are_refused(
    room: Path, fake_nvcc: Path, options: list[str], line: str
) -> None:
    refused(room, fake_nvcc, *options, line=line)


def test_invalid_plan_file_is_refused(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "touch=ran"), "--plan", "../small.cu")
    assert (ran.code, ran.out, len(ran.err)) == (2, [], 1)
    assert ran.err[0].startswith("error: ../small.cu is not a plan from runner plan --json: ")
    assert not (room / "ran").exists()


def test_missing_nvcc_is_refused(room: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "gone"
    refused(room, nvcc, line=f"DG_JIT_NVCC_COMPILER={nvcc} is not a file: it must be nvcc")


def test_watch_requires_a_command(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, [])
    assert (ran.code, ran.err) == (2, ["error: Missing argument 'COMMAND...'."])


def test_options_after_the_command_belong_to_the_command(room: Path, fake_nvcc: Path) -> None:
    command = [*RUNNER, "echo", "--json", "x.json", "--port", "80"]
    done = subprocess.run(
        command, cwd=room, env=environment(fake_nvcc), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "--json x.json --port 80\n")
    assert not (room / "x.json").exists()


def test_double_dash_after_the_command_is_passed_on(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, ["echo", "--plan", "--", "--help"])
    assert (ran.code, ran.out) == (0, ["--plan -- --help"])


def test_watch_itself_refuses_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        watch(["/no/server"], nvcc=Path("nvcc"), environment={}, work_dir=tmp_path)
    assert str(caught.value) == "cannot run /no/server: No such file or directory"
