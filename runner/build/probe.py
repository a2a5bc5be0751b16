"""How fast this machine compiles just now: the time of one reference kernel.

Machines of one type differ, and a shared one changes by the minute. A compile of always the same
kernel tells how far measured times can be compared.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from runner.build.compiler import NvccCompiler
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.types import DeepGemmKernelType, KernelCall

_REFERENCE = KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 128, 4096, 4096, 1, 132)


def probe_seconds(compiler: NvccCompiler, repeats: int = 3) -> float:
    """Median seconds of ``repeats`` compiles of the reference kernel, one after the other.

    Raises:
        runner.build.compiler.CompileError: nvcc refuses the kernel.
    """
    kernel = kernels_of(_REFERENCE)[-1]
    found = []
    with tempfile.TemporaryDirectory(prefix="deepgemm-probe-") as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(compiler.keys.source(kernel))
        for _ in range(repeats):
            start = time.perf_counter()
            compiler.compile(source, Path(folder) / "kernel.cubin", Path(folder))
            found.append(time.perf_counter() - start)
    return median(found)
