"""Call an entry point with every M of a list: for a warm-up's walk, or to ask the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch

from runner.deep_gemm_wrapper.calls import MASKED_ROWS, make_call
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.deep_gemm_wrapper.replay import replay_call
from runner.kernels.call_template import CallShape
from runner.kernels.kernel import Kernel
from runner.kernels.types import MASKED_TYPES, GemmShape, expand
from runner.schedule import Walk

COMPILE_ONLY = 1
"""The library's mode in which a call compiles its kernel but does not launch it."""


@contextmanager
def compile_only(library: ModuleType) -> Iterator[None]:
    """Make calls inside the block only compile, then restore the previous mode, even on error.

    Builds that lack ``get_compile_mode`` or ``set_compile_mode`` (``sgl-deep-gemm`` 0.1.4.post1
    has neither) still launch, so a walk always has to pass real buffers.
    """
    if not (hasattr(library, "get_compile_mode") and hasattr(library, "set_compile_mode")):
        yield
        return
    before = library.get_compile_mode()
    library.set_compile_mode(COMPILE_ONLY)
    try:
        yield
    finally:
        library.set_compile_mode(before)


def walk(
    wrapper: DeepGemmWrapper,
    shape: GemmShape | CallShape,
    ms: Sequence[int],
    after_call: Callable[[int], None] = lambda m: None,
    masked_rows: int = MASKED_ROWS,
) -> None:
    """Call the GEMM with each M of ``ms`` (ascending), and ``after_call`` after each.

    A masked GEMM's M is the expected rows per group; its buffers have ``masked_rows`` per group.
    """
    if not ms:
        return
    with wrapper.configure_deep_gemm_num_sms(shape.num_sms), torch.inference_mode():
        if isinstance(shape, CallShape):
            call = replay_call(wrapper.library, shape.template, ms[-1])
        else:
            most = masked_rows if shape.type in MASKED_TYPES else ms[-1]
            call = make_call(wrapper, shape, most)
        for m in ms:
            call(m)
            after_call(m)
        torch.cuda.synchronize()


def walk_list(wrapper: DeepGemmWrapper, op: Walk) -> None:
    """Do a warm-up's walk, with the same buffers as upstream's executors.

    If the library can compile without launching, the walk only compiles.
    """
    ms = expand(op.steps)
    with compile_only(wrapper.library):
        walk(wrapper, op.shape, ms, masked_rows=ms[-1])
    torch.cuda.empty_cache()


def call_each(
    wrapper: DeepGemmWrapper, calls: Iterable[tuple[Kernel, GemmShape | CallShape, int]]
) -> list[Kernel]:
    """Call each kernel once, through a GEMM and M that use it, so that the library loads it.

    GEMMs whose buffers do not fit in the GPU's free memory are skipped; they load at first use.

    Returns:
        The kernels that were called.
    """
    called = []
    by_shape: dict[GemmShape | CallShape, dict[int, list[Kernel]]] = {}
    for kernel, shape, m in calls:
        by_shape.setdefault(shape, {}).setdefault(m, []).append(kernel)
    for shape, by_m in by_shape.items():
        try:
            walk(wrapper, shape, sorted(by_m))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        called += [kernel for found in by_m.values() for kernel in found]
    torch.cuda.empty_cache()
    return called
