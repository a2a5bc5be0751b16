"""A function that fails by its name for everything that the stand-in does not define."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from runner.errors import UserError

_DRIVER_NAMES = Path(__file__).parent / "native" / "driver_names.txt"
"""Every function of CUDA 13's driver, whose library exists only on machines with a GPU."""

# Functions of cuBLAS that work on plain structures of the host, or return its version.
_LEFT_REAL = re.compile(
    r"cublasLt(Matmul|MatrixTransform|Emulation)Desc"
    r"|cublasLtMatrixLayout|cublasLtMatmulPreference|cublasLtMatmulAlgo(Config|Cap)"
    r"|cublas(Lt)?(Logger|SetLoggerCallback|GetLoggerCallback)"
    r"|cublas(Lt)?Get(Version$|Property|CudartVersion|StatusName|StatusString)"
)
_STUBBED = re.compile(r"_*cuda[A-Z]\w*|cublas(Lt)?[A-Z]\w*")
_NM_FUNCTION = re.compile(r"^(\w+)\S* [TWi] ", re.MULTILINE)

_HEAD = """\
// Generated: one function for each name, which fails, unless the stand-in defines it.
#include "standin.h"

#define MISSING(name, status) \\
    static int missing_##name(void) { return missing(#name, status); } \\
    int name(void) __attribute__((weak, alias("missing_" #name)));

"""


def names_to_stub(libraries: Iterable[Path]) -> list[str]:
    """Functions of these libraries, and of the driver, that must not be reached."""
    found = {name for path in libraries for name in exported_functions(path)}
    kept = {name for name in found if _STUBBED.fullmatch(name) and not _LEFT_REAL.match(name)}
    return sorted(kept.union(_DRIVER_NAMES.read_text().split()))


def exported_functions(path: Path) -> list[str]:
    """Names of the functions that a shared library defines for others.

    Raises:
        UserError: not a readable library, or no ``nm`` to read it with.
    """
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError:
        raise UserError("the stand-in GPU needs nm: apt-get install binutils") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip() or f"nm ended with {error.returncode}"
        raise UserError(f"{path} is not a shared library: {why}") from None
    return _NM_FUNCTION.findall(done.stdout)


def stub_source(names: Iterable[str]) -> str:
    """C that defines each name weakly, so that the stand-in's own definitions win."""
    lines, rows = [], []
    for name in sorted(names):
        status = "BLAS_NOT_SUPPORTED" if name.startswith("cublas") else "NOT_SUPPORTED"
        lines.append(f"MISSING({name}, {status})")
        rows.append(f'    {{"{name}", missing_{name}}},')
    table = ["", "const Stub standin_stubs[] = {", *rows, "};"]
    return _HEAD + "\n".join([*lines, *table, f"const int standin_stub_count = {len(rows)};", ""])
