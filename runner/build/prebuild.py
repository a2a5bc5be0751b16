"""Build a plan into a cache: what is there stays, what is missing is built once."""

from __future__ import annotations

import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from runner.build.build import Builder, Built, Way
from runner.build.compiler import NvccCompiler, release_of
from runner.build.scratch import scratch_folder
from runner.build.unit import Job
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys
from runner.cache.manifest import (
    Manifest,
    check_target,
    describe_entry,
    locked,
    merge_manifest,
    read_manifest,
)
from runner.errors import UserError
from runner.planning.plan import Plan, PlannedKernel, use_to_json

_TAG = "build-"

ShowProgress = Callable[[int, int, float], None]


class BuildStoppedError(Exception):
    """The build could not go on; what was built is kept. The text is one line."""


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        planned: kernels of the plan.
        present: of them, there before.
        replaced: entries that were there and not whole.
        built: built now.
        plain: of them, the plain way, by reason.
        failed: kernel names with the compiler's words.
        wall_seconds: from first to last.
        cpu_seconds: of this process and all compilers.
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
class BuildOrder:
    """What is built, where, and with what.

    Attributes:
        plan: the kernels.
        title: what the plan is for.
        keys: names of the entries, for the machine that will run.
        compiler: this machine's.
        cache: where entries go.
        jobs: processes at a time.
        environment: what the compiler's stages run in.
        fast: False builds the plain way.
    """

    plan: Plan
    title: str
    keys: CacheKeys
    compiler: NvccCompiler
    cache: KernelCache
    jobs: int
    environment: Mapping[str, str]
    fast: bool = True


def prebuild(
    order: BuildOrder,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: ShowProgress = lambda done, total, fraction: None,
) -> BuildReport:
    """Build what the cache lacks of the plan, and write the manifest.

    One builder at a time works in a cache; the next one waits and then finds all there. A killed
    build leaves whole entries behind, and the next one goes on from them.

    Args:
        order: what to build.
        say: told when there is something to wait for.
        progress: told (kernels done, of how many, fraction of the work), from worker threads.

    Raises:
        UserError: a cache that cannot be written, is another machine's, or flags that would
            name the build machine's compiler wrongly.
        BuildStoppedError: the disk is full or the like.
    """
    ours, theirs = release_of(order.compiler.signature), release_of(order.keys.signature)
    if ours != theirs:
        raise UserError(
            "nvcc here is {}.{} and the target's is {}.{}: ".format(*ours, *theirs)
            + "build with the target's release, or with an older one and relocate (runner cache "
            "relocate)"
        )
    try:
        order.cache.prepare()
    except UserError:
        if (done := _nothing_to_do(order)) is None:
            raise
        return done
    with locked(order.cache.root, wait=False) as free:
        if free:
            return _build(order, progress)
    say(f"another builder is at work in {order.cache.root}: waiting for it")
    with locked(order.cache.root):
        return _build(order, progress)


def _build(order: BuildOrder, progress: ShowProgress) -> BuildReport:
    check_target(order.cache.root, _manifest(order, {}))
    _clear_leftovers(order.cache)
    started, cpu = time.monotonic(), _cpu_seconds()
    report = BuildReport(planned=len(order.plan.kernels))
    keyed = {order.keys.cache_key(item.kernel): item for item in order.plan.kernels}
    missing = _missing(order, keyed, report)
    report.present = len(keyed) - len(missing)
    try:
        try:
            _build_missing(order, {key: keyed[key] for key in missing}, report, progress)
        finally:
            merge_manifest(order.cache.root, _manifest(order, keyed))
    except OSError as error:
        words = error.strerror or str(error) or type(error).__name__
        raise BuildStoppedError(
            f"the build stopped after {report.built} of {len(missing)} kernels: {words}; what was "
            "built is kept, run it again to go on"
        ) from None
    report.wall_seconds = time.monotonic() - started
    report.cpu_seconds = _cpu_seconds() - cpu
    return report


def _nothing_to_do(order: BuildOrder) -> BuildReport | None:
    """The report of a cache that cannot be written where it holds all of the plan, else None."""
    report = BuildReport(planned=len(order.plan.kernels), present=len(order.plan.kernels))
    keyed = {order.keys.cache_key(item.kernel): item for item in order.plan.kernels}
    try:
        before = read_manifest(order.cache.root)
    except UserError:
        return None
    whole = all(_is_right(order, key, item, before) for key, item in keyed.items())
    return report if whole else None


def _clear_leftovers(cache: KernelCache) -> None:
    """Temporary folders of builders that were killed: whoever holds the lock has no rivals."""
    for pattern in (f"{_TAG}*", "discarded-*"):
        for path in (cache.root / "tmp").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _missing(
    order: BuildOrder, keyed: Mapping[str, PlannedKernel], report: BuildReport
) -> list[str]:
    """Keys to build: without an entry, or with one that is not what it should be, which goes."""
    before = read_manifest(order.cache.root)
    missing = []
    for key, item in keyed.items():
        if not order.cache.entry(key).exists():
            missing.append(key)
        elif not _is_right(order, key, item, before):
            order.cache.discard(key)
            report.replaced += 1
            missing.append(key)
    return missing


def _is_right(order: BuildOrder, key: str, item: PlannedKernel, before: Manifest | None) -> bool:
    if not order.cache.holds(key, order.keys.source(item.kernel)):
        return False
    if before is None or key not in before.entries:
        return True
    named = before.entries[key]
    return describe_entry(order.cache.entry(key), named.name, named.uses) == named


def _build_missing(
    order: BuildOrder,
    missing: Mapping[str, PlannedKernel],
    report: BuildReport,
    progress: ShowProgress,
) -> None:
    jobs = [Job(key, item.kernel, order.keys.source(item.kernel)) for key, item in missing.items()]
    guard = threading.Lock()

    def take(built: Built) -> None:
        if built.cubin is not None:
            order.cache.put(
                built.job.key,
                built.job.source,
                built.cubin,
                extra=order.keys.extra_files,
                tag=_TAG,
            )
        with guard:
            _count(report, built)

    def step(done: float, expected: float) -> None:
        with guard:
            progress(report.built + len(report.failed), len(jobs), done / max(done, expected))

    with scratch_folder() as scratch:
        builder = Builder(
            order.compiler,
            scratch,
            order.jobs,
            order.environment,
            take,
            order.fast,
            step,
        )
        builder.build(jobs)


def _count(report: BuildReport, built: Built) -> None:
    if built.cubin is None:
        report.failed.append((built.job.kernel.name, built.words))
        return
    report.built += 1
    if built.way is Way.PLAIN:
        report.plain[built.words] += 1


def _manifest(order: BuildOrder, keyed: Mapping[str, PlannedKernel]) -> Manifest:
    """A manifest that names every given kernel that is there, whoever built it."""
    return Manifest(
        library=order.plan.table.origin.library,
        arch=order.keys.recipe.arch,
        signature=order.keys.signature,
        flags=order.keys.flags,
        generation=order.keys.recipe.generation,
        extra_signature=order.keys.recipe.extra_signature,
        gpu=order.plan.table.origin.gpu,
        num_sms=order.plan.table.origin.num_sms,
        built_with=order.compiler.signature,
        plans=[order.title],
        entries={
            key: describe_entry(
                order.cache.entry(key), item.kernel.name, [use_to_json(use) for use in item.uses]
            )
            for key, item in keyed.items()
            if order.cache.entry(key).is_dir()
        },
    )


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in both)
