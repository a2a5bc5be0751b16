"""The CUDA libraries of an interpreter's torch, found without importing torch."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError

CUDA_MAJOR = 13
"""The only version whose structures the stand-in fills."""

_TOOLKIT = Path("/usr/local/cuda")

_LOOK = """
import importlib.util, json, sys
def folders(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or ()) if spec else []
print(json.dumps({"torch": folders("torch"), "nvidia": folders("nvidia"), "prefix": [sys.prefix]}))
"""


@dataclass(frozen=True)
class CudaLibraries:
    """What torch of one environment would call.

    Attributes:
        version: 13000 for CUDA 13.0, the version that torch was built with.
        paths: libcudart, and libcublas and libcublasLt where they are found.
    """

    version: int
    paths: tuple[Path, ...]


def find_cuda_libraries(python: Path, environment: Mapping[str, str]) -> CudaLibraries:
    """The CUDA libraries that torch of ``python`` calls.

    Raises:
        UserError: no torch there, one without CUDA, one for another CUDA, or no libcudart.
    """
    found = _look(python, environment)
    if not found["torch"]:
        raise UserError(f"{python} has no torch: install one with CUDA {CUDA_MAJOR}")
    torch = Path(found["torch"][0])
    version = _cuda_version(torch, python)
    folders = _folders(torch, found, environment)
    runtime = _first(folders, f"libcudart.so.{CUDA_MAJOR}")
    if runtime is None:
        raise UserError(
            f"{python} has torch, and no libcudart.so.{CUDA_MAJOR}: install nvidia-cuda-runtime"
        )
    blas = (_first(folders, f"{name}.so.{CUDA_MAJOR}") for name in ("libcublas", "libcublasLt"))
    return CudaLibraries(version, (runtime, *(path for path in blas if path is not None)))


def _look(python: Path, environment: Mapping[str, str]) -> dict[str, list[str]]:
    try:
        done = subprocess.run(
            [str(python), "-c", _LOOK],
            capture_output=True,
            text=True,
            env=dict(environment),
            check=False,
        )
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}") from None
    try:
        found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{python} is no working Python: it ended with {done.returncode}") from None
    return found


def _cuda_version(torch: Path, python: Path) -> int:
    """CUDA's version as torch's own version file has it."""
    path = torch / "version.py"
    text = path.read_text() if path.is_file() else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    if match is None:
        raise UserError(
            f"torch of {python} is built without CUDA: install a build with it, or name a library "
            "whose tables ship (--library sgl-deep-gemm==0.2.5)"
        )
    if int(match[1]) != CUDA_MAJOR:
        raise UserError(
            f"torch of {python} is built for CUDA {match[1]}.{match[2]}: the stand-in GPU knows "
            f"CUDA {CUDA_MAJOR} alone"
        )
    return 1000 * int(match[1]) + 10 * int(match[2])


def _folders(
    torch: Path, found: Mapping[str, list[str]], environment: Mapping[str, str]
) -> list[Path]:
    """Where the libraries may be: wheels of their own, torch's, conda's, a toolkit's."""
    wheels = [Path(root) / f"cu{CUDA_MAJOR}" / "lib" for root in found["nvidia"]]
    for root in found["nvidia"]:
        wheels += [Path(root) / part / "lib" for part in ("cuda_runtime", "cublas")]
    searched = [Path(text) for text in environment.get("LD_LIBRARY_PATH", "").split(":") if text]
    named = [environment.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [*(Path(home) for home in named if home), _TOOLKIT]
    toolkits = [home / "lib64" for home in homes]
    return [*wheels, torch / "lib", Path(found["prefix"][0]) / "lib", *searched, *toolkits]


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
