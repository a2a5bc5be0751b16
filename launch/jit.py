"""A rank's JIT: the library's own on a GPU, ours on a machine with only nvcc, or none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.loaders import KernelLoader, LibraryJit, OwnJit
from launch.options import LaunchOptions
from runner.build.compiler import NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.config.environ import Environ
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.kernels.installed import find_library
from runner.kernels.kernel import Kernel
from runner.kernels.keys import CacheKeys, first_recipe
from runner.kernels.nvcc import find_nvcc, nvcc_version, release_of
from runner.kernels.rules import RULES
from runner.planning.plan import plan_of, table_of
from runner.scenario import Scenario
from runner.watch.shim import write_shim

if TYPE_CHECKING:
    from launch.rank import Rank
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper


def find_compiler(options: LaunchOptions, environ: Environ) -> NvccCompiler | str:
    """The compiler, with the recipe that probes use; or, as text, why nothing is compiled.

    Raises:
        UserError: the library that the options name is not there.
    """
    if not environ.enable_jit_deepgemm:
        return "SGLANG_ENABLE_JIT_DEEPGEMM is off"
    if not options.jit:
        return "--no-jit was given"
    library = find_library(options.kernels.library)
    if library is None:
        return "deep_gemm's headers are missing (pip install --no-deps sgl-deep-gemm)"
    nvcc = find_nvcc(environ)
    if nvcc is None:
        return "no nvcc was found (pip install 'deepgemm-coldstart[nvcc]')"
    return NvccCompiler(nvcc, library, first_recipe(environ))


@dataclass(frozen=True)
class RankJit:
    """The entry points through which a rank calls GEMMs, and the loader of their kernels.

    Attributes:
        log_dir: where the compiler shim puts its records.
        description: one line for the user.
        compiler: the real compiler, not the shim; None if nothing is compiled.
        cache: the node's kernel cache; None if nothing is compiled.
    """

    loader: KernelLoader
    entry_points: DeepGemmWrapper
    log_dir: Path
    description: str
    compiler: NvccCompiler | None = None
    cache: KernelCache | None = None


def set_up_jit(rank: Rank, work_dir: Path) -> RankJit:
    """Set up a rank's JIT with its node's cache and the compiler shim, both in ``work_dir``.

    On a GPU with real math, GEMMs run in the real library.

    Raises:
        UserError: the cache cannot be written, or a GPU run has no compiler or library.
    """
    from runner.deep_gemm_wrapper import reference as reference_library
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper

    scenario, log_dir = rank.scenario, work_dir / "compiles"
    compiler = find_compiler(rank.options, rank.environ)
    reference = DeepGemmWrapper(reference_library, sanity_check=rank.environ.sanity_check)
    if isinstance(compiler, str):
        if rank.on_gpu:
            raise UserError(f"a GPU run compiles with nvcc, but {compiler}")
        own = OwnJit(table_of(scenario))
        return RankJit(own, reference, log_dir, f"off, kernels are not compiled: {compiler}")
    compiler = replace(compiler, recipe=table_of(scenario).recipe)
    cache = _node_cache(rank, work_dir)
    cache.check_generation(compiler.library.generation)
    if scenario.policy is not WarmupPolicy.PREBUILT:  # A prebuilt cache may be read-only.
        cache.prepare()
    shim = write_shim(work_dir / f"nvcc-{rank.number}", nvcc=compiler.nvcc, log_dir=log_dir)
    # Keys do not depend on nvcc's path, so the shim's are the real compiler's.
    recorded = replace(compiler, nvcc=shim)
    size = f"{len(cache.entries())} kernels" if len(cache.entries()) else "cold"
    where = "cold (temporary)" if work_dir in cache.root.parents else f"{cache.root} ({size})"
    described = "nvcc {}.{}, cache {}".format(*release_of(compiler.version_text), where)
    if not rank.on_gpu:
        own = OwnJit(table_of(scenario), recorded, cache)
        return RankJit(own, reference, log_dir, f"own, {described}", compiler, cache)
    loader = _library_jit(rank, cache, recorded)
    return RankJit(loader, loader.wrapper, log_dir, f"deep_gemm, {described}", compiler, cache)


def _node_cache(rank: Rank, work_dir: Path) -> KernelCache:
    scenario = rank.scenario
    cache = _given_cache(rank.options, rank.environ) or KernelCache(work_dir / "cache")
    if rank.options.virtual_nodes > 1 and scenario.policy is not WarmupPolicy.PREBUILT:
        return replace(cache, root=cache.root / f"node{scenario.parallel.node_of(rank.number)}")
    return cache


def _library_jit(rank: Rank, cache: KernelCache, compiler: NvccCompiler) -> LibraryJit:
    import torch

    from runner.deep_gemm_wrapper.entrypoint import (
        DeepGemmWrapper,
        check_capability,
        import_deep_gemm,
    )

    environ = rank.environ
    check_capability(torch.cuda.get_device_capability())
    root = compiler.library.root
    module = import_deep_gemm(root, cache_dirs=cache.text, nvcc=compiler.nvcc, pdl=environ.pdl)
    return LibraryJit(DeepGemmWrapper(module, sanity_check=environ.sanity_check), rank.scenario)


def check_jit(options: LaunchOptions, environ: Environ, scenarios: Sequence[Scenario]) -> None:
    """Check the compiler and the cache before ranks start, and any prebuilt cache of ``scenarios``.

    Ranks on a GPU check themselves whether a prebuilt cache is complete: the plan depends on their
    GPU's number of SMs.

    Raises:
        UserError: an unusable nvcc, an unknown library, a cache that cannot be written, or a
            prebuilt cache that is not there or lacks kernels.
    """
    compiler = find_compiler(options, environ)
    if isinstance(compiler, str):
        return
    nvcc_version(compiler.nvcc)
    if environ.use_nvrtc or environ.dg_jit_use_nvrtc:
        warnings.warn("NVRTC is not supported: kernels are compiled with nvcc", stacklevel=2)
    given = _given_cache(options, environ)
    if given is not None and set(options.policies) != {WarmupPolicy.PREBUILT}:
        given.prepare()
    for scenario in scenarios:
        if scenario.policy is WarmupPolicy.PREBUILT:
            _check_prebuilt(given, scenario, compiler, options.device)


def _check_prebuilt(
    given: KernelCache | None, scenario: Scenario, compiler: NvccCompiler, device: str
) -> None:
    import torch

    if given is None:
        raise UserError(
            "--warmup prebuilt needs a prebuilt cache: give --cache-dir or DG_JIT_CACHE_DIR"
        )
    if device == "cpu" or not torch.cuda.is_available():
        planned = [item.kernel for item in plan_of(scenario).kernels]
        keys = replace(compiler, recipe=table_of(scenario).recipe).keys
        check_holds(given, keys, planned)


def lacking(cache: KernelCache, keys: CacheKeys, kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels that are missing from a cache or broken in it."""
    return [k for k in kernels if not cache.holds(keys.cache_key(k), keys.source(k))]


def check_holds(cache: KernelCache, keys: CacheKeys, kernels: Sequence[Kernel]) -> None:
    """Raise UserError unless a cache holds all of ``kernels``, none of them broken."""
    if missing := lacking(cache, keys, kernels):
        raise UserError(
            f"the cache {cache.root} lacks {len(missing)} of {len(kernels)} planned kernels: "
            "build them first (runner compile), or use --warmup planned"
        )


def probed_seconds(options: LaunchOptions, environ: Environ) -> float | None:
    """Seconds that the reference compile takes now; None if nothing is compiled."""
    compiler = find_compiler(options, environ)
    # Profiles have a time only for this library's reference kernel.
    if isinstance(compiler, str) or compiler.library.title != RULES.origin.library:
        return None
    return round(compiler.reference_seconds(), 4)


def cache_of_policy(options: LaunchOptions, environ: Environ, policy: WarmupPolicy) -> Path | None:
    """Cache directory of one policy: with several policies, each has its own subdirectory."""
    given = _given_cache(options, environ)
    if given is None or len(options.policies) == 1 or policy is WarmupPolicy.PREBUILT:
        return options.cache_dir
    return Path(replace(given, root=given.root / policy.value).text)


def _given_cache(options: LaunchOptions, environ: Environ) -> KernelCache | None:
    """The cache that an option or the environment names; None means a cold one."""
    if options.cache_dir is not None:
        return KernelCache.of_text(str(options.cache_dir))
    if environ.sglang_dg_cache_dir or environ.dg_jit_cache_dir:
        return KernelCache.of_text(environ.jit_cache_dirs)
    return None
