"""What makes kernels ready: the library's JIT and ours."""

from __future__ import annotations

from collections.abc import Sequence

from launch.loaders import LibraryJit, OwnJit
from runner.build.lazy import Found, LazyJit
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.types import DeepGemmKernelType, GemmShape, steps_of
from runner.schedule import Walk

DENSE = GemmShape(DeepGemmKernelType.GEMM_NT_F8F8BF16, 512, 512, 1, 132)
DENSE_WALK = Walk(DENSE, steps_of(range(1, 129)))


def test_the_librarys_walk_brings_in_what_it_calls() -> None:
    walked: list[Walk] = []
    jit = LibraryJit(lambda kernels: kernels, walked.append, RULES)
    brought = list(RULES.kernel_ranges(DENSE, range(1, 129)))
    assert jit.lacks(brought)
    jit.walk(DENSE_WALK)
    assert walked == [DENSE_WALK]
    assert not jit.lacks(brought)
    assert jit.lacks(kernels_of(DENSE.call(16384)))


def test_the_library_is_asked_for_new_kernels_only() -> None:
    asked: list[list[Kernel]] = []

    def call_each(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        asked.append(list(kernels))
        return kernels[:1]

    jit = LibraryJit(call_each, lambda walk: None, RULES)
    one, two, three = list(RULES.kernel_ranges(DENSE, range(1, 129)))[:3]
    jit.prepare([one])
    jit.load([one, two, three])
    assert asked == [[two, three]]
    assert not jit.lacks([one, two])
    assert jit.lacks([three]), "what did not fit is left to its first use"


class FakeJit(LazyJit):
    """Keeps what it is asked to make ready."""

    def __init__(self) -> None:
        self.made: list[Kernel] = []

    def is_loaded(self, kernel: Kernel) -> bool:
        return kernel in self.made

    def ensure(self, kernel: Kernel) -> Found:
        if kernel in self.made:
            return Found.MEMORY
        self.made.append(kernel)
        return Found.MISS


def test_our_own_walk_makes_each_kernel_ready_in_order_of_its_first_m() -> None:
    lazy = FakeJit()
    jit = OwnJit(lazy, RULES)
    brought = list(RULES.kernel_ranges(DENSE, range(1, 129)))
    assert jit.lacks(brought[:1])
    jit.walk(DENSE_WALK)
    jit.walk(DENSE_WALK)
    assert lazy.made == brought
    assert not jit.lacks(brought)
