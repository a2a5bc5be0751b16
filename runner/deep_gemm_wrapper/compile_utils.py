"""The execution hook around every entry point, keyed as SGLang keys its warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from runner.jit.kernel_type import DeepGemmKernelType


class KernelKey(NamedTuple):
    """What a warm-up is made for once: everything of a call but its M."""

    kernel_type: DeepGemmKernelType
    n: int
    k: int
    num_groups: int


class ExecutionHook:
    """Runs ``on_first_call`` before the first call of a key with M > 0.

    Warm-up policies that walk M lists hang themselves in here; the others leave it None.
    """

    def __init__(self, on_first_call: Callable[[KernelKey], None] | None = None) -> None:
        self._on_first_call = on_first_call
        self._initialised: set[KernelKey] = set()

    @contextmanager
    def deep_gemm_execution_hook(
        self, m: int, n: int, k: int, num_groups: int, kernel_type: DeepGemmKernelType
    ) -> Iterator[None]:
        """Wrap one call of an entry point."""
        key = KernelKey(kernel_type, n, k, num_groups)
        if m > 0 and key not in self._initialised:
            self._initialised.add(key)
            if self._on_first_call is not None:
                self._on_first_call(key)
        yield
