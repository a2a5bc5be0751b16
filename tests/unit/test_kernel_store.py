"""NodeKernels: building a rank's planned kernels into the cache, and the recorded spans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from launch import kernel_store
from launch.jit import RankJit
from launch.kernel_store import NodeKernels
from launch.rank_sink import split_loads
from runner.build.builder import BuildResult, Job
from runner.build.compiler import CompileError, NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.config.environ import Environ
from runner.config.parallel import ParallelConfig
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.keys import first_recipe
from runner.schedule import KernelWork
from runner.timeline import Timeline
from runner.watch.shim import CompileRecord
from tests.unit.cache_cli import Capture, assert_says_waiting
from tests.unit.elf import tiny_cubin

GOOD, BROKEN = (
    Kernel(name, "deep_gemm/a.cuh", f"{name}_impl", ("1",)) for name in ("good", "broken")
)


class FakeBuilder:
    """Builds every kernel immediately, except those named "broken"."""

    def __init__(self, *arguments: Any, on_shared: Any, **_: Any) -> None:
        self._take, self._on_shared = arguments[3], on_shared

    def build(self, jobs: Sequence[Job]) -> None:
        self._on_shared("front end", time.time(), time.time())
        for job in jobs:
            cubin = None if job.kernel.name == "broken" else tiny_cubin(b"code")
            self._take(BuildResult(job, cubin, time.time(), error="it is broken"))


@pytest.fixture
def store(
    fake_library: Library, fake_nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> NodeKernels:
    monkeypatch.setattr(kernel_store, "KernelBuilder", FakeBuilder)
    cache = KernelCache(tmp_path / "cache")
    cache.prepare()
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    unused: Any = None
    jit = RankJit(unused, unused, tmp_path, "own", compiler, cache)
    rank: Any = SimpleNamespace(
        number=3,
        environ=Environ(rank=3, world_size=4),
        scenario=SimpleNamespace(parallel=ParallelConfig(pp=4)),
    )
    return NodeKernels(rank, jit, unused)


def test_second_build_of_a_kernel_does_nothing(store: NodeKernels) -> None:
    for _ in range(2):
        store.build((GOOD,))
    assert store.built == 1
    store.work(KernelWork("verify", (GOOD,)))
    assert [(span.rank, span.kind, span.name) for span in store.spans if span.is_kernel] == [
        (3, "compile", "good")
    ]


def test_build_says_that_it_waits_for_another_builder(store: NodeKernels, capsys: Capture) -> None:
    assert_says_waiting(capsys, store.cache.root, lambda: store.build((GOOD,)))
    assert store.built == 1


def test_failed_build_names_the_kernel(store: NodeKernels) -> None:
    with pytest.raises(CompileError, match="broken: it is broken"):
        store.build((BROKEN,))


def test_later_compile_of_a_built_kernel_counts_as_duplicate(store: NodeKernels) -> None:
    store.build((GOOD,))
    source = store.compiler.keys.source(GOOD)
    again = CompileRecord(time.time(), time.time() + 1, 0, 1, 0, source)
    spans = split_loads(store.spans, [again])
    assert {span.key for span in spans if span.is_kernel} == {GOOD.identity}
    timeline = Timeline("planned", "measured", 4, tuple(spans))
    assert (timeline.kernels_compiled, timeline.duplicates) == (2, 1)


def test_build_keeps_entry_committed_by_another_launch_meanwhile(
    store: NodeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other launch commits after this one has found the entry missing."""
    key, source = store.compiler.keys.cache_key(GOOD), store.compiler.keys.source(GOOD)
    holds = KernelCache.holds

    def overtaken(cache: KernelCache, *arguments: str) -> bool:
        found = holds(cache, *arguments)
        cache.put(key, source, tiny_cubin(b"the other launch's"))
        return found

    monkeypatch.setattr(KernelCache, "holds", overtaken)
    store.build((GOOD,))
    cache = store.cache
    assert (cache.entry(key) / "kernel.cubin").read_bytes() == tiny_cubin(b"the other launch's")
    assert [path.name for path in cache.entries()] == [key]
    assert list((cache.root / "tmp").iterdir()) == []
