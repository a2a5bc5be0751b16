"""Lazy JIT without a GPU: memory, else disk, else nvcc, as the library does at a first use."""

from __future__ import annotations

from enum import Enum

from runner.build.compiler import NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.kernels.kernel import Kernel


class Found(Enum):
    """Where a kernel was found; ``MISS`` means that it was compiled."""

    MEMORY = "memory"
    DISK = "disk"
    MISS = "miss"


class LazyJit:
    """In-memory kernel table of one rank in front of a disk cache and a compiler.

    Two processes that miss the same kernel at the same time both compile it, as with the library.
    """

    def __init__(self, compiler: NvccCompiler, cache: KernelCache) -> None:
        self._compiler = compiler
        self._cache = cache
        self._keys: dict[Kernel, str] = {}

    def is_loaded(self, kernel: Kernel) -> bool:
        """Whether the kernel is in memory."""
        return kernel in self._keys

    def ensure(self, kernel: Kernel) -> Found:
        """Make the kernel available, compiling it where neither memory nor disk has it.

        Raises:
            runner.build.compiler.CompileError: nvcc refused the kernel.
        """
        if kernel in self._keys:
            return Found.MEMORY
        key = self._compiler.keys.cache_key(kernel)
        found = Found.DISK
        if not self._cache.has(key):
            found = Found.MISS
            keys = self._compiler.keys
            source, extra = keys.source(kernel), keys.extra_files
            self._cache.add(key, source, self._compiler.compile, extra=extra)
        # A real load reads the whole file; so does this, to pay what a load pays.
        (self._cache.entry(key) / "kernel.cubin").read_bytes()
        self._keys[kernel] = key
        return found
