"""Small hand-made kernel tables."""

from runner.kernels.kernel import Kernel
from runner.kernels.keys import Recipe
from runner.kernels.table import Origin, RecordedTable, Run, Source
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 148)
GROUPED = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 64, 128, 4, 148)
RECIPE = Recipe(2, ("-std=c++20", "--gpu-architecture=sm_100f"), "extra", '{"a": 1}')
ORIGIN = Origin("dg 1", 2, "b200", 148, "sm_100f", Source.LIBRARY)
A, B, C = (Kernel(name, "deep_gemm/a.cuh", f"{name}_impl", ("1",)) for name in "abc")

Runs = list[tuple[int, int, tuple[Kernel, ...]]]


def table(runs: Runs, shape: GemmShape = DENSE) -> RecordedTable:
    return RecordedTable(ORIGIN, RECIPE, {shape: tuple(Run(*run) for run in runs)})


def values(made: RecordedTable) -> tuple[object, ...]:
    """A table's content, because tables compare by identity."""
    return made.origin, made.recipe, dict(made.runs), dict(made.headers)
