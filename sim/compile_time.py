"""How long one kernel's compile takes."""

from __future__ import annotations

from runner.jit.builder.costs import plain_seconds
from runner.jit.kernels import Kernel
from sim.profile import CompileTimes

_TILED = ("sm90_fp8_gemm_1d2d", "sm90_bf16_gemm")
_SHAPE = (1, 2)
"""Template arguments of dimensions and of the number of groups."""

_SMS = 8
"""The argument that begins with, or is, the number of SMs."""


def template_of(kernel: Kernel) -> str:
    """Dense, contiguous and masked GEMMs of a family instantiate one template."""
    return kernel.entry.rsplit("::", 1)[-1].removesuffix("_impl")


def config_key(kernel: Kernel) -> str:
    """Template and configuration (tile, stages, threads, ...), not what it is for.

    Shape, number of groups and SMs do not change the size of the code.
    """
    template = template_of(kernel)
    if template not in _TILED:
        return template
    words = [word for i, word in enumerate(kernel.arguments) if i not in (*_SHAPE, _SMS)]
    words += kernel.arguments[_SMS].split(", ")[1:]
    return f"{template} {' | '.join(words)}"


def compile_seconds(times: CompileTimes, kernel: Kernel) -> float:
    """Seconds of a compile alone on a node: measured, else what its size lets expect."""
    measured = times.by_config.get(config_key(kernel))
    if measured is not None:
        return measured
    return times.scale.get(template_of(kernel), times.default_scale) * plain_seconds(kernel)


def slowdown(times: CompileTimes, compilers: int, cores: int) -> float:
    """How much longer each of ``compilers`` compiles at a time takes on ``cores`` cores."""
    if compilers >= cores:
        return (1.0 + times.contention) * compilers / cores
    return 1.0 + times.contention * (compilers - 1) / max(cores - 1, 1)
