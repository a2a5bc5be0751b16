"""Calls that compile their kernels and launch none, where the library can do that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

COMPILE_ONLY = 1
"""The library's mode in which a call compiles its kernel and does not launch it."""


@contextmanager
def compile_only(library: ModuleType) -> Iterator[None]:
    """Let calls inside the block only compile; the mode before comes back, also after an error.

    Builds that lack ``get_compile_mode`` or ``set_compile_mode`` (``sgl-deep-gemm`` 0.1.4.post1
    has neither) launch as ever, so a walk has to hand real buffers over either way.

    Args:
        library: the imported ``deep_gemm``; the mode is one for the whole process.
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
