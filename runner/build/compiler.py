"""Compile single kernels as DeepGEMM does."""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from runner.kernels.entry import CUBIN, SOURCE
from runner.kernels.installed import Library
from runner.kernels.keys import CacheKeys, Recipe
from runner.kernels.nvcc import keys_for, nvcc_version, signature_of
from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType, KernelCall

_REFERENCE = KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 128, 4096, 4096, 1, 132)


class CompileError(Exception):
    """nvcc refused a kernel; the text is the compiler's own."""


@dataclass(frozen=True)
class NvccCompiler:
    """Compiles one library's kernels for one GPU with nvcc, or with a shim that records it."""

    nvcc: Path
    library: Library
    recipe: Recipe

    @cached_property
    def version_text(self) -> str:
        return nvcc_version(self.nvcc)

    @property
    def signature(self) -> str:
        return signature_of(self.version_text, self.recipe.generation)

    @property
    def arguments(self) -> list[str]:
        return self.recipe.arguments(self.library.include_path)

    @cached_property
    def keys(self) -> CacheKeys:
        return keys_for(self.library, self.recipe, self.version_text, self.library.root)

    def compile(self, source: str, folder: Path) -> bytes:
        """Compile a source to a cubin; nvcc runs in ``folder`` and leaves both files there."""
        source_path, cubin_path = folder.absolute() / SOURCE, folder.absolute() / CUBIN
        source_path.write_bytes(source.encode())
        command = [str(self.nvcc.absolute()), str(source_path), "-cubin", "-o", str(cubin_path)]
        done = subprocess.run(
            command + self.arguments, capture_output=True, text=True, cwd=folder, check=False
        )
        if done.returncode:
            raise CompileError((done.stderr or done.stdout).strip() or f"exit {done.returncode}")
        if not cubin_path.exists():
            raise CompileError("nvcc wrote no cubin")
        return cubin_path.read_bytes()

    def reference_seconds(self, repeats: int = 3) -> float:
        """How fast this machine compiles now: the median time of a fixed reference kernel.

        Machines of one type differ, and the speed of a shared one changes by the minute.
        """
        source = self.keys.source(kernels_of(_REFERENCE)[-1])
        found = []
        with tempfile.TemporaryDirectory(prefix="deepgemm-probe-") as folder:
            for _ in range(repeats):
                start = time.perf_counter()
                self.compile(source, Path(folder))
                found.append(time.perf_counter() - start)
        return median(found)
