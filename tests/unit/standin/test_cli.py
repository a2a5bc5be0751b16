"""``runner standin``: running a command on stand-in GPUs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.standin import interpreter_of
from tests.unit.standin.fake_torch import Child

ASK = """
import ctypes, os, sys
text = ctypes.create_string_buffer(256)
count = ctypes.c_int()
gpu = ctypes.CDLL(None)
gpu.cudaGetDeviceCount(ctypes.byref(count)); gpu.cuDeviceGetName(text, 256, 0)
print(text.value.decode(), count.value, sys.argv[1:])
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """An nvcc that only prints a version."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\necho the real release 13.0\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(child: Child, fake_nvcc: Path) -> dict[str, str]:
    root = Path(__file__).parents[3]
    hidden = {"CUDA_HOME": "", "CUDA_PATH": ""}
    path = f"{fake_nvcc.parent}:{os.environ['PATH']}"
    return {**child.base, **hidden, "PYTHONPATH": f"{child.packages}:{root}", "PATH": path}


def standin(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", "standin", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_sees_the_requested_gpus(environment: dict[str, str]) -> None:
    command = (sys.executable, "-c", ASK, "--gpu", "x")
    done = standin(environment, "--gpu", "gb300", "--devices", "4", "--", *command)
    assert done.stdout == "NVIDIA GB300 4 ['--gpu', 'x']\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_unsupported_functions_are_reported_at_the_end(environment: dict[str, str]) -> None:
    ask = "import ctypes; ctypes.CDLL(None).cudaWarpDrive()"
    program = f"import os, subprocess, sys; {ask}; subprocess.run([sys.executable, '-c', {ask!r}])"
    done = standin(environment, "--gpu", "h200", "--", sys.executable, "-c", program)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        *["stand-in GPU: cudaWarpDrive is not stood in"] * 2,
        "[runner standin] cudaWarpDrive is not stood in: it failed in 2 processes",
    ]


def test_real_nvcc_is_used_unless_no_compile_is_given(
    environment: dict[str, str], fake_nvcc: Path
) -> None:
    command = ("sh", "-c", "echo $DG_JIT_NVCC_COMPILER $CUDA_HOME; $DG_JIT_NVCC_COMPILER --version")
    done = standin(environment, "--gpu", "h200", "--", *command)
    home = fake_nvcc.parent.parent
    assert done.stdout == f"{fake_nvcc} {home}\nthe real release 13.0\n"
    done = standin(environment, "--gpu", "h200", "--no-compile", "--", *command)
    names, version = done.stdout.splitlines()
    root = Path(names.split()[1])
    assert names == f"{root / 'bin' / 'nvcc'} {root}" and root != home
    assert version == "the real release 13.0"


@pytest.mark.parametrize(
    ("command", "code"), [("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM)]
)
def test_standin_exits_with_the_commands_exit_code(
    environment: dict[str, str], command: str, code: int
) -> None:
    done = standin(environment, "--gpu", "h200", "--", "sh", "-c", command)
    assert done.returncode == code
    assert done.stderr == f"error: the command ended with {code}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1"], "GPU 'h1' is not known: use one of h100, "),
        (["--gpu", "h200", "--num-sms", "0"], "'--num-sms': 0 is not in the range 1<=x<=1024."),
        (["--gpu", "h200", "--", "/none"], "cannot run /none: no such program"),
        ([], "Missing option '--gpu'."),
    ],
)
def test_invalid_input_is_a_one_line_error(
    environment: dict[str, str], arguments: list[str], message: str
) -> None:
    command = [] if "--" in arguments else ["--", "true"]
    done = standin(environment, *arguments, *command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_interpreter_is_found_from_command_or_shebang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python3.12"
    other.symlink_to(sys.executable)
    for name, first in {
        "direct": f"#!{other}",
        "by-env": "#!/usr/bin/env python3.12",
        "sh": "#!/bin/sh",
    }.items():
        (tmp_path / name).write_text(f"{first}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert interpreter_of(["python3.12"]) == interpreter_of([str(other)]) == other
    assert interpreter_of(["direct"]) == interpreter_of(["by-env"]) == other
    assert interpreter_of(["sh"]) == Path(sys.executable)
