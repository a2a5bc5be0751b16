"""A function that fails by its name for everything that the stand-in does not define."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from runner.standin.symbols import exported_functions

_NATIVE = Path(__file__).parent / "native"

# Functions of cuBLAS that work on plain structures of the host, or say what version it is.
_LEFT_REAL = re.compile(
    r"cublasLt(Matmul|MatrixTransform|Emulation)Desc"
    r"|cublasLtMatrixLayout|cublasLtMatmulPreference|cublasLtMatmulAlgo(Config|Cap)"
    r"|cublas(Lt)?(Logger|SetLoggerCallback|GetLoggerCallback)"
    r"|cublas(Lt)?Get(Version$|Property|CudartVersion|StatusName|StatusString)"
)
_STOOD_IN_FOR = re.compile(r"_*cuda[A-Z]\w*|cublas(Lt)?[A-Z]\w*")

_HEAD = """\
// Generated: one function for each name, which fails, unless the stand-in defines it.
#include "standin.h"

#define MISSING(name, status) \\
    static int missing_##name(void) { return missing(#name, status); } \\
    int name(void) __attribute__((weak, alias("missing_" #name)));

"""


def driver_names() -> tuple[str, ...]:
    """Every function of CUDA 13's driver, which no machine without a GPU has as a library."""
    return tuple((_NATIVE / "driver_names.txt").read_text().split())


def names_of(libraries: Iterable[Path]) -> tuple[str, ...]:
    """The functions of these libraries, and of the driver, that must not be reached.

    Raises:
        UserError: a library cannot be read.
    """
    found = {name for path in libraries for name in exported_functions(path)}
    kept = {name for name in found if _STOOD_IN_FOR.fullmatch(name) and not _LEFT_REAL.match(name)}
    return tuple(sorted(kept | set(driver_names())))


def stub_source(names: Iterable[str]) -> str:
    """C that defines each name weakly, so that a definition of the stand-in's own wins."""
    ordered = sorted(names)
    lines = [f"MISSING({name}, {_status(name)})" for name in ordered]
    rows = [f'    {{"{name}", missing_{name}}},' for name in ordered]
    table = ["", "const Stub standin_stubs[] = {", *rows, "};"]
    return _HEAD + "\n".join([*lines, *table, f"const int standin_stub_count = {len(rows)};", ""])


def _status(name: str) -> str:
    return "BLAS_NOT_SUPPORTED" if name.startswith("cublas") else "NOT_SUPPORTED"
