"""Compare a cache with the machine that will run it, and relocate it to another machine.

The first generation's keys digest the include path, so a cache built for one path misses at
another although the kernels are the same. An entry may get a new key if the headers' digest in its
source is the target's and the target's CUDA release is not older than the one that built it: a
driver loads what older compilers made, but not necessarily what newer ones made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, describe_entry
from runner.cache.verify import Expectation, Finding, verify
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.entry import CUBIN, SOURCE
from runner.kernels.installed import Library
from runner.kernels.keys import FIRST_RECIPE, CacheKeys, Recipe, with_variables
from runner.kernels.nvcc import keys_for, release_of, signature_of
from runner.standin.gpus import GPUS

_MAJOR, _MINOR, _SM_COUNT = 75, 76, 16
"""``CUdevice_attribute`` of cuda.h."""


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that decide which kernels it runs."""

    capability: tuple[int, int]
    num_sms: int


def device_here() -> Device | None:
    """The first GPU of this machine, as its driver reports it; None if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    values = []
    for attribute in (_MAJOR, _MINOR, _SM_COUNT):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        values.append(value.value)
    return Device((values[0], values[1]), values[2])


@dataclass(frozen=True)
class TargetMachine:
    """The machine on which a server will look for a cache's kernels.

    Attributes:
        library: the server's DeepGEMM, as installed here.
        root: the library's folder on that machine.
        version_text: what ``nvcc --version`` prints there.
        environ: the server's environment variables.
        device: the GPU; None if unknown.
    """

    library: Library
    root: Path
    version_text: str
    environ: Environ
    device: Device | None = None

    def recipe(self, built: Manifest | None) -> Recipe:
        """How the library compiles there; without a manifest, the first generation's way."""
        return with_variables(built.recipe if built else FIRST_RECIPE, self.environ)

    def keys(self, built: Manifest | None) -> CacheKeys:
        return keys_for(self.library, self.recipe(built), self.version_text, self.root)

    def changed_flags(self, built: Manifest) -> list[str]:
        """Flags that the server's variables add or remove."""
        return sorted(set(built.recipe.flags) ^ set(self.recipe(built).flags))

    def differences(self, built: Manifest) -> Iterator[str]:
        """Each reason why a server there would miss the cache, and the remedy, on one line."""
        if built.library != self.library.title:
            yield (
                f"other library: built for {built.library}, but {self.library.title} needs other "
                "kernels: build for that one (runner compile --library)"
            )
            return
        if self.environ.use_nvrtc or self.environ.dg_jit_use_nvrtc:
            yield (
                "other compiler: DG_JIT_USE_NVRTC is set, but nvcc built these entries: unset it "
                "where the server runs"
            )
        signature = signature_of(self.version_text, built.generation)
        if signature != built.signature:
            yield (
                f"other compiler: built for {compiler_words(built.signature)}, here it is "
                f"{compiler_words(signature)}: runner cache relocate, or build for the nvcc "
                "there (runner compile --compiler-text)"
            )
        here = str(self.root / "include")
        if built.generation == 1 and built.include_path != here:
            yield (
                f"other install path: built for {built.include_path}, here it is {here}: runner "
                "cache relocate --target-root"
            )
        if changed := self.changed_flags(built):
            yield (
                f"other compiler flags ({', '.join(changed)}): DG_JIT_* variables differ; set them "
                "as they were at build time, or rebuild the cache with them"
            )
        yield from self._other_gpu(built)

    def _other_gpu(self, built: Manifest) -> Iterator[str]:
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


def compiler_words(signature: str) -> str:
    """A compiler's signature in a few words; the second generation's has several lines."""
    release = "nvcc {}.{}".format(*release_of(signature))
    when = [line for line in signature.splitlines() if line.startswith("Built on")]
    return f"{release} ({when[0]})" if when else release


def relocate(
    source: KernelCache,
    manifest: Manifest,
    keys: CacheKeys,
    library: Library,
    target: KernelCache,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Manifest, int, list[Finding]]:
    """Copy every intact entry of ``source`` to ``target`` under another machine's keys.

    Args:
        manifest: what ``source`` was built for.
        keys: cache keys of the machine that will run.
        library: that machine's library, whose headers the sources must name.
        target: the cache to copy to; not ``source`` itself.
        progress: called with (entries done, entries in total).

    Returns:
        The manifest of these entries as they now are in ``target``, how many were placed, and why
        others were refused.

    Raises:
        UserError: the target's compiler is older than the one that built the cache.
    """
    built, wanted = release_of(manifest.built_with), release_of(keys.signature)
    if wanted < built:
        raise UserError(
            f"the cache was built with CUDA {built[0]}.{built[1]} and cannot move to CUDA "
            f"{wanted[0]}.{wanted[1]}: a driver may not load what a newer compiler made; build "
            f"it with nvcc {wanted[0]}.{wanted[1]}"
        )
    named = manifest.entries
    refused = verify(source, Expectation(named, named, manifest.keys(library), library, manifest))
    unsound = {finding.key for finding in refused}
    sound = [key for key in named if key not in unsound]
    entries, placed = {}, 0
    for number, key in enumerate(sound, start=1):
        entry, folder = named[key], source.entry(key)
        text = (folder / SOURCE).read_bytes().decode()
        new = keys.key_of(entry.name, text)
        if target.keys_to_build({new: text}):
            placed += target.put(new, text, (folder / CUBIN).read_bytes(), keys.extra_files)
        entries[new] = describe_entry(target.entry(new), entry.name, entry.uses)
        progress(number, len(sound))
    moved = replace(manifest, signature=keys.signature, flags=keys.flags, entries=entries)
    return moved, placed, refused
