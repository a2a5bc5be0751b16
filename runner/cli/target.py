"""The options that say whose kernels are meant: library, GPU, and the machine that will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from runner.build.compiler import OLDEST_RELEASE, find_nvcc, keys_for, nvcc_version, release_of
from runner.cache.keys import CacheKeys
from runner.cache.machine import Device, Machine, device_here
from runner.cache.manifest import Manifest
from runner.cli.common import F
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import LIBRARIES, Library, find_library
from runner.kernels.source import KernelSource, choose_source
from runner.kernels.table import KernelTable, RecordedTable
from runner.standin.gpus import DEFAULT_GPU, GPUS, Gpu, gpu_named
from sim.costs.profile import load_profile

_GPU_NAMES = ", ".join(gpu.name for gpu in GPUS)


def kernel_options(function: F) -> F:
    """``--library`` and ``--gpu``."""
    for option in (
        click.option(
            "--gpu",
            metavar="NAME",
            help=f"GPU that kernels are chosen for: {_GPU_NAMES}.  [default: --hardware's, else "
            "h200]",
        ),
        click.option(
            "--library",
            "library_name",
            metavar="NAME|PATH",
            help=f"Whose kernels: {', '.join(LIBRARIES)}, or a deep_gemm folder.  [default: the "
            "installed one]",
        ),
    ):
        function = option(function)
    return function


def machine_options(function: F) -> F:
    """``--target-root``, ``--cuda-version`` and ``--compiler-text``: the machine that will run."""
    for option in (
        click.option(
            "--compiler-text",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            metavar="FILE",
            help="What nvcc --version prints on that machine.  [default: what it prints here]",
        ),
        click.option(
            "--cuda-version",
            metavar="X.Y",
            help="CUDA release of that machine's nvcc; enough up to sgl-deep-gemm 0.1.x.  "
            "[default: this nvcc's]",
        ),
        click.option(
            "--target-root",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="The deep_gemm folder of the machine that will run; keys hold it up to "
            "sgl-deep-gemm 0.1.x.  [default: this machine's]",
        ),
    ):
        function = option(function)
    return function


@dataclass(frozen=True)
class Target:
    """Whose kernels, and for which machine.

    Attributes:
        gpu: the GPU.
        library: the library on this machine, None where there is none.
        root: its folder on the machine that will run, None where nobody knows.
        version_text: what ``nvcc --version`` prints there, None where nobody knows.
        source: tells which kernels a GEMM needs.
    """

    gpu: Gpu
    library: Library | None
    root: Path | None
    version_text: str | None
    source: KernelSource

    @property
    def lacking(self) -> str:
        """Why there are no cache keys; empty where there are."""
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
            UserError: no library or no compiler is known.
        """
        if self.lacking or self.version_text is None:
            raise UserError(self.lacking)
        if self.library is not None:
            root = self.root or self.library.root
            return keys_for(self.library, table.recipe, self.version_text, root)
        assert isinstance(table, RecordedTable), "rules need the library's headers"
        return keys_for(table, table.recipe, self.version_text, self.root or Path())

    def describe(self, table: KernelTable) -> str:
        """Whose kernels and keys these are, in two lines."""
        compiler = "not known" if self.version_text is None else _last_words(self.version_text)
        return f"{table.origin.describe()}\ncompiler: {compiler}"


def take_target(
    values: dict[str, Any],
    environ: Environ,
    *,
    ask: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """Take the options of this module, and the first of ``--num-sms``, out of ``values``.

    Raises:
        UserError: options that contradict each other, a library that is not there, or kernels
            that nobody knows.
    """
    gpu = _gpu(values)
    wanted = values.pop("library_name")
    library = find_library(wanted)
    root, release = values.pop("target_root", None), values.pop("cuda_version", None)
    if root is not None and not root.is_absolute():
        raise UserError(f"--target-root {root} must be an absolute path: the key holds it")
    # Without a library the rules have no keys, and tables that ship are of the second generation.
    generation = 2 if library is None else library.generation
    text = _version_text(values.pop("compiler_text", None), release, generation, environ)
    source = choose_source(
        gpu, library or wanted, environ, version_text=text, always_ask=ask, progress=progress
    )
    return Target(gpu, library, root, text, source)


def take_machine(
    values: dict[str, Any], environ: Environ, built: Manifest | None
) -> tuple[Machine | None, str]:
    """Take :func:`machine_options` out of ``values``: the machine, or None and why it is not known.

    What is not said is this machine's. A library of the manifest's name is looked for first.

    Raises:
        UserError: a bad path or release.
    """
    root, release = values.pop("target_root"), values.pop("cuda_version")
    if root is not None and not root.is_absolute():
        raise UserError(f"--target-root {root} must be an absolute path: the key holds it")
    wanted = values.pop("library_name", None)
    library = _servers_library(wanted, built)
    generation = library.generation if built is None and library else 1
    generation = built.generation if built is not None else generation
    text = _version_text(values.pop("compiler_text"), release, generation, environ)
    if library is None:
        return None, f"there is no {wanted or 'deep_gemm'} here"
    if text is None:
        return None, "there is no nvcc here"
    gpu = values.pop("gpu", None)
    device = device_here() if gpu is None else _device_of(gpu_named(gpu))
    return Machine(library, root or library.root, text, environ, device), ""


def _device_of(gpu: Gpu) -> Device:
    return Device((gpu.major, gpu.minor), gpu.num_sms)


def _servers_library(wanted: str | None, built: Manifest | None) -> Library | None:
    """The library that was asked for, else one of the name that a cache was built for, else any."""
    if wanted is None and built is not None:
        named = built.library.partition(" ")[0]
        found = find_library(named) if named in LIBRARIES else None
        if found is not None:
            return found
    return find_library(wanted)


def _gpu(values: dict[str, Any]) -> Gpu:
    """``--gpu``, else the one of ``--hardware`` where that names one, with ``--num-sms``."""
    counts = values.get("num_sms")
    name = values.pop("gpu") or _implied(values.get("hardware"))
    return gpu_named(name, max(counts) if counts else None)


def _implied(hardware: str | None) -> str:
    """The GPU of a profile: the one that it is named after, else h200 where its SMs agree.

    Raises:
        UserError: it is for another one.
    """
    names = {gpu.name for gpu in GPUS}
    if hardware is None or hardware in names:
        return hardware or DEFAULT_GPU
    profile = load_profile(hardware)
    if profile.name in names:
        return profile.name
    sms = gpu_named(DEFAULT_GPU).num_sms
    if profile.num_sms != sms:
        raise UserError(
            f"--hardware {hardware} has {profile.num_sms} SMs, and a {DEFAULT_GPU} has {sms}: say "
            f"with --gpu which GPU it is ({_GPU_NAMES})"
        )
    return DEFAULT_GPU


def _version_text(
    file: Path | None, release: str | None, generation: int, environ: Environ
) -> str | None:
    if file is not None and release is not None:
        raise UserError("--compiler-text and --cuda-version both name the compiler: give one")
    if file is not None:
        try:
            text = file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--compiler-text {file} cannot be read: {error}") from None
        named = release_of(text)
        _check_age(named, "release {}.{} of ".format(*named) + f"--compiler-text {file}")
        return text
    wanted = None if release is None else check_release(release)
    if wanted is not None and generation == 1:
        return "NVCC{}.{}".format(*wanted)
    nvcc = find_nvcc(environ)
    here = None if nvcc is None else nvcc_version(nvcc)
    if wanted is not None and (here is None or release_of(here) != wanted):
        raise UserError(
            f"--cuda-version {release} is not enough: this library's keys hold all that nvcc "
            "--version prints there; give that with --compiler-text FILE"
        )
    return here


def check_release(text: str) -> tuple[int, int]:
    """The numbers of ``X.Y``, which must be a release that the library's flags are made for."""
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


def _last_words(version_text: str) -> str:
    """The line of a compiler's text that tells its release, and the one that tells its build."""
    lines = [line.strip() for line in version_text.splitlines() if line.strip()]
    told = [line for line in lines if "release" in line or line.startswith("Built on")]
    return "; ".join(told or lines)
