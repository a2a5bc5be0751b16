"""Whether DeepGEMM can be used here, and the environment it reads when it is imported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from runner.errors import UserError


def check_capability(capability: tuple[int, int]) -> None:
    """Raise UserError where DeepGEMM cannot run on this GPU."""
    if capability[0] != 9:
        raise UserError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}: only 9.x (Hopper) "
            "is supported; use --device cpu"
        )


def import_library(root: Path) -> ModuleType:
    """Import the ``deep_gemm`` package of the folder ``root``, which may be vLLM's copy.

    Raises:
        UserError: Python finds another one.
    """
    sys.path.insert(0, str(root.parent))
    try:
        found = importlib.import_module("deep_gemm")
    finally:
        sys.path.remove(str(root.parent))
    if not Path(found.__file__ or "").parent.samefile(root):
        raise UserError(
            f"{root} cannot be imported, Python has {found.__file__}: a library's folder must be "
            "named deep_gemm"
        )
    return found


def import_deep_gemm(root: Path, *, cache_dirs: str, nvcc: Path, pdl: bool) -> ModuleType:
    """Import the library of ``root``; it caches in ``cache_dirs`` and compiles with ``nvcc``.

    The library reads these variables of its process's environment at its first compile, so they
    have to be set there; nothing else of the environment is touched.
    """
    os.environ["DG_JIT_CACHE_DIR"] = cache_dirs
    os.environ["DG_JIT_NVCC_COMPILER"] = str(nvcc)
    os.environ["DG_JIT_USE_NVRTC"] = "0"
    deep_gemm = import_library(root)
    if pdl and hasattr(deep_gemm, "set_pdl"):
        deep_gemm.set_pdl(True)
    return deep_gemm
