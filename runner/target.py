"""The options that name a target: the library, the GPU, and the machine that will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.cache.machine import Device, TargetMachine, device_here
from runner.cache.manifest import Manifest
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.errors import UserError
from runner.kernels.installed import LIBRARIES, Library, find_library
from runner.kernels.keys import CacheKeys
from runner.kernels.nvcc import OLDEST_RELEASE, find_nvcc, keys_for, nvcc_version, release_of
from runner.kernels.source import KernelSource, choose_source
from runner.kernels.table import KernelTable, RecordedTable
from runner.standin.gpus import GPUS, Gpu, gpu_named

_GPU_NAMES = ", ".join(gpu.name for gpu in GPUS)


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """The library whose kernels are meant, and the GPU."""

    library: str | None = option(
        None,
        OptionDetails(
            f"Library: {', '.join(LIBRARIES)}, or a deep_gemm folder.  [default: the "
            "installed one]",
            metavar="NAME|PATH",
        ),
    )
    gpu: str | None = option(
        None,
        OptionDetails(
            f"GPU that kernels are chosen for: {_GPU_NAMES}.  [default: --hardware's, else h200]",
            metavar="NAME",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class CompilerOptions:
    """The library's folder and the compiler of the machine that will run."""

    target_root: Path | None = option(
        None,
        OptionDetails(
            "The deep_gemm folder on the machine that will run; part of the keys up to "
            "sgl-deep-gemm 0.1.x.  [default: this machine's]",
            metavar="PATH",
        ),
    )
    cuda_version: str | None = option(
        None,
        OptionDetails(
            "CUDA release of that machine's nvcc; enough up to sgl-deep-gemm 0.1.x.  [default: "
            "the local nvcc's]",
            metavar="X.Y",
        ),
    )
    compiler_text: Path | None = option(
        None,
        OptionDetails(
            "File with what nvcc --version prints on that machine.  [default: what it prints here]",
            metavar="FILE",
        ),
    )

    def root(self) -> Path | None:
        """The folder, if one was given.

        Raises:
            UserError: it is not absolute.
        """
        if self.target_root is not None and not self.target_root.is_absolute():
            raise UserError(
                f"--target-root {self.target_root} must be an absolute path: it is part of the key"
            )
        return self.target_root

    def version_text(self, generation: int, environ: Environ) -> str | None:
        """What ``nvcc --version`` prints there; None if unknown.

        Raises:
            UserError: options that contradict each other, a release that is too old, or only a
                release where the keys of this JIT generation need the whole text.
        """
        if self.compiler_text is not None and self.cuda_version is not None:
            raise UserError("--compiler-text and --cuda-version both name the compiler: give one")
        if self.compiler_text is not None:
            return _read_compiler_text(self.compiler_text)
        release = None if self.cuda_version is None else check_release(self.cuda_version)
        if release is not None and generation == 1:
            return "NVCC{}.{}".format(*release)
        nvcc = find_nvcc(environ)
        here = None if nvcc is None else nvcc_version(nvcc)
        if release is not None and (here is None or release_of(here) != release):
            raise UserError(
                f"--cuda-version {self.cuda_version} is not enough: this library's keys include "
                "all that nvcc --version prints there; give it with --compiler-text FILE"
            )
        return here


@dataclass(frozen=True)
class Target:
    """The library, and the machine that its kernels are for.

    Attributes:
        gpu: the GPU.
        library: the library on this machine; None if there is none.
        root: its folder on the machine that will run; None if unknown.
        version_text: what ``nvcc --version`` prints there; None if unknown.
        source: says which kernels a GEMM needs.
    """

    gpu: Gpu
    library: Library | None
    root: Path | None
    version_text: str | None
    source: KernelSource

    @property
    def lacking(self) -> str:
        """Why cache keys cannot be computed; empty if they can."""
        if self.library is None and self.source.origin.generation == 1:
            return "deep_gemm's headers are missing: pip install --no-deps sgl-deep-gemm"
        if self.version_text is None:
            return (
                "there is no nvcc here: give --compiler-text FILE, with what nvcc --version prints "
                "on the machine that will run"
            )
        return ""

    def keys(self, table: KernelTable) -> CacheKeys:
        """Cache keys for the machine that will run.

        Raises:
            UserError: the library or the compiler is unknown.
        """
        if self.lacking or self.version_text is None:
            raise UserError(self.lacking)
        if self.library is not None:
            root = self.root or self.library.root
            return keys_for(self.library, table.recipe, self.version_text, root)
        assert isinstance(table, RecordedTable), "rules need the library's headers"
        return keys_for(table, table.recipe, self.version_text, self.root or Path())

    def describe(self, table: KernelTable) -> str:
        """The library and the compiler, on two lines."""
        compiler = (
            "not known" if self.version_text is None else _release_and_build(self.version_text)
        )
        return f"{table.origin.describe()}\ncompiler: {compiler}"


def target_of(
    wanted: LibraryOptions,
    gpu: Gpu,
    environ: Environ,
    *,
    compiler: CompilerOptions | None = None,
    ignore_installed: bool = False,
    ask: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """Find the library, GPU and machine that the options name.

    Args:
        wanted: the library.
        gpu: the GPU that kernels are chosen for.
        environ: variables that change the compiler's flags.
        compiler: the compiler of the machine that will run.
        ignore_installed: act as if no library were installed here.
        ask: ask the library even where its answer is already known.
        progress: called while the library is asked.

    Raises:
        UserError: options that contradict each other, a missing library, or unknown kernels.
    """
    name = None if ignore_installed else wanted.library
    library = None if ignore_installed else find_library(name)
    compiler = compiler or CompilerOptions()
    # Without a library the rules have no keys, and the shipped tables are second generation.
    generation = 2 if library is None else library.generation
    root, text = compiler.root(), compiler.version_text(generation, environ)
    source = choose_source(
        gpu, library or name, environ, version_text=text, always_ask=ask, progress=progress
    )
    return Target(gpu, library, root, text, source)


def cache_machine(
    compiler: CompilerOptions,
    environ: Environ,
    built: Manifest | None,
    *,
    library: str | None = None,
    gpu: str | None = None,
) -> tuple[TargetMachine | None, str]:
    """The machine that will use a cache, or None and the reason why it is not known.

    This machine supplies whatever the options leave out. Without ``library``, the one that the
    manifest names is tried first.

    Raises:
        UserError: a bad path or release.
    """
    root, found = compiler.root(), _servers_library(library, built)
    generation = found.generation if built is None and found else 1
    generation = built.generation if built is not None else generation
    text = compiler.version_text(generation, environ)
    if found is None:
        return None, f"there is no {library or 'deep_gemm'} here"
    if text is None:
        return None, "there is no nvcc here"
    device = device_here()
    if gpu is not None:
        named = gpu_named(gpu)
        device = Device((named.major, named.minor), named.num_sms)
    return TargetMachine(found, root or found.root, text, environ, device), ""


def _servers_library(wanted: str | None, built: Manifest | None) -> Library | None:
    """The library asked for, else the one that the cache was built for, else any installed one."""
    if wanted is None and built is not None:
        named = built.library.partition(" ")[0]
        found = find_library(named) if named in LIBRARIES else None
        if found is not None:
            return found
    return find_library(wanted)


def _read_compiler_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--compiler-text {file} cannot be read: {error}") from None
    try:
        named = release_of(text)
    except UserError as error:
        raise UserError(f"--compiler-text {file}: {error}") from None
    _check_age(named, "release {}.{} of ".format(*named) + f"--compiler-text {file}")
    return text


def check_release(text: str) -> tuple[int, int]:
    """Parse ``X.Y``, which must be a release that the library's flags work with."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise UserError(f"--cuda-version {text!r} must be X.Y, such as 13.0")
    release = int(major), int(minor)
    _check_age(release, f"--cuda-version {text}")
    return release


def _check_age(release: tuple[int, int], what: str) -> None:
    if release < OLDEST_RELEASE:
        oldest = "{}.{}".format(*OLDEST_RELEASE)
        raise UserError(f"{what} is too old: {oldest} or newer is needed")


def _release_and_build(version_text: str) -> str:
    """The lines of a compiler's version text that give its release and its build date."""
    lines = [line.strip() for line in version_text.splitlines() if line.strip()]
    known = [line for line in lines if "release" in line or line.startswith("Built on")]
    return "; ".join(known or lines)
