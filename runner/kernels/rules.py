"""The rules of one version of the library as a table: no library, no torch, any GEMM, any M."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from runner.config.environ import Environ
from runner.kernels.keys import Recipe, first_recipe
from runner.kernels.rules_sm90 import kernels_of, m_class_starts
from runner.kernels.table import Kernels, KernelTable, Origin, Part, Source, append_part
from runner.kernels.types import GemmShape, KernelCall

RULES_VERSION = "0.1.4.post1"
"""The version of sgl-deep-gemm that the rules were written for and checked against, on SM90."""

RULES_ARCH = "sm_90a"


@dataclass(frozen=True)
class RulesTable(KernelTable):
    """Our rules; they know every GEMM and every M."""

    origin: Origin
    recipe: Recipe

    def kernels_of(self, call: KernelCall) -> Kernels:
        return kernels_of(call)

    def parts(self, shape: GemmShape, ms: Sequence[int]) -> list[Part]:
        found: list[Part] = []
        starts = m_class_starts(shape.type, ms[-1]) if ms else ()
        edges = [*(bisect_left(ms, start) for start in starts), len(ms)]
        for low, high in pairwise(edges):
            if low < high:
                append_part(found, kernels_of(shape.call(ms[low])), low, high)
        return found

    def on(self, gpu: str, num_sms: int, recipe: Recipe) -> RulesTable:
        """The same rules on another Hopper GPU, compiled with other flags."""
        return RulesTable(replace(self.origin, gpu=gpu, num_sms=num_sms), recipe)


RULES = RulesTable(
    Origin(f"sgl-deep-gemm {RULES_VERSION}", 1, "h200", 132, RULES_ARCH, Source.RULES),
    first_recipe(Environ()),
)
"""The rules on an H200."""
