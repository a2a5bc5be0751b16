"""Move a cache to another install path or compiler: same machine code, other keys.

The key digests the include path, so a cache built for one path misses at another although the
kernels are the same. An entry may take another key where the sources agree that they are: the
headers' hash in its source is the target's, and the target's CUDA release is not older than the
one that built it, since a driver loads what older compilers made, not what newer ones did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from runner.build.compiler import release_of
from runner.cache.entry import CUBIN, SOURCE
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys
from runner.cache.manifest import Manifest, describe_entry
from runner.cache.verify import Expectation, Finding, verify
from runner.errors import UserError
from runner.kernels.installed import Library


@dataclass(frozen=True)
class Relocation:
    """What a relocation did: entries placed, entries that were there, entries refused."""

    manifest: Manifest
    placed: int
    present: int
    refused: list[Finding]


def relocate(
    source: KernelCache,
    manifest: Manifest,
    keys: CacheKeys,
    library: Library,
    target: KernelCache,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Relocation:
    """Copy every sound entry of ``source`` to ``target`` under the keys of another machine.

    Args:
        source: where the entries are; left as it is.
        manifest: what ``source`` was built for.
        keys: of the machine that will run.
        library: the headers of its library, to compare with.
        target: where they go; another directory than ``source``.
        progress: told (done, of how many).

    Raises:
        UserError: the target's compiler is older than the one that built the cache.
    """
    _check_release(manifest.built_with, keys.signature)
    held = Expectation(
        wanted=manifest.entries,
        known=manifest.entries,
        keys=manifest.keys(library),
        library=library,
        manifest=manifest,
    )
    findings = verify(source, held)
    unsound = {finding.key for finding in findings}
    moved = replace(manifest, signature=keys.signature, flags=keys.flags, entries={})
    entries, placed, present = {}, 0, 0
    sound = [key for key in manifest.entries if key not in unsound and source.has(key)]
    for number, key in enumerate(sound, start=1):
        old = manifest.entries[key]
        text = (source.entry(key) / SOURCE).read_bytes().decode()
        new = keys.key_of(old.name, text)
        if target.holds(new, text):
            present += 1
        else:
            target.discard(new)
            placed += target.put(
                new, text, (source.entry(key) / CUBIN).read_bytes(), extra=keys.extra_files
            )
        entries[new] = describe_entry(target.entry(new), old.name, old.uses)
        progress(number, len(sound))
    return Relocation(replace(moved, entries=entries), placed, present, findings)


def _check_release(built_with: str, signature: str) -> None:
    built, wanted = release_of(built_with), release_of(signature)
    if wanted < built:
        raise UserError(
            f"the cache was built with CUDA {built[0]}.{built[1]} and cannot go to CUDA "
            f"{wanted[0]}.{wanted[1]}: a driver need not load what a newer compiler made; build "
            f"it with nvcc {wanted[0]}.{wanted[1]}"
        )
