"""The real library behind its wrapper, imported once per process."""

from __future__ import annotations

import os
from functools import cache

from runner.config.environ import Environ
from runner.kernels.installed import find_library
from runner.kernels.nvcc import find_nvcc


@cache
def real_wrapper():  # type: ignore[no-untyped-def]
    """A ``DeepGemmWrapper`` with the cache and compiler that the environment names."""
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper, import_deep_gemm

    environ = Environ.read(os.environ)
    nvcc = find_nvcc(environ)
    assert nvcc is not None
    library = find_library()
    assert library is not None
    lib = import_deep_gemm(library.root, cache_dirs=environ.jit_cache_dirs, nvcc=nvcc, pdl=False)
    return DeepGemmWrapper(lib)
