"""Both kinds of entry points, on a CPU: the reference, and the wrapper around a false library."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from runner.backend.reference import ReferenceEntryPoints  # noqa: E402
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper  # noqa: E402
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


def public(kind: type) -> set[str]:
    """Names of its calls; the one that limits SMs is none."""
    names = {name for name, made in vars(kind).items() if callable(made) and name[0] != "_"}
    return names - {"configure_deep_gemm_num_sms"}


def test_the_calls_here_are_all_there_are() -> None:
    assert public(DeepGemmWrapper) == set(CALLS)
    assert public(ReferenceEntryPoints) <= set(CALLS)
    for kind in (DeepGemmWrapper, ReferenceEntryPoints):
        assert callable(kind.configure_deep_gemm_num_sms)


@pytest.mark.parametrize("name", CALLS)
def test_rows_reach_the_library(name: str) -> None:
    library = FalseLibrary()
    getattr(DeepGemmWrapper(library), name)(*CALLS[name](4))
    assert len(library.called) == 1


@pytest.mark.parametrize("name", CALLS)
def test_without_rows_the_wrapper_returns_at_once(name: str) -> None:
    library = FalseLibrary()
    made = getattr(DeepGemmWrapper(library), name)(*CALLS[name](0))
    assert library.called == []
    assert_nothing(name, made)


@pytest.mark.parametrize("name", sorted(public(ReferenceEntryPoints)))
def test_without_rows_the_reference_returns_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an operand was looked at")

    for step in ("widen", "_activations", "_weights", "unpack_pages"):
        monkeypatch.setattr(f"runner.backend.reference.{step}", refuse)
    assert_nothing(name, getattr(ReferenceEntryPoints(), name)(*CALLS[name](0)))


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


@pytest.mark.parametrize("name", ["grouped_gemm_nt_f8f8bf16_masked", "grouped_gemm_nt_bf16_masked"])
def test_masked_calls_that_expect_no_row_have_none(name: str) -> None:
    """The library refuses an expected M of 0."""
    library = FalseLibrary()
    getattr(DeepGemmWrapper(library), name)(*CALLS[name](4)[:-1], 0)
    assert library.called == []


def test_a_masked_reference_call_that_expects_no_row_writes_none() -> None:
    lhs, rhs, _, used, _ = masked(4)
    out = torch.full((GROUPS, 4, N), 7.0)
    ReferenceEntryPoints().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 0)
    assert bool((out == 7).all())
    ReferenceEntryPoints().grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, used, 4)
    assert bool((out[0] != 7).any()) and bool((out[1] == 7).all())
