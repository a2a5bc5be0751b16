"""Fixtures: a small kernel library and a cache filled with its kernels."""

from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.kernels.installed import Library
from runner.kernels.keys import CacheKeys
from tests.unit.small_cache import fill, keys_for, small_library


@pytest.fixture
def here(tmp_path: Path) -> Library:
    return small_library(tmp_path / "deep_gemm")


@pytest.fixture
def keys(here: Library) -> CacheKeys:
    return keys_for(here)


@pytest.fixture
def made(tmp_path: Path, keys: CacheKeys) -> tuple[KernelCache, Manifest]:
    return fill(tmp_path / "made", keys)
