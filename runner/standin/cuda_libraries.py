"""The CUDA libraries of an interpreter's torch, found without importing torch."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from runner.errors import UserError

CUDA_MAJOR = 13
"""The only version whose structures the stand-in fills."""

_TOOLKIT = Path("/usr/local/cuda")

_FIND_PACKAGES = """
import importlib.util, json, sys
def folders(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or ()) if spec else []
print(json.dumps({"torch": folders("torch"), "nvidia": folders("nvidia"), "prefix": [sys.prefix]}))
"""


class CudaLibraries(NamedTuple):
    """What torch of one environment calls.

    Attributes:
        version: the version that torch was built with; 13000 is CUDA 13.0.
        paths: libcudart, and libcublas and libcublasLt if they are there.
    """

    version: int
    paths: tuple[Path, ...]


def find_cuda_libraries(python: Path, environment: Mapping[str, str]) -> CudaLibraries:
    """The CUDA libraries that torch of ``python`` calls.

    Raises:
        UserError: no torch there, one without CUDA, one for another CUDA, or no libcudart.
    """
    packages = _find_packages(python, environment)
    if not packages["torch"]:
        raise UserError(f"{python} has no torch: install one with CUDA {CUDA_MAJOR}")
    version = _cuda_version(packages["torch"][0], python)
    folders = _library_folders(packages, environment)
    paths = []
    for name in ("libcudart", "libcublas", "libcublasLt"):
        candidates = (folder / f"{name}.so.{CUDA_MAJOR}" for folder in folders)
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None:
            paths.append(path)
        elif name == "libcudart":
            raise UserError(
                f"{python} has torch, but no libcudart.so.{CUDA_MAJOR}: install nvidia-cuda-runtime"
            )
    return CudaLibraries(version, tuple(paths))


def _find_packages(python: Path, environment: Mapping[str, str]) -> dict[str, list[Path]]:
    command = [str(python), "-c", _FIND_PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}") from None
    try:
        found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{python} is no working Python: it ended with {done.returncode}") from None
    return {name: [Path(folder) for folder in folders] for name, folders in found.items()}


def _cuda_version(torch: Path, python: Path) -> int:
    """CUDA's version in torch's own version file."""
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
            f"torch of {python} is built for CUDA {match[1]}.{match[2]}: the stand-in GPU supports "
            f"only CUDA {CUDA_MAJOR}"
        )
    return 1000 * int(match[1]) + 10 * int(match[2])


def _library_folders(
    packages: Mapping[str, list[Path]], environment: Mapping[str, str]
) -> list[Path]:
    """Where the libraries may be: their own wheels, torch's, conda's, a toolkit's."""
    parts = (f"cu{CUDA_MAJOR}", "cuda_runtime", "cublas")
    wheels = [root / part / "lib" for part in parts for root in packages["nvidia"]]
    searched = [Path(text) for text in environment.get("LD_LIBRARY_PATH", "").split(":") if text]
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkits = [Path(home) / "lib64" for home in homes if home] + [_TOOLKIT / "lib64"]
    own = [packages["torch"][0] / "lib", packages["prefix"][0] / "lib"]
    return [*wheels, *own, *searched, *toolkits]
