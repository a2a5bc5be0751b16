"""How long one kernel's compile takes: what it is looked up by."""

from __future__ import annotations

from runner.jit.kernels import Kernel
from sim.profile import CompileTimes

_TILED = ("sm90_fp8_gemm_1d2d", "sm90_bf16_gemm")
_DIMENSIONS, _TILE = 1, 3


def template_of(kernel: Kernel) -> str:
    """Dense, contiguous and masked GEMMs of a family instantiate one template."""
    return kernel.entry.rsplit("::", 1)[-1].removesuffix("_impl")


def tile_elements(kernel: Kernel) -> int:
    """Elements of the output tile, 0 where the template has none."""
    if template_of(kernel) not in _TILED:
        return 0
    block_m, block_n, _ = kernel.arguments[_TILE].split(", ")
    return int(block_m) * int(block_n)


def tile_key(kernel: Kernel) -> str:
    """Template and tile, or the template where it has none."""
    template = template_of(kernel)
    if template not in _TILED:
        return template
    block_m, block_n, _ = kernel.arguments[_TILE].split(", ")
    return f"{template} {block_m}x{block_n}"


def config_key(kernel: Kernel) -> str:
    """Template and configuration without the shape it is for."""
    template = template_of(kernel)
    if template not in _TILED:
        return template
    words = [kernel.arguments[i] for i in range(len(kernel.arguments)) if i != _DIMENSIONS]
    return f"{template} {' | '.join(words)}"


def compile_seconds(times: CompileTimes, kernel: Kernel) -> float:
    """Seconds of a compile alone on a node."""
    found = times.by_config.get(config_key(kernel), times.by_tile.get(tile_key(kernel)))
    if found is not None:
        return found
    base, slope = times.by_template.get(template_of(kernel), (times.default, 0.0))
    return base + slope * tile_elements(kernel) / 1024


def slowdown(times: CompileTimes, compilers: int, cores: int) -> float:
    """How much longer each of ``compilers`` compiles at a time takes on ``cores`` cores."""
    full = 1.0 + times.contention
    if compilers >= cores:
        return full * compilers / cores
    return 1.0 + times.contention * (compilers - 1) / max(cores - 1, 1)
