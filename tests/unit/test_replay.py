"""Recorded calls made again, on a library that keeps what it was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.deep_gemm_wrapper.replay import replay_call
from runner.errors import UserError
from runner.kernels.call_template import Template, generalise
from runner.recording.hook.describe import describe


class Library(ModuleType):
    """A module with one function, which answers with its arguments."""

    def __init__(self) -> None:
        super().__init__("a_library")

    def gemm(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs


def tensor(dtype: str, *shape: int | str, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), **more, "device": "cpu"}


def replay(template: Template, most: int) -> Callable[[int], Any]:
    return replay_call(Library(), template, most)


def replayed(*args: Any, **kwargs: Any) -> Any:
    return replay(Template("gemm", list(args), kwargs), 64)(5)


def test_arguments_are_those_of_the_template_at_m() -> None:
    template = Template(
        "gemm",
        [
            tensor("bfloat16", "M", 64),
            [
                tensor("float8_e4m3fn", "2*M", 8),
                tensor("float32", "M", 3, stride=[1, "align(M,4)"]),
            ],
            "bhr,hdr->bhd",
            "M",
            7,
            None,
        ],
        {"recipe": [1, 128, 128], "c": None, "expected_m": "M", "flag": True, "clamp": 0.5},
    )
    call = replay(template, 64)
    for m in (1, 2, 5, 64, 3):
        args, kwargs = call(m)
        assert ([describe(item) for item in args], describe_all(kwargs)) == template.at(m)
        assert isinstance(args[1], tuple)
        assert kwargs["recipe"] == (1, 128, 128)


def describe_all(kwargs: dict[str, Any]) -> dict[str, object]:
    return {name: describe(value) for name, value in kwargs.items()}


DTYPES = st.sampled_from(
    [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool]
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any layout, also with gaps, without elements, and expanded."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    room = torch.zeros([size + draw(st.integers(0, 2)) for size in shape], dtype=draw(DTYPES))
    found = room[tuple(slice(size) for size in shape)] if shape else room
    found = found.permute(draw(st.permutations(range(len(shape)))))
    return found.expand(3, *found.shape) if draw(st.booleans()) else found


@given(tensors(), tensors())
def test_tensors_look_as_the_recorded_ones(one: torch.Tensor, two: torch.Tensor) -> None:
    (first, (second,)), named = replayed(describe(one), [describe(two)], c=describe(one))
    for made, recorded in ((first, one), (second, two), (named["c"], one)):
        assert describe(made) == describe(recorded)
        assert made.to(torch.float32).count_nonzero() == 0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2))
def test_recorded_scales_are_laid_out_for_other_m(seen: int, other: int, more: int) -> None:
    def args(m: int) -> list[Any]:
        scales = torch.zeros(8, (m + 3) // 4 * 4).t()[:m]
        rows = torch.zeros(m, 64, dtype=torch.float8_e4m3fn)
        weights = torch.zeros(32, 64, dtype=torch.float8_e4m3fn)
        return [(rows, scales), (weights, torch.zeros(1, 8)), torch.zeros(m, 32)]

    template, m = generalise("fp8_gemm_nt", [describe(item) for item in args(seen + 1)], {})
    assert m == seen + 1
    call = replay(Template("gemm", template.args, {}), other + more)
    made, _ = call(other)
    assert [describe(item) for item in made] == [describe(item) for item in args(other)]


def test_types_and_numbers_that_json_does_not_have_are_restored() -> None:
    words = ({"object": "float32"}, {"object": "inf"}, {"object": "-inf"}, {"object": "nan"})
    (dtype, *limits), _ = replayed(*words)
    assert dtype is torch.float32
    assert limits[:2] == [math.inf, -math.inf] and math.isnan(limits[2])


def test_tensor_is_of_zeros_and_shared_by_all_m() -> None:
    call = replay(Template("gemm", [tensor("float32", "M", 4)], {}), 8)
    (first,), _ = call(8)
    (second,), _ = call(3)
    assert first.data_ptr() == second.data_ptr()
    assert first.count_nonzero() == 0


def test_function_that_the_library_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a_library has no function other$"):
        replay_call(Library(), Template("other", [], {}), 8)


@pytest.mark.parametrize("word", ["<Enum.A: 1>", "Size", "nothing", "zeros"])
def test_argument_that_is_no_plain_value_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"^the argument {word} is no plain value$"):
        replayed({"object": word})
