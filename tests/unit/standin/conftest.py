"""A stand-in that is built once, and children on it."""

from pathlib import Path

import pytest

from tests.unit.standin.fake_torch import COMPILER, Child, make_packages


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose torch has CUDA 13."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    return make_packages(tmp_path_factory.mktemp("site") / "packages")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in of this session is kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def child(packages: Path, cache: Path, tmp_path: Path) -> Child:
    """Runs snippets on a stand-in."""
    return Child(packages, cache, tmp_path / "work")
