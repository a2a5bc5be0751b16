"""``runner standin``: run any command unchanged on GPUs that do nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from runner.config.environ import Environ
from runner.errors import UserError, WorkFailedError
from runner.kernels.nvcc import find_nvcc, toolkit_of
from runner.standin.build import FAILURES, MOST_DEVICES, standin_environment
from runner.standin.gpus import GPUS, MOST_SMS, gpu_named
from runner.watch.command import running

_UNKNOWN_NVCC = "Cuda compilation tools, release 13.0, V13.0.0\n"
_PYTHON = re.compile(r"python[\d.]*")


GPU_OPTION = click.option(
    "--gpu", required=True, metavar="GPU", help=f"One of {', '.join(gpu.name for gpu in GPUS)}."
)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@GPU_OPTION
@click.option(
    "--num-sms",
    type=click.IntRange(1, MOST_SMS),
    metavar="N",
    help="SMs, if not the GPU model's usual number.",
)
@click.option(
    "--devices",
    type=click.IntRange(1, MOST_DEVICES),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of such GPUs.",
)
@click.option("--no-compile", is_flag=True, help="Replace nvcc too: no kernel is compiled.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def standin(
    command: tuple[str, ...], gpu: str, num_sms: int | None, devices: int, no_compile: bool
) -> None:
    """Run COMMAND unchanged on stand-in GPUs, whose calls return at once and compute nothing."""
    nvcc = find_nvcc(Environ.read(os.environ))
    with tempfile.TemporaryDirectory(prefix="deepgemm-standin-") as folder:
        environment = standin_environment(
            gpu_named(gpu, num_sms),
            python=interpreter_of(command),
            environment=os.environ,
            version_text=version_text_of(nvcc),
            work_dir=Path(folder),
            devices=devices,
        )
        if nvcc is not None and not no_compile:
            environment |= _real_compiler(nvcc)
        with running(command, environment) as child:
            code = child.wait()
        failures = Path(environment[FAILURES])
        missing = Counter(failures.read_text().splitlines() if failures.is_file() else ())
    for name, count in sorted(missing.items()):
        processes = f"{count} processes" if count > 1 else "1 process"
        _say(f"{name} is not stood in: it failed in {processes}")
    if code:
        code = code if code > 0 else 128 - code
        raise WorkFailedError(f"the command ended with {code}", code)


def interpreter_of(command: Sequence[str]) -> Path:
    """The Python that runs a command: the command itself, the one in its first line, or ours."""
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"cannot run {command[0]}: no such program")
    if _PYTHON.fullmatch(Path(program).name):
        return Path(program)
    with Path(program).open("rb") as file:
        words = file.readline(4096).removeprefix(b"#!").decode(errors="replace").split()
    named = next((word for word in words if _PYTHON.fullmatch(Path(word).name)), None)
    return Path((named and shutil.which(named)) or sys.executable)


def version_text_of(nvcc: Path | None) -> str:
    """The exact output of ``nvcc --version``; a made-up one if there is no nvcc."""
    if nvcc is None:
        _say("there is no nvcc: nothing is compiled, and cache keys differ from any real nvcc's")
        return _UNKNOWN_NVCC
    try:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{nvcc} --version failed: {error}") from None
    return done.stdout


def _real_compiler(nvcc: Path) -> dict[str, str]:
    """Variables that give the command the real compiler."""
    found = {
        "DG_JIT_NVCC_COMPILER": str(nvcc.absolute()),
        "DG_JIT_USE_NVRTC": os.environ.get("DG_JIT_USE_NVRTC", "0"),
    }
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home or not Path(home).is_dir():
        found["CUDA_HOME"] = str(toolkit_of(nvcc))
    return found


def _say(line: str) -> None:
    print(f"[runner standin] {line}", file=sys.stderr, flush=True)
