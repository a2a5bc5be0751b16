"""Build a plan into a cache: existing kernels stay, missing ones are built once."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runner.build.builder import BuildResult, Job, KernelBuilder
from runner.build.compiler import NvccCompiler
from runner.build.estimates import plain_seconds
from runner.cache.kernel_cache import KernelCache
from runner.cache.lock import locked
from runner.cache.manifest import (
    Manifest,
    check_target,
    describe_entry,
    merge_manifest,
    read_manifest,
)
from runner.errors import UserError, WorkFailedError
from runner.kernels.keys import CacheKeys
from runner.kernels.nvcc import release_of
from runner.planning.plan import Plan, PlannedKernel, use_to_json

Progress = Callable[[int, int, float], None]


@dataclass
class BuildReport:
    """What a build did, in numbers of kernels.

    Attributes:
        present: in the cache beforehand.
        replaced: built to replace a broken entry.
        plain: built by an nvcc process each, by the reason for that.
        failed: names of kernels that did not compile, with the compiler's message.
    """

    planned: int
    present: int = 0
    replaced: int = 0
    built: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class BuildRequest:
    """What to build, where, and with which compiler.

    Attributes:
        keys: cache keys of the machine that will run.
        compiler: this machine's compiler.
        jobs: compiler processes that run at a time.
        fast: False compiles every kernel alone.
    """

    plan: Plan
    title: str
    keys: CacheKeys
    compiler: NvccCompiler
    cache: KernelCache
    jobs: int
    environment: Mapping[str, str]
    fast: bool = True

    def by_key(self) -> dict[str, PlannedKernel]:
        """The planned kernels by cache key."""
        return {self.keys.cache_key(item.kernel): item for item in self.plan.kernels}

    def manifest(self, kernels: Mapping[str, PlannedKernel]) -> Manifest:
        """A manifest of those given kernels that the cache holds, whoever built them."""
        origin = self.plan.table.origin
        entries = {
            key: describe_entry(folder, item.kernel.name, list(map(use_to_json, item.uses)))
            for key, item in kernels.items()
            if (folder := self.cache.entry(key)).is_dir()
        }
        return Manifest.of_keys(
            self.keys,
            origin.library,
            gpu=origin.gpu,
            num_sms=origin.num_sms,
            built_with=self.compiler.signature,
            plans=[self.title],
            entries=entries,
        )


def prebuild(
    request: BuildRequest,
    *,
    on_wait: Callable[[Path], None] = lambda cache_dir: None,
    progress: Progress = lambda done, total, fraction: None,
) -> BuildReport:
    """Build the planned kernels that the cache lacks, and write the manifest.

    Only one builder works in a cache at a time; the next one waits and then finds everything there.
    A killed build leaves only whole entries behind, and the next build continues from them.

    Args:
        on_wait: called with the cache's directory when this builder has to wait for another one.
        progress: called with (kernels done, kernels in total, fraction of the work done).

    Raises:
        UserError: a cache that is not writable or for another machine, or an nvcc whose release
            is not the target's.
        WorkFailedError: the build stopped, for example on a full disk; built kernels are kept.
    """
    ours, theirs = release_of(request.compiler.signature), release_of(request.keys.signature)
    if ours != theirs:
        raise UserError(
            "nvcc here is {}.{} but the target's is {}.{}: ".format(*ours, *theirs)
            + "build with the target's release, or build for an older one and run runner cache "
            "relocate"
        )
    cache = request.cache
    try:
        cache.prepare()
    except UserError:
        if _is_complete(request):  # A complete cache may be read-only.
            return BuildReport(len(request.plan.kernels), present=len(request.plan.kernels))
        raise
    with locked(cache.root, on_wait=on_wait) as lock:
        return _build(request, progress, alone=bool(lock))


def _is_complete(request: BuildRequest) -> bool:
    try:
        digests = _cubin_digests(request.cache)
    except UserError:
        return False
    return all(
        request.cache.holds(key, request.keys.source(item.kernel), digests.get(key, ""))
        for key, item in request.by_key().items()
    )


def _cubin_digests(cache: KernelCache) -> dict[str, str]:
    manifest = read_manifest(cache.root)
    return {key: entry.cubin_sha256 for key, entry in manifest.entries.items()} if manifest else {}


def _build(request: BuildRequest, progress: Progress, *, alone: bool) -> BuildReport:
    cache = request.cache
    check_target(cache.root, request.manifest({}))
    if alone:
        cache.remove_leftovers()
    started, cpu = time.monotonic(), _cpu_seconds()
    kernels = request.by_key()
    sources = {key: request.keys.source(item.kernel) for key, item in kernels.items()}
    before = {key for key in kernels if cache.entry(key).exists()}
    missing = cache.keys_to_build(sources, _cubin_digests(cache))
    report = BuildReport(
        planned=len(request.plan.kernels),
        present=len(kernels) - len(missing),
        replaced=len(before.intersection(missing)),
    )
    jobs = [Job(key, kernels[key].kernel, sources[key]) for key in missing]
    try:
        try:
            _build_jobs(request, jobs, report, progress)
        finally:
            merge_manifest(cache.root, request.manifest(kernels))
    except OSError as error:
        words = error.strerror or str(error) or type(error).__name__
        raise WorkFailedError(
            f"the build stopped after {report.built} of {len(missing)} kernels: {words}; "
            "finished kernels are kept, run it again to go on"
        ) from None
    report.wall_seconds = time.monotonic() - started
    report.cpu_seconds = _cpu_seconds() - cpu
    return report


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in both)


def _build_jobs(
    request: BuildRequest, jobs: list[Job], report: BuildReport, progress: Progress
) -> None:
    guard = threading.Lock()
    left = {job.key: plain_seconds(job.kernel) for job in jobs}
    total = sum(left.values())

    def take(result: BuildResult) -> None:
        job = result.job
        if result.cubin is not None:
            request.cache.put(job.key, job.source, result.cubin, request.keys.extra_files)
        with guard:
            if result.cubin is None:
                report.failed.append((job.kernel.name, result.error))
            else:
                report.built += 1
                report.plain.update([result.fallback] if result.fallback else [])
            del left[job.key]
            done = len(jobs) - len(left)
            progress(done, len(jobs), 1 - sum(left.values()) / total)

    KernelBuilder(request.compiler, request.jobs, request.environment, take, request.fast).build(
        jobs
    )
