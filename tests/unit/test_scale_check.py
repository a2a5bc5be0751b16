"""SGLANG_DEEPGEMM_SANITY_CHECK: invalid FP8 scales are reported before a call."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from launch.jit import set_up_jit  # noqa: E402
from runner.backend.forward_batch import ForwardMode  # noqa: E402
from runner.config.environ import Environ  # noqa: E402
from runner.config.model import ModelConfig  # noqa: E402
from runner.deep_gemm_wrapper import calls, walker  # noqa: E402
from runner.deep_gemm_wrapper.calls import FP4_TYPES  # noqa: E402
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper  # noqa: E402
from runner.deep_gemm_wrapper.quantise import (  # noqa: E402
    PAGE,
    pack_pages,
    quantise_blocks,
    quantise_tokens,
)
from runner.deep_gemm_wrapper.scale_check import (  # noqa: E402
    ScaleError,
    check_gemm_scales,
    check_page_scales,
    check_scales,
)
from runner.driver.warmup import WarmupPolicy  # noqa: E402
from runner.kernels.types import DeepGemmKernelType as T  # noqa: E402
from runner.planning.plan import GemmShape  # noqa: E402
from tests.unit.cpu_runner import (  # noqa: E402
    FOUR_LAYERS,
    SMALL_DSV3,
    cpu_runner,
    on_reference,
)
from tests.unit.entry_calls import CALLS, ENTRIES  # noqa: E402
from tests.unit.test_entry_points import MockLibrary  # noqa: E402
from tests.unit.test_launch_options import parsed  # noqa: E402

GEMMS = [
    "gemm_nt_f8f8bf16",
    "grouped_gemm_nt_f8f8bf16_contig",
    "grouped_gemm_nt_f8f8bf16_masked",
    "fp8_einsum_bhr_hdr_bhd",
]
OPERANDS = ["lhs", "rhs"]
FP8_CALLS = [*GEMMS, "fp8_mqa_logits", "fp8_paged_mqa_logits"]
BAD = [float("nan"), float("inf"), float("-inf"), 0.0, -1.0]
bad_values = pytest.mark.parametrize("bad", BAD, ids=str)


def points(*, check: bool = True) -> Any:
    """A DeepGemmWrapper around a mock library."""
    return DeepGemmWrapper(MockLibrary(), sanity_check=check)  # type: ignore[arg-type]


# -- invalid scales -------------------------------------------------------------------------------


@bad_values
def test_first_invalid_scale_is_named(bad: float) -> None:
    scales = torch.rand(3, 4) + 1e-9
    check_scales("entry", "lhs", scales, (3, 4))
    scales[1, 2] = scales[2, 0] = bad
    with pytest.raises(ScaleError) as caught:
        check_scales("entry", "lhs", scales, (3, 4))
    assert str(caught.value) == (
        f"entry: the scales of lhs must be finite and above 0: the one at [1, 2] is {bad}"
    )


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 400), blocks=st.integers(1, 4), exponent=st.integers())
def test_quantisation_gives_valid_scales(m: int, n: int, blocks: int, exponent: int) -> None:
    """Also for zeros and for values at the limits of bf16."""
    x = torch.randn(m, 128 * blocks) * 2.0 ** (exponent % 240 - 130)
    check_gemm_scales("entry", quantise_tokens(x), quantise_blocks(torch.randn(n, 128)))
    check_gemm_scales("entry", quantise_tokens(0 * x), quantise_blocks(torch.zeros(2, n, 128)))


# -- the entry points -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FP8_CALLS)
def test_calls_with_valid_scales_pass(name: str) -> None:
    getattr(points(), name)(*CALLS[name](6))


@bad_values
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", GEMMS)
def test_invalid_scale_of_a_gemm_operand_is_named(name: str, operand: str, bad: float) -> None:
    arguments = CALLS[name](6)
    scales = arguments[OPERANDS.index(operand)][1]
    at = (0,) * (scales.dim() - 1) + (scales.shape[-1] - 1,)
    scales[at] = bad
    with pytest.raises(ScaleError) as caught:
        getattr(points(), name)(*arguments)
    assert str(caught.value) == (
        f"{name}: the scales of {operand} must be finite and above 0: "
        f"the one at {list(at)} is {bad}"
    )


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("change", ["type", "shape"])
def test_scales_of_wrong_type_or_shape_are_refused(name: str, operand: str, change: str) -> None:
    arguments = list(CALLS[name](6))
    index = OPERANDS.index(operand)
    values, scales = arguments[index]
    other = scales.half() if change == "type" else scales[..., :-1]
    arguments[index] = (values, other)
    words = {
        "type": "are torch.float16, must be torch.float32",
        "shape": f"have shape {list(other.shape)}, must have {list(scales.shape)}",
    }
    message = f"{name}: the scales of {operand} {words[change]}"
    with pytest.raises(ScaleError, match=f"^{re.escape(message)}$"):
        getattr(points(), name)(*arguments)


def test_scales_of_padding_rows_are_not_checked() -> None:
    arguments = CALLS["grouped_gemm_nt_f8f8bf16_contig"](6)
    scales = arguments[0][1]
    scales[2] = scales[5] = float("nan")
    points().grouped_gemm_nt_f8f8bf16_contig(*arguments)
    scales[4, 1] = float("nan")
    with pytest.raises(ScaleError, match=r"\[4, 1\] is nan$"):
        points().grouped_gemm_nt_f8f8bf16_contig(*arguments)


def test_scales_of_unused_rows_of_masked_groups_are_not_checked() -> None:
    """Three groups of six rows, of which six, none and three are used."""
    arguments = CALLS["grouped_gemm_nt_f8f8bf16_masked"](6)
    scales = arguments[0][1]
    scales[1] = scales[2, 3:] = float("nan")
    points().grouped_gemm_nt_f8f8bf16_masked(*arguments)
    scales[2, 2] = float("nan")
    with pytest.raises(ScaleError, match=r"\[2, 2, 0\] is nan$"):
        points().grouped_gemm_nt_f8f8bf16_masked(*arguments)


def test_only_scales_of_entries_read_by_mqa_logits_are_checked() -> None:
    """Six rows read up to six entries; the seventh is not checked."""
    arguments = CALLS["fp8_mqa_logits"](6)
    scales = arguments[1][1]
    scales[6] = float("nan")
    points().fp8_mqa_logits(*arguments)
    scales[5] = 0.0
    with pytest.raises(ScaleError) as caught:
        points().fp8_mqa_logits(*arguments)
    assert str(caught.value) == (
        "fp8_mqa_logits: the scales of kv must be finite and above 0: the one at [5] is 0.0"
    )


def with_scales(scales: torch.Tensor) -> torch.Tensor:
    """Pages with zero values and these scales."""
    return pack_pages(torch.zeros(len(scales), 128, dtype=torch.float8_e4m3fn), scales)


def test_only_scales_of_entries_read_from_pages_are_checked() -> None:
    """Rows read 1 to 6 entries of the first page; the others are not checked."""
    arguments = list(CALLS["fp8_paged_mqa_logits"](6))
    scales = torch.ones(ENTRIES)
    scales[6:] = float("nan")
    arguments[1] = with_scales(scales)
    points().fp8_paged_mqa_logits(*arguments)
    scales[4] = float("inf")
    arguments[1] = with_scales(scales)
    with pytest.raises(ScaleError) as caught:
        points().fp8_paged_mqa_logits(*arguments)
    assert str(caught.value) == (
        "fp8_paged_mqa_logits: the scales of kv_cache must be finite and above 0: "
        "the one at [4, 4] is inf"
    )


def test_pages_beyond_a_rows_length_are_not_checked() -> None:
    scales = torch.ones(3 * PAGE)
    scales[PAGE + 7] = float("nan")
    pages = with_scales(scales)
    table = torch.tensor([[2, -1, 99], [0, 2, 1]], dtype=torch.int32)

    def check(*lens: int) -> None:
        check_page_scales("entry", pages, torch.tensor(lens).unsqueeze(1), table)

    check(PAGE, 2 * PAGE)
    check(PAGE, 2 * PAGE + 7)
    with pytest.raises(ScaleError, match=r"\[1, 135\] is nan$"):
        check(PAGE, 2 * PAGE + 8)


@pytest.mark.parametrize("name", GEMMS)
def test_scales_are_not_checked_by_default(name: str) -> None:
    arguments = CALLS[name](6)
    arguments[0][1].fill_(float("nan"))
    getattr(points(check=False), name)(*arguments)


# -- use of the check -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("model", [FOUR_LAYERS, SMALL_DSV3], ids=["dsv4", "dsv3"])
def test_models_pass_the_check(model: ModelConfig, mode: ForwardMode) -> None:
    runner = cpu_runner(model, on_reference(check=True))
    with torch.inference_mode():
        assert runner._dummy_run(3, mode).isfinite().all()


@pytest.mark.parametrize("asked", [False, True])
def test_environment_variable_turns_the_check_on(asked: bool, tmp_path: Any) -> None:
    environ = Environ.read({"SGLANG_DEEPGEMM_SANITY_CHECK": str(asked)})
    options = parsed("--model", "dsv4-tiny", "--no-jit", "--batch-sizes", "1")
    scenario = options.scenario(environ, policy=WarmupPolicy.NONE)
    rank: Any = SimpleNamespace(
        options=options, environ=environ, scenario=scenario, on_gpu=False, place=None
    )
    made = set_up_jit(rank, tmp_path)
    arguments = CALLS["gemm_nt_f8f8bf16"](6)
    arguments[0][1].fill_(float("nan"))
    if asked:
        with pytest.raises(ScaleError):
            made.entry_points.gemm_nt_f8f8bf16(*arguments)
    else:
        made.entry_points.gemm_nt_f8f8bf16(*arguments)


@pytest.mark.parametrize("kind", sorted(set(T) - {T.TF32_HC_PRENORM_GEMM, *FP4_TYPES}))
def test_calls_of_a_walk_pass_the_check(kind: T, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk uses the same wrapper with its own buffers."""

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(calls, "_zeros", zeros)
    monkeypatch.setattr(calls, "_ones", lambda *shape: torch.ones(shape))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    library = MockLibrary()
    points = DeepGemmWrapper(library, sanity_check=True)  # type: ignore[arg-type]
    walker.walk(points, GemmShape(kind, 256, 128, 2, 132), (128, 256))
    assert len([name for name in library.called if "num_sms" not in name]) == 2
