"""Small hand-made caches: sources and keys like the library's, with tiny cubins."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, describe_entry, write_manifest
from runner.config.environ import Environ
from runner.kernels.installed import Library
from runner.kernels.keys import CacheKeys, Recipe, first_recipe
from runner.kernels.rules import RULES
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import Plan, PlannedKernel, make_plan, use_to_json
from tests.unit.elf import tiny_cubin

GEMM = "gemm_nt_f8f8bf16:4096:1024"
ENTRY_BYTES = 20 << 10
INCLUDE = Path("/srv/deep_gemm/include")

SECOND_VERSION = "0.2.3"
NVCC_TEXT = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Wed_Aug_20_01:58:59_PM_PDT_2025
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
"""
SECOND_RECIPE = Recipe(
    generation=2,
    flags=(
        "-std=c++20",
        "--diag-suppress=39,161",
        "--ptxas-options=--register-usage-level=10",
        "--include-path",
        "{include}",
        "--gpu-architecture=sm_90a",
        "-O3",
    ),
    extra_signature="deep-gemm",
    options='{"arch": "sm_90a"}',
)


def small_plan(max_m: int = 64) -> Plan:
    """Up to M 64: a transpose kernel, and GEMM kernels for M 1..16, 17..32 and 33..64."""
    return make_plan(gemm_demands(GEMM, max_m=max_m, num_sms=132), RULES)


def small_library(root: Path, text: str = "int a;\n") -> Library:
    """A library with every header that the small plan includes, ``text`` in each."""
    for item in small_plan().kernels:
        path = root / "include" / item.kernel.header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Library(root, version="0.1.4.post1")


def keys_for(
    library: Library, include_path: Path = INCLUDE, signature: str = "NVCC13.0"
) -> CacheKeys:
    """Keys of a machine without DeepGEMM environment variables."""
    return CacheKeys(library, first_recipe(Environ()), signature, include_path)


def second_library(root: Path, text: str = "int a;\n") -> Library:
    """A library of JIT generation 2 with the headers of the small plan."""
    small_library(root, text)
    (root / "_C.abi3.so").write_bytes(b"\x7fELF\0.committed\0")
    (root / "VERSION").write_text(f"{SECOND_VERSION}\n")
    return Library(root, version=SECOND_VERSION)


def second_keys_for(library: Library, signature: str = NVCC_TEXT) -> CacheKeys:
    """Keys of JIT generation 2."""
    return CacheKeys(library, SECOND_RECIPE, signature, Path())


def cubin_for(source: str) -> bytes:
    """A cubin that is unique to the source; source and cubin together take ``ENTRY_BYTES``."""
    length = ENTRY_BYTES - len(source) - len(tiny_cubin(b""))
    return tiny_cubin((hashlib.sha256(source.encode()).digest() * ENTRY_BYTES)[:length])


def add(cache: KernelCache, keys: CacheKeys, item: PlannedKernel) -> str:
    """Put a kernel into the cache and return its key."""
    key, source = keys.cache_key(item.kernel), keys.source(item.kernel)
    assert cache.put(key, source, cubin_for(source), keys.extra_files)
    return key


def manifest_for(keys: CacheKeys, title: str = "small") -> Manifest:
    """A manifest without entries, for the machine of ``keys``."""
    second = keys.recipe.generation == 2
    library = f"sgl-deep-gemm {SECOND_VERSION if second else '0.1.4.post1'}"
    built_with = NVCC_TEXT if second else "NVCC13.0"
    return Manifest.of_keys(keys, library, built_with=built_with, plans=[title])


def fill(
    root: Path, keys: CacheKeys, items: Sequence[PlannedKernel] | None = None
) -> tuple[KernelCache, Manifest]:
    """Make a cache of planned kernels (the small plan's) with its manifest."""
    cache, manifest = KernelCache(root), manifest_for(keys)
    entries = {}
    for item in small_plan().kernels if items is None else items:
        key = add(cache, keys, item)
        uses = [use_to_json(use) for use in item.uses]
        entries[key] = describe_entry(cache.entry(key), item.kernel.name, uses)
    manifest = Manifest(**{**vars(manifest), "entries": entries})
    write_manifest(root, manifest)
    return cache, manifest


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, except the lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
