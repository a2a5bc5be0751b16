"""Build the stand-in GPU, and make the environment in which a child process runs on it."""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from runner.config.environ import cache_folder
from runner.errors import UserError
from runner.standin.cuda_libraries import find_cuda_libraries
from runner.standin.gpus import Gpu

MOST_DEVICES = 16
PREFIX = "DEEPGEMM_STANDIN_"
COMPILES = PREFIX + "COMPILES"
"""Variable that names the file of compiles: one line each, nvcc's arguments separated by \\x1f."""
FAILURES = PREFIX + "FAILURES"
"""Variable that names the file of failed calls: one line per process and missing function."""

LIBRARY, NVCC = "lib/libcuda.so.1", "bin/nvcc"
"""The two files of a build, whose folder can serve as ``CUDA_HOME``: the GPU, a library that is
loaded before CUDA's runtime in place of the driver, and an nvcc that compiles nothing."""

_COMPILES_FILE = "compiles.txt"
_NATIVE = Path(__file__).parent / "native"
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1")
_CUTE_DSL_WRAPPERS = (
    "cudaDeviceGetAttribute cudaDeviceSynchronize cudaEventCreate cudaEventDestroy "
    "cudaEventElapsedTime cudaEventRecord cudaFree cudaFreeAsync cudaFreeHost cudaFuncSetAttribute "
    "cudaGetDevice cudaGetDeviceCount cudaGetDeviceProperties cudaGraphDestroy "
    "cudaGraphExecDestroy cudaGraphInstantiate cudaGraphLaunch cudaKernelSetAttributeForDevice "
    "cudaLaunchKernel cudaLibraryGetGlobal cudaLibraryGetKernel cudaLibraryGetKernelCount "
    "cudaLibraryLoadData cudaLibraryLoadFromFile cudaLibraryUnload cudaMalloc cudaMallocAsync "
    "cudaMallocHost cudaMallocManaged cudaMemcpy cudaMemcpyAsync cudaMemset cudaMemsetAsync "
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor cudaSetDevice cudaStreamBeginCapture "
    "cudaStreamCreate cudaStreamDestroy cudaStreamEndCapture cudaStreamSynchronize "
    "cudaStreamWaitEvent cuDeviceGet cuKernelGetAttribute cuLibraryGetGlobal cuLibraryGetKernel "
    "cuLibraryGetKernelCount cuLibraryGetModule cuLibraryLoadData cuLibraryLoadFromFile "
    "cuLibraryUnload cuTensorMapEncodeTiled"
)
_ALIASES = [
    "-Wl,--defsym=_cudaLaunchKernelEx=cudaLaunchKernelExC",
    *(f"-Wl,--defsym=_{name}={name}" for name in _CUTE_DSL_WRAPPERS.split()),
]
"""CuTe-DSL's runtime exports wrappers of CUDA's functions: ours replace them."""
_LIBRARY_FLAGS = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic-functions")


def standin_environment(
    gpu: Gpu,
    *,
    environment: Mapping[str, str],
    version_text: str,
    work_dir: Path,
    python: Path = Path(sys.executable),
    devices: int = 1,
) -> dict[str, str]:
    """``environment`` with a stand-in GPU and nvcc, for a child process and its children.

    Args:
        version_text: exact output of ``nvcc --version``; it is part of cache keys.
        work_dir: folder for the records of compiles and of calls to missing functions.
        python: the interpreter whose torch will run on the stand-in.

    Raises:
        UserError: no torch with CUDA 13, no C compiler, or a cache folder that cannot be written.
    """
    cuda_version, libraries = find_cuda_libraries(python, environment)
    root = build_standin(libraries, environment)
    version_file = work_dir / "nvcc-version.txt"
    version_file.write_bytes(version_text.encode())
    return {
        **environment,
        **_loader_variables(root, environment),
        **_gpu_variables(gpu),
        PREFIX + "DEVICES": str(devices),
        PREFIX + "CUDA_VERSION": str(cuda_version),
        PREFIX + "VERSION_FILE": str(version_file.absolute()),
        COMPILES: str((work_dir / _COMPILES_FILE).absolute()),
        FAILURES: str((work_dir / "failures.txt").absolute()),
        "DG_JIT_NVCC_COMPILER": str(root / NVCC),
        "DG_JIT_USE_NVRTC": "0",
    }


def _gpu_variables(gpu: Gpu) -> dict[str, str]:
    values = {PREFIX + name.upper(): str(value) for name, value in asdict(gpu).items()}
    return {
        **values,
        PREFIX + "NAME": gpu.device_name,
        PREFIX + "SMS": str(gpu.num_sms),
    }


def read_compiles(work_dir: Path) -> list[list[str]]:
    """The arguments of each call to the stand-in nvcc."""
    path = work_dir / _COMPILES_FILE
    lines = path.read_bytes().decode().splitlines() if path.is_file() else []
    return [line.split("\x1f")[1:] for line in lines]


def _loader_variables(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables through which the loader, the library and Triton find the stand-in."""
    library = root / LIBRARY
    found = {"TRITON_LIBCUDA_PATH": str(library.parent)}
    # Servers also open NCCL by its file.
    found |= dict.fromkeys(("SGLANG_NCCL_SO_PATH", "VLLM_NCCL_SO_PATH"), str(library))
    for name, own in (("LD_PRELOAD", library), ("LD_LIBRARY_PATH", library.parent)):
        old = environment.get(name)
        found[name] = f"{own}:{old}" if old else str(own)
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if not home or not Path(home).is_dir():
        found["CUDA_HOME"] = str(root)  # The library requires an existing folder.
    return found


def build_standin(libraries: Sequence[Path], environment: Mapping[str, str]) -> Path:
    """Folder of the stand-in for these CUDA libraries; builds it if it is not there yet."""
    compiler = _find_compiler(environment)
    version = _run([*compiler, "--version"], environment).stdout
    stubs = stub_source(names_to_stub(libraries))
    folder = (cache_folder(environment) / "standin").absolute()
    if set(str(folder)) & set(" :"):
        raise UserError(
            f"{folder} has a space or colon, which LD_PRELOAD does not allow: set XDG_CACHE_HOME"
        )
    root = folder / _digest([*compiler, version, stubs])
    if not root.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _build(root, compiler, stubs, environment)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from None
    return root


def _digest(parts: Sequence[str]) -> str:
    """Digest of everything that goes into the build."""
    machine = " ".join((platform.machine(), *platform.libc_ver()))
    digest = hashlib.sha256("\0".join([*parts, machine]).encode())
    for path in (*sorted(_NATIVE.glob("*.[ch]")), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _build(root: Path, compiler: Sequence[str], stubs: str, environment: Mapping[str, str]) -> None:
    """Build in a temporary folder and move it into place; if two processes do, the first wins."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=root.parent) as scratch:
        stub_path, made = Path(scratch) / "stubs.c", Path(scratch) / "made"
        stub_path.write_text(stubs)
        nvcc = _NATIVE / "nvcc.c"
        sources = [*sorted(set(_NATIVE.glob("*.c")) - {nvcc}), stub_path]
        for program, arguments in (
            (LIBRARY, [*_LIBRARY_FLAGS, *_ALIASES, f"-I{_NATIVE}", *sources, "-lpthread", "-ldl"]),
            (NVCC, [nvcc]),
        ):
            (made / program).parent.mkdir(parents=True)
            words = [*_FLAGS, "-o", made / program, *arguments]
            done = _run([*compiler, *map(str, words)], environment)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                why = said[0] if said else f"exit {done.returncode}"
                raise UserError(f"{compiler[0]} cannot build the stand-in GPU: {why}")
        (made / LIBRARY).with_name("libnvidia-ml.so.1").symlink_to(Path(LIBRARY).name)
        try:
            made.rename(root)
        except OSError:
            if not root.is_dir():
                raise


def _find_compiler(environment: Mapping[str, str]) -> list[str]:
    """The command ``$CC``, else cc, gcc or clang, with its arguments."""
    named = environment.get("CC", "")
    try:
        chosen = shlex.split(named)
    except ValueError as error:
        raise UserError(f"CC={named} is not a command ({error}): unset CC") from None
    for name in chosen[:1] or ("cc", "gcc", "clang"):
        program = shutil.which(name, path=environment.get("PATH"))
        if program is not None:
            return [program, *chosen[1:]]
    if chosen:
        raise UserError(f"CC={named} is not a program: unset CC or set it to a C compiler")
    raise UserError("the stand-in GPU needs a C compiler: apt-get install gcc")


def _run(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# -- functions that the stand-in does not define: each fails and reports its name -----------------

_DRIVER_NAMES = _NATIVE / "driver_names.txt"
"""All functions of CUDA 13's driver, listed here because its library needs a machine with a GPU."""

# cuBLAS functions that only use host memory, or return its version: these are not replaced.
_LEFT_REAL = re.compile(
    r"cublasLt(Matmul|MatrixTransform|Emulation)Desc"
    r"|cublasLtMatrixLayout|cublasLtMatmulPreference|cublasLtMatmulAlgo(Config|Cap)"
    r"|cublas(Lt)?(Logger|SetLoggerCallback|GetLoggerCallback)"
    r"|cublas(Lt)?Get(Version$|Property|CudartVersion|StatusName|StatusString)"
)
_STUBBED = re.compile(r"_*cuda[A-Z]\w*|cublas(Lt)?[A-Z]\w*|nccl[A-Z]\w*")
_NM_FUNCTION = re.compile(r"^(\w+)\S* [TWi] ", re.MULTILINE)

_HEAD = """\
// Generated: one function for each name, which fails unless the stand-in defines it.
#include "standin.h"

#define MISSING(name, status) \\
    static int missing_##name(void) { return missing(#name, status); } \\
    int name(void) __attribute__((weak, alias("missing_" #name)));

"""


def names_to_stub(libraries: Iterable[Path]) -> list[str]:
    """Functions of these libraries, and of the driver, that must not be called for real."""
    found = {name for path in libraries for name in exported_functions(path)}
    kept = {name for name in found if _STUBBED.fullmatch(name) and not _LEFT_REAL.match(name)}
    return sorted(kept.union(_DRIVER_NAMES.read_text().split()))


def exported_functions(path: Path) -> list[str]:
    """Names of the functions that a shared library exports.

    Raises:
        UserError: the library cannot be read, or there is no ``nm``.
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
