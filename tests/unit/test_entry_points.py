"""DeepGemmWrapper on a CPU, around a mock library and around the reference library."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper  # noqa: E402
from runner.deep_gemm_wrapper.walker import COMPILE_ONLY, compile_only  # noqa: E402
from tests.unit.cpu_runner import on_reference  # noqa: E402
from tests.unit.entry_calls import CALLS, GROUPS, N, masked  # noqa: E402


class MockLibrary(SimpleNamespace):
    """A library in which every name is a function that records its call."""

    def __init__(self) -> None:
        super().__init__(called=[])

    def __getattr__(self, name: str) -> Any:
        def function(*_: Any, **__: Any) -> torch.Tensor:
            self.called.append(name)
            return torch.empty(0)

        return function


def test_every_public_entry_point_is_tested_here() -> None:
    names = {name for name, made in vars(DeepGemmWrapper).items() if callable(made)}
    assert {name for name in names if name[0] != "_"} == {*CALLS, "configure_deep_gemm_num_sms"}


@pytest.mark.parametrize("name", CALLS)
def test_entry_point_with_rows_calls_the_library_once(name: str) -> None:
    library = MockLibrary()
    getattr(DeepGemmWrapper(library), name)(*CALLS[name](4))
    assert len(library.called) == 1


@pytest.mark.parametrize("name", CALLS)
def test_entry_point_without_rows_does_not_call_the_library(name: str) -> None:
    library = MockLibrary()
    made = getattr(DeepGemmWrapper(library), name)(*CALLS[name](0))
    assert library.called == []
    assert_empty_result(name, made)


def assert_empty_result(name: str, made: torch.Tensor | None) -> None:
    """A result without rows has the usual width and type."""
    if name == "get_paged_mqa_logits_metadata":
        assert made is not None and made.shape == (133, 2) and made.dtype == torch.int32
        assert not made.any()
    elif name.endswith("mqa_logits"):
        width = CALLS[name](0)[-1]
        assert made is not None and made.shape == (0, width) and made.dtype == torch.float32
    else:
        assert made is None


def test_masked_gemm_with_expected_m_0_writes_nothing() -> None:
    """The library refuses an expected M of 0."""
    lhs, rhs, _, used, _ = masked(4)
    out = torch.full((GROUPS, 4, N), 7.0)
    on_reference().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 0)
    assert bool((out == 7).all())
    on_reference().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 4)
    assert bool((out[0] != 7).any()) and bool((out[1] == 7).all())


def test_sm_limit_is_restored_after_the_block() -> None:
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
    """A mock library with a compile mode; ``calls`` records the modes it was set to."""
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
def test_compile_only_restores_the_previous_mode(before: int) -> None:
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
def test_compile_only_does_nothing_if_library_has_no_modes(without: tuple[str, ...]) -> None:
    library = with_modes(without=without)
    with compile_only(library):
        assert library.mode == 0
    assert library.calls == []
