"""Fixtures shared by all tests."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Library, find_library
from runner.kernels.keys import first_recipe
from runner.kernels.nvcc import find_nvcc

# Failed assertions in these helpers then show their values, as in test files.
for _helper in ("build_machine", "cache_cli", "kept_cache"):
    pytest.register_assert_rewrite(f"tests.unit.{_helper}")


def pytest_configure() -> None:
    """Restore SIGINT and SIGHUP, which background jobs of shells and nohup ignore.

    Processes started by tests would inherit that, and wait forever for a signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def library() -> Library:
    """The installed deep_gemm; skips if there is none."""
    try:
        found = find_library()
    except UserError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip("deep_gemm's headers are not installed (pip install sgl-deep-gemm)")
    return found


@pytest.fixture(scope="session")
def nvcc_compiler(library: Library) -> NvccCompiler:
    """A real nvcc with the library's headers; skips if either is missing."""
    environ = Environ(
        cuda_home=os.environ.get("CUDA_HOME", ""), search_path=os.environ.get("PATH", "")
    )
    nvcc = find_nvcc(environ)
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    compiler = NvccCompiler(nvcc, library, first_recipe(Environ()))
    try:
        assert compiler.signature
    except UserError as error:
        pytest.skip(str(error))
    return compiler


@pytest.fixture
def fake_library(tmp_path: Path) -> Library:
    """Three small headers in the layout of the package: a.cuh includes b.cuh."""
    headers = tmp_path / "deep_gemm" / "include" / "deep_gemm"
    headers.mkdir(parents=True)
    (headers / "a.cuh").write_text("#include <cuda.h>\n#include <deep_gemm/b.cuh>\nint a;\n")
    (headers / "b.cuh").write_text("int b;\n")
    (headers / "c.cuh").write_text("int c;\n")
    return Library(tmp_path / "deep_gemm", version="0.1.4.post1")


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """A script that answers ``--version`` as nvcc 13.0 and "compiles" by copying the source.

    It fails with code 3 if the source contains the word "broken".
    """
    path = tmp_path / "real-nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then\n'
        '    echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0\n'
        "fi\n"
        'if grep -q broken "$1"; then echo "error: it is broken" >&2; exit 3; fi\n'
        'cp "$1" "$4"\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on which ``flock`` does not work."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
