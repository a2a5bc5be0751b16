"""nvcc as DeepGEMM calls it: where it is, what keys hold of it, and single compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from runner.cache.entry import CUBIN, SOURCE
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys, Recipe
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Headers, Library
from runner.kernels.kernel import Kernel
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.types import DeepGemmKernelType, KernelCall

OLDEST_RELEASE = (12, 9)
"""The oldest nvcc whose flags are those that the library's current versions use."""

_RELEASE = re.compile(r"(?:release |NVCC)(\d+)\.(\d+)")
_REFERENCE = KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 128, 4096, 4096, 1, 132)


class CompileError(Exception):
    """nvcc refused a kernel; the text is the compiler's own."""


@dataclass(frozen=True)
class NvccCompiler:
    """Compiles kernels of one library for one GPU with one nvcc, or a recording shim around it."""

    nvcc: Path
    library: Library
    recipe: Recipe

    @cached_property
    def version_text(self) -> str:
        return nvcc_version(self.nvcc)

    @property
    def signature(self) -> str:
        return signature_of(self.version_text, self.recipe.generation)

    @property
    def arguments(self) -> list[str]:
        return self.recipe.arguments(self.library.include_path)

    @cached_property
    def keys(self) -> CacheKeys:
        return keys_for(self.library, self.recipe, self.version_text, self.library.root)

    def compile(self, source: str, folder: Path) -> bytes:
        """The cubin of a source; nvcc runs in ``folder``, and both files are left there."""
        source_path, cubin_path = folder.absolute() / SOURCE, folder.absolute() / CUBIN
        source_path.write_bytes(source.encode())
        command = [str(self.nvcc.absolute()), str(source_path), "-cubin", "-o", str(cubin_path)]
        done = subprocess.run(
            command + self.arguments, capture_output=True, text=True, cwd=folder, check=False
        )
        if done.returncode:
            raise CompileError((done.stderr or done.stdout).strip() or f"exit {done.returncode}")
        if not cubin_path.exists():
            raise CompileError("nvcc wrote no cubin")
        return cubin_path.read_bytes()

    def reference_seconds(self, repeats: int = 3) -> float:
        """How fast this machine compiles now: the median time of one always equal kernel.

        Machines of one type differ, and a shared one changes by the minute.
        """
        source = self.keys.source(kernels_of(_REFERENCE)[-1])
        found = []
        with tempfile.TemporaryDirectory(prefix="deepgemm-probe-") as folder:
            for _ in range(repeats):
                start = time.perf_counter()
                self.compile(source, Path(folder))
                found.append(time.perf_counter() - start)
        return median(found)


class LazyJit:
    """Kernels of one rank without a GPU: memory, else disk, else nvcc.

    As with the library, two processes that miss a kernel at the same time both compile it.
    """

    def __init__(self, compiler: NvccCompiler, cache: KernelCache) -> None:
        self._compiler, self._cache = compiler, cache
        self._loaded: set[Kernel] = set()

    def is_loaded(self, kernel: Kernel) -> bool:
        return kernel in self._loaded

    def ensure(self, kernel: Kernel) -> None:
        """Load the kernel, and compile it if neither memory nor disk has it."""
        if kernel in self._loaded:
            return
        keys = self._compiler.keys
        key, source = keys.cache_key(kernel), keys.source(kernel)
        if not self._cache.has(key):
            scratch = self._cache.root.absolute() / "tmp"
            scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                cubin = self._compiler.compile(source, Path(folder))
            self._cache.put(key, source, cubin, keys.extra_files, prefix="lazy-")
        # A real load reads the whole file; reading it here takes the time that a load takes.
        (self._cache.entry(key) / CUBIN).read_bytes()
        self._loaded.add(kernel)


def keys_for(library: Headers, recipe: Recipe, version_text: str, root: Path) -> CacheKeys:
    """Keys of a library for the machine where ``root`` is its folder and nvcc prints that text.

    Raises:
        UserError: the library's JIT is of another generation than the recipe.
    """
    if isinstance(library, Library) and library.generation != recipe.generation:
        raise UserError(
            f"{library.root} does not look like {library.title}: its compiled part (_C*.so) is "
            "missing or another version's; install it again"
        )
    signature = signature_of(version_text, recipe.generation)
    return CacheKeys(library, recipe, signature, root / "include")


def nvcc_version(nvcc: Path) -> str:
    """All that ``nvcc --version`` prints.

    Raises:
        UserError: not an nvcc, or one older than :data:`OLDEST_RELEASE`.
    """
    command = [str(nvcc.absolute()), "--version"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise UserError(f"{nvcc} cannot be run as nvcc: {error.strerror}") from None
    if not _RELEASE.search(text):
        raise UserError(f"{nvcc} --version names no release: is it nvcc?")
    major, minor = release_of(text)
    if (major, minor) < OLDEST_RELEASE:
        raise UserError(f"{nvcc} is release {major}.{minor}: 12.9 or newer is needed")
    return text


def signature_of(version_text: str, generation: int) -> str:
    """What a generation's keys hold of a compiler: ``NVCC<release>``, or the whole text."""
    return "NVCC{}.{}".format(*release_of(version_text)) if generation == 1 else version_text


def release_of(text: str) -> tuple[int, int]:
    """The CUDA release in a compiler's version text or signature (``NVCC13.0``).

    Raises:
        UserError: it names none.
    """
    match = _RELEASE.search(text)
    if not match:
        raise UserError(
            f"the compiler's text {text!r} names no CUDA release, such as NVCC13.0 or 'release "
            "13.0'"
        )
    return int(match[1]), int(match[2])


def require_nvcc(environ: Environ) -> Path:
    """The nvcc to use.

    Raises:
        UserError: there is none.
    """
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise UserError("there is no nvcc: pip install 'deepgemm-coldstart[nvcc]'")
    return nvcc


def find_nvcc(environ: Environ) -> Path | None:
    """The nvcc to use: DG_JIT_NVCC_COMPILER, CUDA_HOME, PATH, then the pip-installed toolkit.

    Raises:
        UserError: DG_JIT_NVCC_COMPILER is not a file.
    """
    if environ.dg_jit_nvcc_compiler:
        chosen = Path(environ.dg_jit_nvcc_compiler)
        if not chosen.is_file():
            raise UserError(f"DG_JIT_NVCC_COMPILER={chosen} is not a file: it must be nvcc")
        return chosen
    for home in (environ.cuda_home, environ.cuda_path):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc", path=environ.search_path or None)
    if on_path:
        return Path(on_path)
    folders = (Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib"))
    found = (folder / "nvidia" / "cu13" / "bin" / "nvcc" for folder in folders)
    return next((path for path in found if path.is_file()), None)
