"""A rank's kernel store beside another launch on the same cache directory."""

import os
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist

from launch.kernel_store import NodeKernels
from launch.loaders import KernelLoader
from runner.build.compiler import NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import first_recipe
from runner.config.environ import Environ
from runner.kernels.installed import Library
from runner.scenario import Scenario
from tests.unit.builder_jobs import gemm
from tests.unit.elf import tiny_cubin


def test_what_another_launch_has_built_meanwhile_stays(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one commits after this one has found the entry missing."""
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    cache, kernel = KernelCache(tmp_path / "dg"), gemm("1")
    cache.prepare()
    key, source = compiler.keys.cache_key(kernel), compiler.keys.source(kernel)
    holds = KernelCache.holds

    def overtaken(self: KernelCache, *arguments: str) -> bool:
        found = holds(self, *arguments)
        self.put(key, source, tiny_cubin(b"the other launch's"))
        return found

    monkeypatch.setattr(KernelCache, "holds", overtaken)
    NodeKernels(
        rank=0,
        scenario=cast(Scenario, None),
        cache=cache,
        compiler=compiler,
        loader=cast(KernelLoader, None),
        note=lambda span: None,
        everyone=cast(dist.ProcessGroup, None),
        leaders=None,
        workers=1,
        environment=dict(os.environ),
    ).build((kernel,))
    cubin = (cache.entry(key) / "kernel.cubin").read_bytes()
    assert cubin == tiny_cubin(b"the other launch's")
    assert [path.name for path in cache.entries()] == [key]
    assert list((cache.root / "tmp").iterdir()) == []
