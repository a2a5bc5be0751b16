"""Helpers for cache tests: damaged entries, expectations of verify, one-line errors."""

from pathlib import Path
from typing import Any

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.cache.verify import Expectation
from runner.errors import UserError
from runner.kernels.installed import Library
from tests.unit.elf import tiny_cubin


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def expected(manifest: Manifest, library: Library | None = None, /, **values: Any) -> Expectation:
    """What verify expects on the manifest's own machine; ``values`` replace fields."""
    headers = Library(Path("nowhere")) if library is None else library
    given = {
        "wanted": list(manifest.entries),
        "known": set(manifest.entries),
        "keys": manifest.keys(headers),
        "library": library,
        "manifest": manifest,
    }
    return Expectation(**{**given, **values})


def first_of(made: tuple[KernelCache, Manifest]) -> tuple[str, Path]:
    key = min(made[1].entries)
    return key, made[0].entry(key)


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def change(path: Path) -> None:
    (path / "kernel.cubin").write_bytes(tiny_cubin(b"other"))


def make_incomplete(path: Path) -> None:
    (path / "kernel.cubin").unlink()
