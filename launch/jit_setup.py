"""Which JIT a rank uses: the library's own on a GPU, ours where there is only nvcc, or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.kernel_store import check_holds
from launch.loaders import KernelLoader, LibraryJit, OwnJit
from launch.options import LaunchOptions
from runner.build.compiler import NvccCompiler, find_nvcc, nvcc_version, release_of
from runner.build.lazy import LazyJit
from runner.build.probe import probe_seconds
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import body_of, first_recipe
from runner.config.environ import Environ
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError
from runner.kernels.installed import Library, find_library
from runner.kernels.kernel import identity_of
from runner.kernels.rules import RULES
from runner.scenario import Scenario
from runner.watch.shim import CompileRecord, write_shim

if TYPE_CHECKING:
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper


@dataclass(frozen=True)
class RankJit:
    """A rank's JIT.

    Attributes:
        loader: makes kernels ready.
        entry_points: what GEMMs are called through.
        inside: whether loading happens inside the call.
        log_dir: where the compiler shim puts its records.
        key_of: identity of the kernel of a compile that the shim saw.
        description: one line for the user.
        compiler: the real compiler, None where nothing is compiled.
        cache: the node's cache, None where nothing is compiled.
    """

    loader: KernelLoader
    entry_points: DeepGemmWrapper
    inside: bool
    log_dir: Path
    key_of: Callable[[CompileRecord], str]
    description: str
    compiler: NvccCompiler | None = None
    cache: KernelCache | None = None


def set_up_jit(
    options: LaunchOptions,
    environ: Environ,
    scenario: Scenario,
    rank: int,
    work_dir: Path,
    *,
    library: bool,
) -> RankJit:
    """Set the rank's JIT up, with its node's cache directory and the compiler shim.

    Args:
        options: the launch.
        environ: the environment.
        scenario: says on which node the rank is.
        rank: world rank.
        work_dir: the run's temporary directory, one per node.
        library: use the real library (a GPU and real math).

    Raises:
        UserError: the cache cannot be written, or a GPU run lacks what it needs.
    """
    from runner.backend import reference as reference_library
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper

    reference = DeepGemmWrapper(reference_library, sanity_check=environ.sanity_check)
    log_dir = work_dir / "compiles"
    given = _given_cache(options, environ)
    cache = given or KernelCache(work_dir / "cache")
    prebuilt = scenario.warmup.policy is WarmupPolicy.PREBUILT
    if options.virtual_nodes > 1 and not prebuilt:
        cache = replace(cache, root=cache.root / f"node{scenario.parallel.node_of(rank)}")
    tools, missing = find_tools(options, environ)
    if tools is not None:
        cache.check_generation(tools[1].generation)
    if tools is None:
        if library:
            raise UserError(f"a GPU run compiles with nvcc, but {missing}")
        return RankJit(
            OwnJit(None, scenario.table),
            reference,
            False,
            log_dir,
            _nameless,
            f"off, kernels are not compiled: {missing}",
        )
    compiler = NvccCompiler(*tools, scenario.table.recipe)
    if not prebuilt:  # A cache that is complete need not be one that can be written.
        cache.prepare()
    shim = work_dir / f"nvcc-{rank}"
    write_shim(shim, nvcc=compiler.nvcc, log_dir=log_dir)
    release = "{}.{}".format(*release_of(compiler.version_text))
    where = f"nvcc {release}, cache {_describe_cache(cache, given=given is not None)}"
    # The key does not depend on the path of nvcc, so the shim's keys are the real one's.
    recorded = replace(compiler, nvcc=shim)
    if library:
        made = _library_jit(environ, scenario, cache, recorded, log_dir, where)
    else:
        jit = LazyJit(recorded, cache)
        made = RankJit(
            OwnJit(jit, scenario.table), reference, False, log_dir, _identity, f"own, {where}"
        )
    return replace(made, compiler=compiler, cache=cache)


def _library_jit(
    environ: Environ,
    scenario: Scenario,
    cache: KernelCache,
    compiler: NvccCompiler,
    log_dir: Path,
    where: str,
) -> RankJit:
    import torch

    from runner.deep_gemm_wrapper.configurer import check_deep_gemm, import_deep_gemm
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
    from runner.deep_gemm_wrapper.walker import call_each, walk_list

    check_deep_gemm(environ, torch.cuda.get_device_capability())
    root = compiler.library.root
    lib = import_deep_gemm(root, cache_dirs=cache.text, nvcc=compiler.nvcc, pdl=environ.pdl)
    wrapper = DeepGemmWrapper(lib, sanity_check=environ.sanity_check)
    loader = LibraryJit(
        lambda kernels: call_each(wrapper, scenario.plan, kernels),
        lambda op: walk_list(wrapper, op),
        scenario.table,
    )
    return RankJit(loader, wrapper, True, log_dir, _identity, f"deep_gemm, {where}")


def check_jit(options: LaunchOptions, environ: Environ) -> None:
    """Find out before ranks start whether compiler and cache can be used.

    Raises:
        UserError: an unusable nvcc, an unknown library, a cache that cannot be written.
    """
    tools, _ = find_tools(options, environ)
    if tools is None:
        return
    nvcc_version(tools[0])
    if environ.use_nvrtc or environ.dg_jit_use_nvrtc:
        warnings.warn("NVRTC is not supported: kernels are compiled with nvcc", stacklevel=2)
    given = _given_cache(options, environ)
    if given is not None and set(options.policies) != {WarmupPolicy.PREBUILT}:
        given.prepare()


def probed_seconds(options: LaunchOptions, environ: Environ) -> float | None:
    """How fast this machine compiles just now, None where nothing is compiled."""
    tools, _ = find_tools(options, environ)
    if tools is None or tools[1].title != RULES.origin.library:
        return None  # Profiles are of that library's reference kernel.
    return round(probe_seconds(NvccCompiler(*tools, first_recipe(environ))), 4)


def check_prebuilt(options: LaunchOptions, environ: Environ, scenario: Scenario) -> None:
    """Find out before ranks start, without a GPU, whether the cache holds what is expected.

    Raises:
        UserError: it does not, or there is no such cache.
    """
    tools, _ = find_tools(options, environ)
    if tools is None or scenario.warmup.policy is not WarmupPolicy.PREBUILT:
        return
    given = _given_cache(options, environ)
    if given is None:
        raise UserError(
            "--warmup prebuilt needs the cache that was built: give --cache-dir or DG_JIT_CACHE_DIR"
        )
    if _on_gpu(options):
        return  # The plan is for the GPU's own number of SMs, which its rank will know.
    compiler = NvccCompiler(*tools, scenario.table.recipe)
    planned = [item.kernel for item in scenario.plan.kernels]
    check_holds(given, compiler.keys, planned)


def _on_gpu(options: LaunchOptions) -> bool:
    import torch

    return options.device != "cpu" and torch.cuda.is_available()


def cache_of_policy(options: LaunchOptions, environ: Environ, policy: WarmupPolicy) -> Path | None:
    """Cache directory of one of several policies: a given one is divided, so each starts alike."""
    given = _given_cache(options, environ)
    if given is None or len(options.policies) == 1 or policy is WarmupPolicy.PREBUILT:
        return options.cache_dir
    return given.root / str(policy.value)


def find_tools(options: LaunchOptions, environ: Environ) -> tuple[tuple[Path, Library] | None, str]:
    """nvcc and the library, or None and why nothing is compiled.

    Raises:
        UserError: the library that was asked for is not there.
    """
    if not environ.enable_jit_deepgemm:
        return None, "SGLANG_ENABLE_JIT_DEEPGEMM is off"
    if not options.jit:
        return None, "--no-jit was given"
    library = find_library(options.library)
    if library is None:
        return None, "deep_gemm's headers are missing (pip install --no-deps sgl-deep-gemm)"
    nvcc = find_nvcc(environ)
    if nvcc is None:
        return None, "there is no nvcc (pip install 'deepgemm-coldstart[nvcc]')"
    return (nvcc, library), ""


def _given_cache(options: LaunchOptions, environ: Environ) -> KernelCache | None:
    """The cache that was asked for, by option or environment; None: a cold one."""
    if options.cache_dir is not None:
        return KernelCache.of_text(str(options.cache_dir))
    if environ.sglang_dg_cache_dir or environ.dg_jit_cache_dir:
        return KernelCache.of_text(environ.jit_cache_dirs)
    return None


def _describe_cache(cache: KernelCache, *, given: bool) -> str:
    if not given:
        return "cold (temporary)"
    count = cache.count()
    return f"{cache.root} ({f'{count} kernels' if count else 'cold'})"


def _identity(record: CompileRecord) -> str:
    return identity_of(record.kernel_name, body_of(record.source))


def _nameless(record: CompileRecord) -> str:
    return record.kernel_name
