"""Building the stand-in GPU, and the environment in which a child runs on it."""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config.environ import cache_folder
from runner.errors import UserError
from runner.standin.cuda_libraries import find_cuda_libraries
from runner.standin.gpus import Gpu
from runner.standin.host_compiler import HostCompiler, find_host_compiler
from runner.standin.stubs import names_of, stub_source

MOST_DEVICES = 16
PREFIX = "DEEPGEMM_STANDIN_"
COMPILES = PREFIX + "COMPILES"
"""Names the file with a line a compile: the stand-in nvcc's arguments, split by \\x1f."""
FAILURES = PREFIX + "FAILURES"
"""Names the file with a line for each process and function that is not stood in."""

_NATIVE = Path(__file__).parent / "native"
_NVCC = _NATIVE / "nvcc.c"
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1")
_LIBRARY_FLAGS = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic-functions")


@dataclass(frozen=True)
class Built:
    """The two programs of one build.

    Attributes:
        root: the folder of both; it does for ``CUDA_HOME``.
    """

    root: Path

    @property
    def library(self) -> Path:
        """The GPU: before the runtime, and in the driver's place."""
        return self.root / "lib" / "libcuda.so.1"

    @property
    def nvcc(self) -> Path:
        """The compiler that compiles nothing."""
        return self.root / "bin" / "nvcc"


def standin_environment(
    gpu: Gpu,
    *,
    python: Path,
    environment: Mapping[str, str],
    version_text: str,
    work_dir: Path,
    devices: int = 1,
) -> dict[str, str]:
    """``environment`` with a stand-in GPU and a stand-in nvcc, for one child and its children.

    Args:
        gpu: what the child finds.
        python: the interpreter whose torch will run on it.
        environment: what the child would have got.
        version_text: what ``nvcc --version`` says, to the byte: it goes into cache keys.
        work_dir: where compiles and functions that are missing are written down.
        devices: how many such GPUs there are.

    Raises:
        UserError: no torch with CUDA 13, no C compiler, or a folder that cannot be written.
    """
    if not 1 <= devices <= MOST_DEVICES:
        raise UserError(f"{devices} devices: a stand-in has 1 to {MOST_DEVICES}")
    libraries = find_cuda_libraries(python, environment)
    built = build_standin(libraries.paths, environment)
    version_file = work_dir / "nvcc-version.txt"
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        version_file.write_bytes(version_text.encode())
    except OSError as error:
        raise UserError(f"cannot write {work_dir}: {error.strerror}") from None
    return {
        **environment,
        **_found_first(built, environment),
        **_numbers(gpu, devices, libraries.version),
        PREFIX + "VERSION_FILE": str(version_file.absolute()),
        COMPILES: str((work_dir / "compiles.txt").absolute()),
        FAILURES: str((work_dir / "failures.txt").absolute()),
        "DG_JIT_NVCC_COMPILER": str(built.nvcc),
        "DG_JIT_USE_NVRTC": "0",
    }


def _found_first(built: Built, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which loader, library and Triton find the stand-in."""

    def before(name: str, own: Path) -> str:
        old = environment.get(name, "")
        return f"{own}:{old}" if old else str(own)

    found = {
        "LD_PRELOAD": before("LD_PRELOAD", built.library),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", built.library.parent),
        "TRITON_LIBCUDA_PATH": str(built.library.parent),
    }
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if not home or not Path(home).is_dir():
        found["CUDA_HOME"] = str(built.root)  # the library insists on a folder
    return found


def _numbers(gpu: Gpu, devices: int, cuda_version: int) -> dict[str, str]:
    values = {
        "NAME": gpu.device_name,
        "MAJOR": gpu.major,
        "MINOR": gpu.minor,
        "SMS": gpu.sms,
        "SHARED_OPTIN": gpu.shared_optin,
        "SHARED_PER_SM": gpu.shared_per_sm,
        "L2": gpu.l2,
        "MEMORY": gpu.memory,
        "THREADS_PER_SM": gpu.threads_per_sm,
        "DEVICES": devices,
        "CUDA_VERSION": cuda_version,
    }
    return {PREFIX + name: str(value) for name, value in values.items()}


def build_standin(libraries: Sequence[Path], environment: Mapping[str, str]) -> Built:
    """The stand-in for these CUDA libraries, built unless the same was built before.

    Raises:
        UserError: no C compiler, one that fails, or a cache folder that cannot be written.
    """
    compiler = find_host_compiler(environment)
    stubs = stub_source(names_of(libraries))
    folder = _standin_folder(environment)
    root = folder / _digest(compiler, stubs)
    if not root.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _build(root, compiler, stubs)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from None
    return Built(root)


def _standin_folder(environment: Mapping[str, str]) -> Path:
    folder = cache_folder(environment) / "standin"
    if set(str(folder)) & set(" :"):
        raise UserError(
            f"{folder} has a space or colon, which LD_PRELOAD has no words for: set XDG_CACHE_HOME"
        )
    return folder.absolute()


def _sources() -> list[Path]:
    return sorted(path for path in _NATIVE.iterdir() if path.suffix in (".c", ".h"))


def _digest(compiler: HostCompiler, stubs: str) -> str:
    """Of everything that the programs follow from."""
    machine = " ".join((platform.machine(), *platform.libc_ver()))
    parts = [*compiler.command, compiler.version, machine, *_FLAGS, *_LIBRARY_FLAGS, stubs]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in (*_sources(), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _build(root: Path, compiler: HostCompiler, stubs: str) -> None:
    """Build aside and move into place; who comes second throws its own away."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=root.parent) as scratch:
        made = Built(Path(scratch) / "made")
        made.library.parent.mkdir(parents=True)
        made.nvcc.parent.mkdir()
        stub_path = Path(scratch) / "stubs.c"
        stub_path.write_text(stubs)
        parts = [path for path in _sources() if path.suffix == ".c" and path != _NVCC]
        sources = [str(path) for path in (*parts, stub_path)]
        linked = (f"-I{_NATIVE}", *sources, "-lpthread", "-ldl")
        compiler.build(*_FLAGS, *_LIBRARY_FLAGS, "-o", str(made.library), *linked)
        compiler.build(*_FLAGS, "-o", str(made.nvcc), str(_NVCC))
        (made.library.parent / "libnvidia-ml.so.1").symlink_to(made.library.name)
        try:
            made.root.rename(root)
        except OSError:
            if not root.is_dir():
                raise
