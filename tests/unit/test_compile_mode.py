"""Compile-only mode of libraries that have one, and of those that do not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from runner.deep_gemm_wrapper.compile_mode import COMPILE_ONLY, compile_only


def library(mode: int = 0, *, without: tuple[str, ...] = ()) -> Any:
    """A module with a mode; ``calls`` are the modes that it was set to."""
    made: Any = ModuleType("deep_gemm")
    made.mode, made.calls = mode, []

    def set_compile_mode(new: int) -> None:
        made.mode = new
        made.calls.append(new)

    made.get_compile_mode = lambda: made.mode
    made.set_compile_mode = set_compile_mode
    for name in without:
        delattr(made, name)
    return made


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_mode_before_comes_back(before: int) -> None:
    lib = library(before)
    with compile_only(lib):
        assert lib.mode == COMPILE_ONLY == 1
    assert lib.mode == before
    assert lib.calls == [1, before]


def test_also_after_an_error() -> None:
    lib = library()
    with pytest.raises(KeyError, match="walk"), compile_only(lib):
        raise KeyError("walk")
    assert lib.mode == 0


def test_blocks_in_each_other() -> None:
    lib = library()
    with compile_only(lib):
        with compile_only(lib):
            assert lib.mode == 1
        assert lib.mode == 1
    assert lib.mode == 0


@pytest.mark.parametrize(
    "without",
    [("get_compile_mode",), ("set_compile_mode",), ("get_compile_mode", "set_compile_mode")],
    ids=" ".join,
)
def test_nothing_happens_without_both_functions(without: tuple[str, ...]) -> None:
    lib = library(without=without)
    with compile_only(lib):
        assert lib.mode == 0
    with pytest.raises(KeyError, match="walk"), compile_only(lib):
        raise KeyError("walk")
    assert lib.mode == 0 and lib.calls == []
