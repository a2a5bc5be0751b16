"""A server that compiles like DeepGEMM, run under ``runner watch`` in real processes."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.watch.command import Watched, watch
from tests.unit.small_cache import small_plan

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


def server(room: Path, *steps: str) -> list[str]:
    return [sys.executable, str(room.parent / "server.py"), *steps]


def environment(nvcc: Path, **values: str) -> dict[str, str]:
    ours = ("RANK", "DG_", "SGL", "CUDA", "WORLD_", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "DG_JIT_NVCC_COMPILER": str(nvcc), **values}


RUNNER = [sys.executable, "-c", "from runner.cli import main; main()", "watch"]


class Ran:
    """Output and exit code of ``runner watch``."""

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
        [*RUNNER, *options, "--", *command],
        cwd=room,
        env=environment(nvcc, **values),
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(done)


TIME = r"\d+\.\d s"


def reports(
    line: str, kernel: str, *, rank: str = "", outcome: str = TIME, serves: str = ""
) -> bool:
    """Whether a line reports this compile."""
    who = rf"{rank}pid \d+ \([^)]*\)"
    pattern = rf"\[runner watch\] +{TIME}  {who}  {re.escape(kernel)}  {outcome}{re.escape(serves)}"
    return re.fullmatch(pattern, line) is not None


SMALL_WORDS = "sm90_fp8_gemm_1d2d (tile 16x32x128, 16 stages, 132 SMs)"


def summary(line: str, compiles: int, kernels: int, rest: str = "") -> bool:
    pattern = (
        rf"\[runner watch\] {compiles} compiles of {kernels} kernels, {TIME} of compiling in {TIME}"
    )
    return re.fullmatch(pattern + rest, line) is not None


def watched(room: Path, nvcc: Path, *steps: str, **values: Any) -> Watched:
    work_dir = room / "work"
    work_dir.mkdir()
    command = ["sh", "-c", f'cd {room} && exec "$0" "$@"', *server(room, *steps)]
    return watch(command, nvcc=nvcc, environment=environment(nvcc), work_dir=work_dir, **values)
