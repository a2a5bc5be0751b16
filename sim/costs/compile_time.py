"""How long one kernel's compile takes."""

from __future__ import annotations

from runner.build.estimates import plain_seconds, unrolled_k_blocks
from runner.kernels.kernel import Kernel
from sim.costs.profile import CompileTimes

_TILED = ("sm90_fp8_gemm_1d2d", "sm90_bf16_gemm")
_SHAPE = (1, 2)
"""Template arguments of dimensions and of the number of groups."""

_SMS = 8
"""The argument that begins with, or is, the number of SMs."""


def template_of(kernel: Kernel) -> str:
    """Dense, contiguous and masked GEMMs of a family instantiate one template."""
    return kernel.entry.rsplit("::", 1)[-1].removesuffix("_impl")


def config_key(kernel: Kernel) -> str:
    """Template and configuration (tile, stages, threads, ...) of a kernel.

    Shape, number of groups and SMs are left out: of these only a short K changes the size of the
    code, since its loop is unrolled completely.
    """
    template = template_of(kernel)
    if template not in _TILED:
        return template
    words = [word for i, word in enumerate(kernel.arguments) if i not in (*_SHAPE, _SMS)]
    words += kernel.arguments[_SMS].split(", ")[1:]
    words.append(f"{unrolled_k_blocks(kernel)} K-blocks")
    return f"{template} {' | '.join(words)}"


def compile_seconds(times: CompileTimes, kernel: Kernel) -> float:
    """Seconds of a compile alone on a machine: measured, else from the size of its code."""
    measured = times.by_config.get(config_key(kernel))
    if measured is not None:
        return measured
    return times.scale.get(template_of(kernel), times.default_scale) * plain_seconds(kernel)


def slowdown(times: CompileTimes, compilers: int, cores: int) -> float:
    """How many times as long each of ``compilers`` compiles takes on ``cores`` cores."""
    busy = min(compilers, cores)
    contention = times.contention * (busy - 1) / max(cores - 1, 1)
    return (1.0 + contention) * compilers / busy
