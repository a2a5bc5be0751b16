"""A fake site-packages folder with torch, and child processes that run on a stand-in GPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.standin.build import standin_environment
from runner.standin.gpus import Gpu, gpu_named

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")

VERSION = "nvcc: NVIDIA (R) Cuda compiler driver\nrelease 13.0, V13.0.88\n"

LIBRARIES = {
    "libcudart.so.13": ("cudaMalloc", "cudaWarpDrive", "__cudaRegisterFatBinary", "helper"),
    "libcublas.so.13": ("cublasSgemm_v2", "cublasWarp"),
    "libcublasLt.so.13": ("cublasLtMatmulDescCreate", "cublasLtMatmul", "cublasLtWarp"),
}
"""Functions of the fake CUDA libraries; each returns 77."""


def shared_library(path: Path, functions: tuple[str, ...]) -> Path:
    """A shared library that exports these functions and has other symbols, not callable."""
    code = "".join(f"int {name}(void) {{ return 77; }}\n" for name in functions)
    code += "static int hidden(void) { return 1; }\nint data = 1;\nint puts(const char *);\n"
    code += "int (*kept)(void) = hidden; int (*wanted)(const char *) = puts;\n"
    source = path.with_suffix(".c")
    source.write_text(code)
    command = [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", str(path)]
    subprocess.run([*command, str(source)], check=True)
    source.unlink()
    return path


def make_packages(root: Path, *, cuda: str | None = "13.0", libraries: bool = True) -> Path:
    """``root`` as site-packages with a torch that must not be imported."""
    torch = root / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    (torch / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.14.1'\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    )
    folder = root / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    if libraries:
        for name, functions in LIBRARIES.items():
            shared_library(folder / name, functions)
    return root


class Child:
    """Runs Python snippets on a stand-in GPU; they store results in the dict ``found``."""

    def __init__(self, packages: Path, cache: Path, work: Path) -> None:
        self.packages = packages
        self.work = work
        work.mkdir(exist_ok=True)
        self.base = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DG_")},
            "PYTHONPATH": str(packages),
            "XDG_CACHE_HOME": str(cache),
        }

    def environment(self, gpu: Gpu | None = None, devices: int = 1, **more: str) -> dict[str, str]:
        """The environment variables of the child process."""
        return standin_environment(
            gpu or gpu_named("b200"),
            python=Path(sys.executable),
            environment={**self.base, **more},
            version_text=VERSION,
            work_dir=self.work,
            devices=devices,
        )

    def run(self, snippet: str, environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
        """The snippet's ``found`` dict, and the lines of its standard error."""
        done = subprocess.run(
            [sys.executable, "-c", f"{_BEFORE}\n{snippet}\nprint(json.dumps(found))"],
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found, done.stderr.splitlines()


_BEFORE = """
import ctypes, json, os, struct, threading
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint32, c_void_p
gpu = ctypes.CDLL(None)
gpu.standin_loaded.restype = c_char_p
found = {}
def allocate(size, name="cudaMalloc"):
    at = c_void_p()
    return getattr(gpu, name)(byref(at), c_size_t(size)), at
def missing():
    text = ctypes.create_string_buffer(1 << 16)
    length = gpu.standin_failed(text, len(text))
    assert length == len(text.value)
    return text.value.decode().split()
def drain(most=64):
    out = (c_uint32 * most)()
    return list(out[: gpu.standin_launches(out, most)])
"""
