"""The entry points on a CPU: around a false library, and around the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper  # noqa: E402
from runner.deep_gemm_wrapper.walker import COMPILE_ONLY, compile_only  # noqa: E402
from tests.unit.cpu_runner import on_reference  # noqa: E402
from tests.unit.entry_calls import CALLS, GROUPS, N, masked  # noqa: E402


class FalseLibrary(SimpleNamespace):
    """Answers to any name with a function that notes its call."""

    def __init__(self) -> None:
        super().__init__(called=[])

    def __getattr__(self, name: str) -> Any:
        def function(*_: Any, **__: Any) -> torch.Tensor:
            self.called.append(name)
            return torch.empty(0)

        return function


def test_the_calls_here_are_all_there_are() -> None:
    names = {name for name, made in vars(DeepGemmWrapper).items() if callable(made)}
    assert {name for name in names if name[0] != "_"} == {*CALLS, "configure_deep_gemm_num_sms"}


@pytest.mark.parametrize("name", CALLS)
def test_rows_reach_the_library(name: str) -> None:
    library = FalseLibrary()
    getattr(DeepGemmWrapper(library), name)(*CALLS[name](4))
    assert len(library.called) == 1


@pytest.mark.parametrize("name", CALLS)
def test_without_rows_an_entry_point_returns_at_once(name: str) -> None:
    library = FalseLibrary()
    made = getattr(DeepGemmWrapper(library), name)(*CALLS[name](0))
    assert library.called == []
    assert_nothing(name, made)


def assert_nothing(name: str, made: torch.Tensor | None) -> None:
    """What a call without rows returns has the shape and type of any call's result."""
    if name == "get_paged_mqa_logits_metadata":
        assert made is not None and made.shape == (133, 2) and made.dtype == torch.int32
        assert not made.any()
    elif name.endswith("mqa_logits"):
        width = CALLS[name](0)[-1]
        assert made is not None and made.shape == (0, width) and made.dtype == torch.float32
    else:
        assert made is None


def test_a_masked_call_that_expects_no_row_writes_none() -> None:
    """The library refuses an expected M of 0."""
    lhs, rhs, _, used, _ = masked(4)
    out = torch.full((GROUPS, 4, N), 7.0)
    on_reference().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 0)
    assert bool((out == 7).all())
    on_reference().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 4)
    assert bool((out[0] != 7).any()) and bool((out[1] == 7).all())


def test_sms_are_limited_inside_the_block_only() -> None:
    limits: list[int] = []
    library = SimpleNamespace(get_num_sms=lambda: 132, set_num_sms=limits.append)
    points = DeepGemmWrapper(library)
    with points.configure_deep_gemm_num_sms(None):
        assert limits == []
    with pytest.raises(KeyError), points.configure_deep_gemm_num_sms(112):
        assert limits == [112]
        raise KeyError
    assert limits == [112, 132]


# -- the library's compile-only mode --------------------------------------------------------------


def with_modes(mode: int = 0, *, without: tuple[str, ...] = ()) -> SimpleNamespace:
    """A library with a mode; ``calls`` are the modes that it was set to."""
    made = SimpleNamespace(mode=mode, calls=[])

    def set_compile_mode(new: int) -> None:
        made.mode = new
        made.calls.append(new)

    made.get_compile_mode = lambda: made.mode
    made.set_compile_mode = set_compile_mode
    for name in without:
        delattr(made, name)
    return made


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_compile_mode_is_restored(before: int) -> None:
    library = with_modes(before)
    with pytest.raises(KeyError, match="walk"), compile_only(library):
        assert library.mode == COMPILE_ONLY == 1
        raise KeyError("walk")
    assert library.calls == [1, before]


@pytest.mark.parametrize(
    "without",
    [("get_compile_mode",), ("set_compile_mode",), ("get_compile_mode", "set_compile_mode")],
    ids=" ".join,
)
def test_a_library_without_modes_launches_as_ever(without: tuple[str, ...]) -> None:
    library = with_modes(without=without)
    with compile_only(library):
        assert library.mode == 0
    assert library.calls == []
