"""nvcc as DeepGEMM calls it: signature, flags, cache key and one compile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.environ import Environ
from runner.errors import UserError
from runner.jit.keys import CacheKeys, nvcc_flags
from runner.jit.library import Library

OLDEST_RELEASE = (12, 9)
"""Oldest nvcc whose flags are those that the library's current versions use."""


class CompileError(Exception):
    """nvcc refused a kernel; the text holds the compiler's own words."""


@dataclass(frozen=True)
class NvccCompiler:
    """Compiles kernels of one library with one nvcc.

    Attributes:
        nvcc: the program that is run (may be a recording shim around the real one).
        library: where the headers come from; its path is part of the flags and so of the key.
    """

    nvcc: Path
    library: Library
    environ: Environ

    @cached_property
    def signature(self) -> str:
        """``NVCC<major>.<minor>`` of the program, as the cache key has it.

        Raises:
            UserError: not an nvcc, or one too old for the flags.
        """
        command = [str(self.nvcc.absolute()), "--version"]
        try:
            words = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError as error:
            raise UserError(f"{self.nvcc} cannot be run as nvcc: {error.strerror}") from None
        match = re.search(r"release (\d+)\.(\d+)", words)
        if not match:
            raise UserError(f"{self.nvcc} --version names no release: is it nvcc?")
        if (int(match[1]), int(match[2])) < OLDEST_RELEASE:
            raise UserError(
                f"{self.nvcc} is release {match[1]}.{match[2]}: 12.9 or newer is needed"
            )
        return f"NVCC{match[1]}.{match[2]}"

    @cached_property
    def flags(self) -> str:
        """Flags as one string; the string itself is hashed into the cache key."""
        return nvcc_flags(self.library.include_path, self.environ)

    @cached_property
    def keys(self) -> CacheKeys:
        """Keys for this machine: this nvcc's signature, this library's path."""
        return CacheKeys(self.library, self.library.include_path, self.signature, self.environ)

    def compile(self, source_path: Path, cubin_path: Path, work_dir: Path) -> None:
        """Compile ``source_path`` to ``cubin_path``; nvcc runs in ``work_dir``.

        Raises:
            CompileError: nvcc failed.
        """
        command = [str(self.nvcc.absolute()), str(source_path), "-cubin", "-o", str(cubin_path)]
        done = subprocess.run(
            command + self.flags.split(), capture_output=True, text=True, cwd=work_dir, check=False
        )
        if done.returncode:
            raise CompileError((done.stderr or done.stdout).strip() or f"exit {done.returncode}")


def find_nvcc(environ: Environ) -> Path | None:
    """The nvcc to use: DG_JIT_NVCC_COMPILER, CUDA_HOME, PATH, then the pip-installed toolkit.

    Raises:
        UserError: DG_JIT_NVCC_COMPILER names something that is no file.
    """
    if environ.dg_jit_nvcc_compiler:
        chosen = Path(environ.dg_jit_nvcc_compiler)
        if not chosen.is_file():
            raise UserError(f"DG_JIT_NVCC_COMPILER={chosen} is not a file: it must be nvcc")
        return chosen
    for home in (environ.cuda_home, environ.cuda_path):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc", path=environ.search_path or None)
    if on_path:
        return Path(on_path)
    return _pip_nvcc()


def _pip_nvcc() -> Path | None:
    """nvcc of the ``nvcc`` extra: ``site-packages/nvidia/cu13/bin/nvcc``."""
    for scheme in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_path(scheme)) / "nvidia" / "cu13" / "bin" / "nvcc"
        if candidate.is_file():
            return candidate
    return None
