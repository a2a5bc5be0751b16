"""The machine that will run against the one that a cache was built for: what differs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.build.compiler import release_of, signature_of
from runner.cache.keys import INCLUDE, Recipe, with_variables
from runner.cache.manifest import Manifest
from runner.config.environ import Environ
from runner.kernels.installed import Library
from runner.standin.gpus import GPUS


@dataclass(frozen=True)
class Device:
    """A GPU by what chooses its kernels.

    Attributes:
        capability: its compute capability.
        num_sms: its SMs.
    """

    capability: tuple[int, int]
    num_sms: int


def device_here() -> Device | None:
    """The first GPU of this machine, as its driver has it; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    told = []
    for attribute in (_MAJOR, _MINOR, _SM_COUNT):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        told.append(value.value)
    return Device((told[0], told[1]), told[2])


_SM_COUNT, _MAJOR, _MINOR = 16, 75, 76
"""``CUdevice_attribute`` of cuda.h."""


@dataclass(frozen=True)
class Machine:
    """Where a server will look its kernels up.

    Attributes:
        library: its DeepGEMM.
        root: the folder of that library there.
        version_text: what ``nvcc --version`` prints there.
        environ: the variables that the server has.
        device: its GPU, None where it is not known.
    """

    library: Library
    root: Path
    version_text: str
    environ: Environ
    device: Device | None = None

    def recipe(self, built: Manifest) -> Recipe:
        """How the library compiles there, given how it compiled where the cache was built for."""
        flags = built.flags.split(" ")
        flags = [f"-I{INCLUDE}" if flag.startswith("-I") else flag for flag in flags]
        there = Recipe(built.generation, tuple(flags), built.extra_signature)
        return with_variables(there, self.environ)

    def differences(self, built: Manifest) -> Iterator[str]:
        """What keeps a server there from hitting a cache, each with what to do, in one line."""
        if built.library != self.library.title:
            yield (
                f"other library: built for {built.library}, and {self.library.title} looks for "
                "other kernels: build with that one (runner compile --library)"
            )
            return
        if self.environ.use_nvrtc or self.environ.dg_jit_use_nvrtc:
            yield (
                "other compiler: DG_JIT_USE_NVRTC is set, and these entries are nvcc's: unset it "
                "where the server runs"
            )
        signature = signature_of(self.version_text, built.generation)
        if signature != built.signature:
            yield (
                f"other compiler: built for {compiler_words(built.signature)}, here it is "
                f"{compiler_words(signature)}: runner cache relocate, or build with what nvcc "
                "--version prints there (runner compile --compiler-text)"
            )
        yield from self._path(built)
        if changed := self.changed_flags(built):
            yield (
                f"other compiler flags ({', '.join(changed)}): DG_JIT_* variables differ; set them "
                "as they were when it was built, or build it with them set"
            )
        yield from self._device(built)

    def _path(self, built: Manifest) -> Iterator[str]:
        theirs, here = _include_of(built.flags.split(" ")), str(self.root / "include")
        if built.generation == 1 and theirs != here:
            yield (
                f"other install path: built for {theirs}, here it is {here}: runner cache relocate "
                "--target-root"
            )

    def changed_flags(self, built: Manifest) -> list[str]:
        """Flags that the server's variables add or take away."""
        theirs = [flag for flag in built.flags.split(" ") if not flag.startswith("-I")]
        ours = [flag for flag in self.recipe(built).flags if not flag.startswith("-I")]
        return sorted(set(theirs) ^ set(ours))

    def _device(self, built: Manifest) -> Iterator[str]:
        if self.device is None:
            return
        named = next((gpu for gpu in GPUS if gpu.name == built.gpu), None)
        if named is not None and (named.major, named.minor) != self.device.capability:
            here = "{}.{}".format(*self.device.capability)
            yield (
                f"other GPU: built for {named.name} ({named.major}.{named.minor}), this one has "
                f"compute capability {here}: runner compile --gpu"
            )
        elif built.sm_counts and self.device.num_sms not in built.sm_counts:
            counts = ", ".join(map(str, sorted(built.sm_counts)))
            yield (
                f"other GPU: built for {counts} SMs, this one has {self.device.num_sms}: runner "
                "compile --gpu or --num-sms"
            )


def _include_of(flags: list[str]) -> str:
    return next((flag.removeprefix("-I") for flag in flags if flag.startswith("-I")), "")


def compiler_words(signature: str) -> str:
    """A compiler's signature in a few words: the second generation's has several lines."""
    release = "nvcc {}.{}".format(*release_of(signature))
    when = [line for line in signature.splitlines() if line.startswith("Built on")]
    return f"{release} ({when[0]})" if when else release
