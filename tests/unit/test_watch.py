"""``runner watch``: a server that compiles as DeepGEMM does, watched in real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from runner.jit.describe import config_of
from runner.jit.plan_json import plan_to_json
from runner.jit.shim import FORBIDDEN_EXIT, CompileRecord
from runner.watch import Forbid, Watched, _flag, _raise_flag, watch
from tests.unit.small_cache import keys_for, small_library, small_plan

pytestmark = pytest.mark.timeout(120)

SERVER = r"""
import os, signal, subprocess, sys, time
from pathlib import Path

def stopped(number, frame):
    print("stopped by", number, flush=True)
    sys.exit(5)

for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(each, stopped)

def compile_as_the_library_does(source):
    folder = Path.cwd() / "tmp" / str(len(list(Path("tmp").iterdir())))
    folder.mkdir()
    (folder / "kernel.cu").write_bytes(Path(source).read_bytes())
    nvcc = os.environ["DG_JIT_NVCC_COMPILER"]
    compile = f"{nvcc} {folder}/kernel.cu -cubin -o {folder}/kernel.cubin -O3"
    command = f"cd {Path.cwd()}/tmp && {compile} 2>&1"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=False)
    print("compile", done.returncode, done.stdout.strip().replace(str(folder), "DIR"), flush=True)

def count_in(path):
    def count(number, frame):
        with path.open("a") as file:
            file.write(f"{number}\n")

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, count)
    path.touch()

children = []
Path("tmp").mkdir(exist_ok=True)
print("pid", os.getpid(), flush=True)
for step in sys.argv[1:]:
    what, _, value = step.partition("=")
    if what == "compile":
        compile_as_the_library_does(value)
    elif what == "touch":
        Path(value).touch()
    elif what == "await":
        while not Path(value).exists():
            time.sleep(0.01)
    elif what == "count":
        count_in(Path(value))
    elif what == "child":
        command = [sys.executable, sys.argv[0], *value.split()]
        children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    elif what == "rank":
        os.environ["RANK"] = value
    elif what == "exit":
        sys.exit(int(value))
    elif what == "kill":
        signal.signal(int(value), signal.SIG_DFL) if int(value) != 9 else None
        os.kill(os.getpid(), int(value))
    elif what == "wait":
        print("waiting", flush=True)
        while True:
            time.sleep(0.01)
for child in children:
    child.wait()
"""

ITEMS = {item.m_ranges: item for item in small_plan().kernels}
SMALL, MIDDLE = ITEMS[((1, 16),)], ITEMS[((17, 32),)]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Where the server runs, beside its script and the sources that it compiles."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "small.cu").write_text(SMALL.kernel.body)
    (tmp_path / "middle.cu").write_text(MIDDLE.kernel.body)
    (tmp_path / "broken.cu").write_text("broken\n")
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def server(room: Path, *steps: str) -> list[str]:
    return [sys.executable, str(room.parent / "server.py"), *steps]


def environment(nvcc: Path, **values: str) -> dict[str, str]:
    ours = ("RANK", "DG_", "SGL", "CUDA", "WORLD_", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "DG_JIT_NVCC_COMPILER": str(nvcc), **values}


RUNNER = [sys.executable, "-c", "from runner.cli import main; main()", "watch"]


class Ran:
    """What a ``runner watch`` printed and how it ended."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        self.code = done.returncode
        self.out = done.stdout.splitlines()
        self.err = done.stderr.splitlines()
        self.compiles = [line for line in self.out if line.startswith("compile ")]

    @property
    def pid(self) -> int:
        return int(self.out[0].removeprefix("pid "))


def run(
    room: Path, nvcc: Path, command: Sequence[str | bytes], *options: str, **values: str
) -> Ran:
    done = subprocess.run(
        [*RUNNER, *options, "--", *command], cwd=room, env=environment(nvcc, **values),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ran(done)


TIME = r"\d+\.\d s"


def told(line: str, kernel: str, *, rank: str = "", outcome: str = TIME, serves: str = "") -> bool:
    """Whether a line tells of this compile."""
    who = rf"{rank}pid \d+ \([^)]*\)"
    pattern = rf"\[runner watch\] +{TIME}  {who}  {re.escape(kernel)}  {outcome}{re.escape(serves)}"
    return re.fullmatch(pattern, line) is not None


SMALL_WORDS = "sm90_fp8_gemm_1d2d (tile 16x32x128, 16 stages, 132 SMs)"
MIDDLE_WORDS = "sm90_fp8_gemm_1d2d (tile 32x32x128, 16 stages, 132 SMs)"


def summary(line: str, compiles: int, kernels: int, rest: str = "") -> bool:
    pattern = (
        rf"\[runner watch\] {compiles} compiles of {kernels} kernels, {TIME} of compiling in {TIME}"
    )
    return re.fullmatch(pattern + rest, line) is not None


def test_every_compile_is_told(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "rank=3", "compile=../middle.cu", "compile=../middle.cu"]
    ran = run(room, fake_nvcc, server(room, *steps))
    assert ran.code == 0
    assert ran.compiles == ["compile 0 "] * 3 and len(ran.out) == 4
    assert len(ran.err) == 4
    assert told(ran.err[0], SMALL_WORDS)
    assert told(ran.err[1], MIDDLE_WORDS, rank="rank 3, ")
    assert told(ran.err[2], MIDDLE_WORDS, rank="rank 3, ")
    each = rf", rank 3, pid {ran.pid} \([^)]*\): 2; pid {ran.pid} \([^)]*\): 1"
    assert summary(ran.err[3], 3, 2, each)
    cubins = sorted(path.read_text() for path in room.rglob("kernel.cubin"))
    assert cubins == sorted([SMALL.kernel.body, MIDDLE.kernel.body, MIDDLE.kernel.body])


def test_a_command_that_compiles_nothing(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room))
    assert (ran.code, ran.out) == (0, [f"pid {ran.pid}"])
    assert len(ran.err) == 1 and summary(ran.err[0], 0, 0)


def test_a_compile_that_fails_is_the_servers_affair(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../broken.cu"))
    assert ran.code == 0
    assert ran.compiles == ["compile 3 error: it is broken"]
    assert told(ran.err[0], "unknown ()", outcome=rf"{TIME}, failed with 3")
    assert summary(ran.err[1], 1, 1, r", pid .*: 1")


def test_as_json(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "touch=flag", "rank=3", "compile=../broken.cu", "exit=0"]
    command = server(room, *steps)
    ran = run(room, fake_nvcc, command, "--json", "out.json", "--forbid-after", "flag")
    assert ran.code == 1
    data = json.loads((room / "out.json").read_text())
    assert set(data) == {"version", "command", "exit_code", "seconds", "compiles"}
    assert (data["version"], data["command"], data["exit_code"]) == (1, command, 0)
    first, second = data["compiles"]
    assert set(first) == set(second) == {
        "start", "seconds", "exit_code", "forbidden", "rank", "pid", "command", "name", "config",
        "uses",
    }  # fmt: skip
    assert 0 <= first["start"] <= first["start"] + first["seconds"] <= second["start"] + 0.002
    assert second["start"] + second["seconds"] <= data["seconds"] + 0.002
    fields = ("exit_code", "forbidden", "rank", "pid", "name", "config", "uses")
    assert [first[name] for name in fields] == [
        0, False, -1, ran.pid, "sm90_fp8_gemm_1d2d", config_of(SMALL.kernel), None,
    ]  # fmt: skip
    assert [second[name] for name in fields] == [97, True, 3, ran.pid, "unknown", {}, None]


def test_the_command_that_asked(room: Path, fake_nvcc: Path) -> None:
    command = server(room, "compile=../small.cu", "port=8000", r"a\nb", "two\nlines")
    ran = run(room, fake_nvcc, command, "--json", "out.json")
    (compiled,) = json.loads((room / "out.json").read_text())["compiles"]
    assert compiled["command"] == " ".join(command).replace("\n", " ")
    assert f"pid {ran.pid} ({Path(sys.executable).name})" in ran.err[0]


def test_a_rank_that_is_no_number(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "rank=first", "compile=../middle.cu", "rank=-2",
             "compile=../middle.cu"]  # fmt: skip
    ran = run(room, fake_nvcc, server(room, *steps), "--json", "out.json")
    assert ran.code == 0
    compiles = json.loads((room / "out.json").read_text())["compiles"]
    assert [item["rank"] for item in compiles] == [-1, -1, -1]


def test_who_asked_is_above_shells_and_other_shims(room: Path, fake_nvcc: Path) -> None:
    """A watch in a watch: the outer shim is started by the inner one."""
    inner = [*RUNNER, "--", *server(room, "compile=../small.cu")]
    ran = run(room, fake_nvcc, inner, "--json", "out.json")
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])
    (compiled,) = json.loads((room / "out.json").read_text())["compiles"]
    assert compiled["pid"] == ran.pid
    assert [told(line, SMALL_WORDS) for line in ran.err].count(True) == 2


def test_a_command_line_that_is_no_text(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, [*server(room, "compile=../small.cu"), b"\xff"])
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])
    assert summary(ran.err[-1], 1, 1, ", pid .*")


# Forbidding


def test_no_compile_at_all(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), "--forbid-after", "0")
    assert ran.code == 1
    assert ran.compiles == ["compile 97 a DeepGEMM compile is forbidden by now: DIR/kernel.cu"]
    assert told(ran.err[0], SMALL_WORDS, outcome="FORBIDDEN")
    assert summary(ran.err[1], 0, 0, r", 1 forbidden, pid .*: 1")
    assert ran.err[2:] == ["error: 1 compiles after they were forbidden; the command ended with 0"]
    assert list(room.rglob("kernel.cubin")) == []


def test_no_compile_once_a_file_exists(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "touch=ready", "compile=../middle.cu", "exit=4"]
    ran = run(room, fake_nvcc, server(room, *steps), "--forbid-after", "ready")
    assert ran.code == 1
    assert [line[:10] for line in ran.compiles] == ["compile 0 ", "compile 97"]
    assert told(ran.err[0], SMALL_WORDS)
    assert told(ran.err[1], MIDDLE_WORDS, outcome="FORBIDDEN")
    assert summary(ran.err[2], 1, 1, r", 1 forbidden, pid .*: 2")
    assert ran.err[3:] == ["error: 1 compiles after they were forbidden; the command ended with 4"]


def test_a_file_that_never_comes_forbids_nothing(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), "--forbid-after", "ready")
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])
    assert not (room / "ready").exists()


def test_nothing_compiled_after_it_was_forbidden(room: Path, fake_nvcc: Path) -> None:
    ran = run(
        room, fake_nvcc, server(room, "compile=../small.cu", "touch=x"), "--forbid-after", "x"
    )
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])


def test_the_flag_that_forbids(tmp_path: Path) -> None:
    assert _flag(None, tmp_path) is None
    file = tmp_path / "mine"
    assert _flag(Forbid(file=file), tmp_path) == file
    later = _flag(Forbid(seconds=3600.0), tmp_path)
    assert later == tmp_path / "forbidden"
    assert list(tmp_path.iterdir()) == []
    _raise_flag(later, due=False)
    assert not later.exists()
    assert _flag(Forbid(seconds=0.0), tmp_path) == later
    assert later.exists()
    later.unlink()
    _raise_flag(later, due=True)
    _raise_flag(later, due=True)
    assert later.exists()


def watched(room: Path, nvcc: Path, *steps: str, **values: Any) -> Watched:
    work_dir = room / "work"
    work_dir.mkdir()
    command = ["sh", "-c", f'cd {room} && exec "$0" "$@"', *server(room, *steps)]
    return watch(command, nvcc=nvcc, environment=environment(nvcc), work_dir=work_dir, **values)


def test_no_compile_after_some_seconds(room: Path, fake_nvcc: Path) -> None:
    """The server waits for the flag itself, however late it comes."""
    flag = room / "work" / "forbidden"
    steps = ["compile=../small.cu", f"await={flag}", "compile=../middle.cu"]
    done = watched(room, fake_nvcc, *steps, forbid=Forbid(seconds=0.3))
    assert [record.exit_code for record in done.records][-1] == FORBIDDEN_EXIT
    assert [record.source for record in done.records] == [
        SMALL.kernel.body, MIDDLE.kernel.body,
    ]  # fmt: skip
    assert done.forbidden[-1] == done.records[-1]


def test_seconds_that_do_not_pass_forbid_nothing(room: Path, fake_nvcc: Path) -> None:
    done = watched(room, fake_nvcc, "compile=../small.cu", forbid=Forbid(seconds=3600.0))
    assert (done.forbidden, len(done.compiled)) == ([], 1)


# Records


def test_each_compile_is_told_once_with_its_time(room: Path, fake_nvcc: Path) -> None:
    seen: list[tuple[CompileRecord, float]] = []
    done = watched(
        room, fake_nvcc, "compile=../small.cu", "compile=../broken.cu", "exit=3",
        on_compile=lambda record, seconds: seen.append((record, seconds)),
    )  # fmt: skip
    assert [record for record, _ in seen] == done.records
    assert [seconds for _, seconds in seen] == [
        record.start - done.started for record in done.records
    ]
    assert [record.exit_code for record in done.records] == [0, 3]
    assert [record.source for record in done.records] == [SMALL.kernel.body, "broken\n"]
    assert done.exit_code == 3
    assert (done.unfinished, done.forbidden, done.compiled) == ([], [], done.records)
    for record in done.records:
        assert done.started <= record.start <= record.end <= done.started + done.seconds
        assert Path(record.output).name == "kernel.cubin"


def killing_nvcc(tmp_path: Path, victim: str) -> Path:
    path = tmp_path / "killing-nvcc"
    path.write_text(f"#!/bin/sh\nkill -9 {victim}\n")
    path.chmod(0o755)
    return path


def test_a_killed_compile_never_ended(room: Path, tmp_path: Path) -> None:
    nvcc = killing_nvcc(tmp_path, "$PPID")
    ran = run(room, nvcc, server(room, "compile=../small.cu"), "--json", "out.json")
    assert ran.code == 0
    assert len(ran.err) == 1 and summary(ran.err[0], 0, 0, ", 1 never ended")
    (only,) = json.loads((room / "out.json").read_text())["compiles"]
    assert [only[name] for name in ("seconds", "exit_code", "forbidden", "pid", "name")] == [
        None, None, False, ran.pid, "sm90_fp8_gemm_1d2d",
    ]  # fmt: skip
    assert only["start"] >= 0


def test_a_killed_compiler_is_a_failure(room: Path, tmp_path: Path) -> None:
    nvcc = killing_nvcc(tmp_path, "$$")
    ran = run(room, nvcc, server(room, "compile=../small.cu"))
    assert told(ran.err[0], SMALL_WORDS, outcome=rf"{TIME}, failed with 137")
    assert ran.compiles[0].startswith("compile 137")


def test_the_m_that_a_kernel_serves(room: Path, fake_nvcc: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    keys = keys_for(small_library(tmp_path / "deep_gemm"))
    plan.write_text(json.dumps({**plan_to_json(small_plan(max_m=20), keys), "for": "x"}))
    other = ITEMS[((33, 64),)]
    (tmp_path / "other.cu").write_text(other.kernel.body)
    steps = ["compile=../middle.cu", "compile=../other.cu", "compile=../broken.cu"]
    ran = run(room, fake_nvcc, server(room, *steps), "--plan", str(plan), "--json", "out.json")
    assert told(ran.err[0], MIDDLE_WORDS, serves="; gemm_nt_f8f8bf16:4096:1024 M 17..20")
    words = MIDDLE_WORDS.replace("32x32", "64x32")
    assert told(ran.err[1], words, serves="; not in the plan")
    assert told(
        ran.err[2], "unknown ()", outcome=f"{TIME}, failed with 3", serves="; not in the plan"
    )
    compiles = json.loads((room / "out.json").read_text())["compiles"]
    assert [[use["m_ranges"] for use in item["uses"]] for item in compiles] == [
        [[[17, 20]]], [], [],
    ]  # fmt: skip


# How it ends


@pytest.mark.parametrize(
    ("step", "code"), [("exit=0", 0), ("exit=3", 3), ("exit=97", 97), ("kill=9", 137),
                       ("kill=15", 143)],
)  # fmt: skip
def test_the_commands_exit_code(room: Path, fake_nvcc: Path, step: str, code: int) -> None:
    ran = run(room, fake_nvcc, server(room, step), "--json", "out.json")
    assert ran.code == code
    assert summary(ran.err[0], 0, 0)
    assert ran.err[1:] == ([f"error: the command ended with {code}"] if code else [])
    assert json.loads((room / "out.json").read_text())["exit_code"] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command(room: Path, fake_nvcc: Path, number: int) -> None:
    command = [*RUNNER, "--", *server(room, "compile=../small.cu", "wait")]
    with subprocess.Popen(
        command, cwd=room, env=environment(fake_nvcc), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None and process.stdout is not None
        before = [process.stdout.readline() for _ in range(3)]
        assert before[1:] == ["compile 0 \n", "waiting\n"]
        assert told(process.stderr.readline().rstrip("\n"), SMALL_WORDS)
        process.send_signal(number)
        assert process.stdout.read() == f"stopped by {number}\n"
        last = process.stderr.read().splitlines()
    assert summary(last[0], 1, 1, ", pid .*: 1")
    assert last[1:] == ["error: the command ended with 5"]
    assert process.returncode == 5


def wait_for(path: Path, *numbers: int) -> None:
    """Until a server has counted these signals, in whatever order."""
    while not (path.exists() and {*map(str, numbers)} <= {*path.read_text().split()}):
        time.sleep(0.01)


def test_an_interrupt_reaches_the_commands_group_once_and_the_rest_the_command(
    room: Path, fake_nvcc: Path
) -> None:
    """As a terminal interrupts: the watch's whole group.

    The watch is stopped meanwhile. What the server gets before the signal of our own came from
    the terminal, and what it gets later from the watch.
    """
    steps = ["child=count=child await=go", "await=child", "count=parent", "await=go"]
    with subprocess.Popen(
        [*RUNNER, "--", *server(room, *steps)], cwd=room, env=environment(fake_nvcc),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    ) as process:  # fmt: skip
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


def test_a_watch_that_fails_ends_the_command(
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


def test_a_command_that_does_not_exist(room: Path, fake_nvcc: Path) -> None:
    line = "cannot run no-such-server: No such file or directory"
    refused(room, fake_nvcc, line=line, program="no-such-server")
    (room / "text").write_text("")
    refused(room, fake_nvcc, line="cannot run ./text: Permission denied", program="./text")


@pytest.mark.parametrize("name", ["DG_JIT_USE_NVRTC", "SGLANG_DG_USE_NVRTC"])
def test_compiles_inside_the_process_cannot_be_seen(room: Path, fake_nvcc: Path, name: str) -> None:
    line = "DG_JIT_USE_NVRTC is set: compiles inside the process cannot be seen; unset it"
    refused(room, fake_nvcc, line=line, **{name: "1"})


def test_nvrtc_turned_off_is_fine(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), DG_JIT_USE_NVRTC="0")
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--forbid-after", "-1"], "--forbid-after -1 must be at least 0 seconds, or a file"),
        (["--forbid-after", "nan"], "--forbid-after nan must be at least 0 seconds, or a file"),
        (["--forbid-after", "inf"], "--forbid-after inf must be at least 0 seconds, or a file"),
        (["--json", "-"], "--json needs a file: the command has standard output"),
        (["--json", "no/x.json"], "cannot write no/x.json: its folder does not exist"),
        (["--json", "."], "Invalid value for '--json': File '.' is a directory."),
        (["--plan", "gone"], "Invalid value for '--plan': File 'gone' does not exist."),
    ],
)
def test_bad_options(room: Path, fake_nvcc: Path, options: list[str], line: str) -> None:
    refused(room, fake_nvcc, *options, line=line)


def test_a_bad_plan(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "touch=ran"), "--plan", "../small.cu")
    assert (ran.code, ran.out, len(ran.err)) == (2, [], 1)
    assert ran.err[0].startswith("error: ../small.cu is not a plan of runner plan --json: ")
    assert not (room / "ran").exists()


def test_an_nvcc_that_is_not_there(room: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "gone"
    refused(room, nvcc, line=f"DG_JIT_NVCC_COMPILER={nvcc} is not a file: it must be nvcc")


def test_no_command(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, [])
    assert (ran.code, ran.err) == (2, ["error: Missing argument 'COMMAND...'."])


def test_options_behind_the_command_are_the_commands(room: Path, fake_nvcc: Path) -> None:
    command = [*RUNNER, "echo", "--json", "x.json", "--port", "80"]
    done = subprocess.run(
        command, cwd=room, env=environment(fake_nvcc), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "--json x.json --port 80\n")
    assert not (room / "x.json").exists()


def test_the_commands_own_dashes_stay_its_own(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, ["echo", "--plan", "--", "--help"])
    assert (ran.code, ran.out) == (0, ["--plan -- --help"])


def test_watch_itself_refuses_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        watch(["/no/server"], nvcc=Path("nvcc"), environment={}, work_dir=tmp_path)
    assert str(caught.value) == "cannot run /no/server: No such file or directory"
