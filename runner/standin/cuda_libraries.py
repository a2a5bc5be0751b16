"""Find the CUDA libraries of an interpreter's torch without importing it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from runner.errors import UserError

CUDA_MAJOR = 13
"""The only CUDA version that the stand-in supports."""

_TOOLKIT = Path("/usr/local/cuda")

_INSPECT = """
import importlib.util, json, pathlib, runpy, sys
def folders(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or ()) if spec else []
torch = folders("torch")
version = [pathlib.Path(folder, "version.py") for folder in torch]
cuda = runpy.run_path(version[0]).get("cuda") if version and version[0].is_file() else None
print(json.dumps([cuda, torch, folders("nvidia"), sys.prefix]))
"""


def find_cuda_libraries(python: Path, environment: Mapping[str, str]) -> tuple[int, list[Path]]:
    """The CUDA libraries that the torch of ``python`` uses.

    Returns:
        The CUDA version of torch (13000 is CUDA 13.0), and the paths of libcudart and, if they are
        there, of libcublas, libcublasLt and libnccl.

    Raises:
        UserError: no torch, a torch without CUDA or for another version, or no libcudart.
    """
    command = [str(python), "-c", _INSPECT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}") from None
    try:
        cuda, torch, nvidia, prefix = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{python} is not a working Python: exit {done.returncode}") from None
    if not torch:
        raise UserError(f"{python} has no torch: install one with CUDA {CUDA_MAJOR}")
    if not cuda:
        raise UserError(
            f"torch of {python} is built without CUDA: install one with CUDA, or give a library "
            "whose tables ship with this tool (--library sgl-deep-gemm==0.2.5)"
        )
    major, minor = map(int, cuda.split(".")[:2])
    if major != CUDA_MAJOR:
        raise UserError(
            f"torch of {python} is built for CUDA {cuda}: the stand-in GPU supports only CUDA "
            f"{CUDA_MAJOR}"
        )
    folders = _library_folders(torch[0], nvidia, prefix, environment)
    names = [f"{name}.so.{major}" for name in ("libcudart", "libcublas", "libcublasLt")]
    names.append("libnccl.so.2")
    paths = ([folder / name for folder in folders] for name in names)
    candidates = (next((path for path in each if path.is_file()), None) for each in paths)
    found = [path for path in candidates if path is not None]
    if not found or found[0].name != names[0]:
        raise UserError(f"{python} has torch, but no {names[0]}: install nvidia-cuda-runtime")
    return 1000 * major + 10 * minor, found


def _library_folders(
    torch: str, nvidia: list[str], prefix: str, environment: Mapping[str, str]
) -> list[Path]:
    """Folders that may have the libraries: of NVIDIA's wheels, torch, conda and CUDA toolkits."""
    parts = (f"cu{CUDA_MAJOR}", "cuda_runtime", "cublas", "nccl")
    wheels = [Path(root, part, "lib") for part in parts for root in nvidia]
    searched = [Path(text) for text in environment.get("LD_LIBRARY_PATH", "").split(":") if text]
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkits = [Path(home, "lib64") for home in homes if home] + [_TOOLKIT / "lib64"]
    return [*wheels, Path(torch, "lib"), Path(prefix, "lib"), *searched, *toolkits]
