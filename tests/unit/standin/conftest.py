"""Fixtures: a stand-in GPU built once per session, and child processes that use it."""

from pathlib import Path

import pytest

from tests.unit.standin.fake_torch import COMPILER, Child, make_packages


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with a fake torch for CUDA 13."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    return make_packages(tmp_path_factory.mktemp("site") / "packages")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache directory of this session's stand-in."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def child(packages: Path, cache: Path, tmp_path: Path) -> Child:
    """Runs Python snippets on the stand-in GPU."""
    return Child(packages, cache, tmp_path / "work")
