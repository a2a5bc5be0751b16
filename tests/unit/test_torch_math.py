"""The torch forward on a CPU: caches, weights, expert dispatch and quantisation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from runner.backend.base import Backend  # noqa: E402
from runner.backend.forward_batch import ForwardBatch, ForwardMode  # noqa: E402
from runner.backend.step_runner import ScheduleRecorder  # noqa: E402
from runner.backend.tensor import Routing  # noqa: E402
from runner.backend.token_to_m import contiguous_rows, hc_num_splits  # noqa: E402
from runner.backend.torch_moe import ExpertMath  # noqa: E402
from runner.backend.torch_weights import TorchWeights  # noqa: E402
from runner.backend.weights import Shard, WeightRequest, shard  # noqa: E402
from runner.config.model import ModelConfig  # noqa: E402
from runner.config.parallel import ParallelConfig  # noqa: E402
from runner.deep_gemm_wrapper.quantise import (  # noqa: E402
    dequantise_blocks,
    dequantise_tokens,
    pack_pages,
    quantise_blocks,
    quantise_tokens,
    unpack_pages,
)
from runner.model.model_runner import ModelRunner  # noqa: E402
from tests.unit.cpu_runner import CPU, FOUR_LAYERS, SMALL_DSV3, cpu_runner  # noqa: E402


@pytest.mark.parametrize(("model", "length"), [(FOUR_LAYERS, 140), (SMALL_DSV3, 9)])
def test_decode_gives_the_logits_of_a_longer_prompt(model: ModelConfig, length: int) -> None:
    """The last logits of a prompt equal those of decoding its last token.

    140 tokens exceed the sliding window, the top-k of ratio-4 entries, and one ratio-128 entry.
    """
    runner = cpu_runner(model)
    ids = runner.dummy_ids(length)
    with torch.inference_mode():
        whole = runner.forward(
            ForwardBatch.extend([length], input_ids=ids, cache=runner.backend.new_cache(1, length))
        )
        cache = runner.backend.new_cache(1, length)
        runner.forward(ForwardBatch.extend([length - 1], input_ids=ids[:-1], cache=cache))
        last = runner.forward(ForwardBatch.decode([length], input_ids=ids[-1:], cache=cache))
    error = (whole - last).float().norm() / whole.float().norm()
    # DSV3 decodes with absorbed projections, which skip one rounding to bf16 and FP8.
    assert error < (1e-6 if model is FOUR_LAYERS else 0.2)


def test_sequences_of_a_batch_do_not_affect_each_other() -> None:
    runner = cpu_runner(FOUR_LAYERS)
    ids = runner.dummy_ids(12)
    with torch.inference_mode():
        both = runner.forward(
            ForwardBatch.extend([5, 7], input_ids=ids, cache=runner.backend.new_cache(2, 7))
        )
        alone = runner.forward(
            ForwardBatch.extend([7], input_ids=ids[5:], cache=runner.backend.new_cache(1, 7))
        )
    assert torch.equal(both[1], alone[0])


def test_dummy_run_returns_logits_on_the_last_stage() -> None:
    runner = cpu_runner(FOUR_LAYERS)
    with torch.inference_mode():
        for mode in ForwardMode:
            assert runner._dummy_run(3, mode).shape == (3, 1024)


def test_dummy_run_returns_proxy_tensors_of_hyper_connection_width_on_inner_stages() -> None:
    runner = cpu_runner(FOUR_LAYERS, pp=2)
    with torch.inference_mode():
        proxy = runner._dummy_run(3, ForwardMode.DECODE)
    assert isinstance(proxy, dict)
    assert {name: tuple(t.shape) for name, t in proxy.items()} == {"hidden_states": (3, 4 * 512)}


@pytest.mark.parametrize(("mode", "rows"), [(ForwardMode.EXTEND, 4), (ForwardMode.DECODE, 8)])
def test_dummy_proxy_is_sliced_for_context_parallel_extend_only(
    mode: ForwardMode, rows: int
) -> None:
    parallel = ParallelConfig(pp=2, tp=2, attn_cp=2)
    make = ForwardBatch.extend if mode.is_extend else ForwardBatch.decode
    inner = ModelRunner.build(FOUR_LAYERS, parallel, 2, backend=Backend(ScheduleRecorder(), 132))
    proxy = inner.dummy_proxy(make((1,) * 8))
    assert proxy is not None and {x.shape[0] for x in proxy.values()} == {rows}


@given(st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_activation_quantisation_error_is_at_most_half_a_step(rows: int, groups: int) -> None:
    x = torch.randn(rows, 128 * groups, dtype=torch.bfloat16)
    values, scales = quantise_tokens(x)
    assert values.shape == x.shape and scales.shape == (rows, groups)
    error = (dequantise_tokens(values, scales) - x.float()).abs()
    # e4m3 has three mantissa bits: half a step is a sixteenth of the value, or of the smallest
    # normal number, which is 2 ** -6 times the scale.
    limit = x.float().abs() / 16 + scales.repeat_interleave(128, 1) * 2**-7
    assert bool((error <= limit * 1.001).all())


def test_weight_quantisation_has_one_scale_per_whole_or_partial_block() -> None:
    w = torch.randn(2, 200, 256)
    data, scales = quantise_blocks(w)
    assert data.shape == (2, 200, 256) and scales.shape == (2, 2, 2)
    assert float(scales[1, 1, 0]) == pytest.approx(float(w[1, 128:, :128].abs().max()) / 448)
    error = (dequantise_blocks(data, scales) - w).norm() / w.norm()
    assert error < 0.04


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_weights_are_slices_of_one_global_array(parts: int) -> None:
    def values(inner: Shard) -> torch.Tensor:
        """Two of four experts, each with two parts of 512 x 256 of which ``inner`` is local."""
        dims = (Shard(4, 1, 3), Shard(2, 0, 2), inner, Shard(256, 0, 256))
        request = WeightRequest(3, "experts", "fp8", dims, (2, 2 * inner.width, 256))
        made = TorchWeights(7, CPU).make_fp8(request)
        return made.data.view(torch.uint8).view(2, 2, inner.width, 256)

    joined = torch.cat([values(shard(512, parts, index)) for index in range(parts)], 2)
    assert torch.equal(joined, values(Shard(512, 0, 512)))


def request(name: str, kind: str, *shape: int, layer: int = 0, scale: float = 1.0) -> WeightRequest:
    dims = tuple(Shard(size, 0, size) for size in shape)
    return WeightRequest(layer, name, kind, dims, shape, scale)


def test_shared_weights_use_one_buffer_per_shape() -> None:
    weights, alone = TorchWeights(0, CPU, share=True), TorchWeights(0, CPU)
    one, other = request("a", "bf16", 4, 4), request("b", "bf16", 4, 4, layer=9)
    assert weights.make(one) is weights.make(other)
    assert alone.make(one) is not alone.make(one)
    one, other = request("a", "fp8", 128, 128), request("b", "fp8", 128, 128)
    assert weights.make_fp8(one) is weights.make_fp8(other)
    assert alone.make_fp8(one) is not alone.make_fp8(one)


def test_weights_have_the_requested_standard_deviation() -> None:
    made = TorchWeights(1, CPU).make(request("w", "fp32", 500, 500, scale=0.5))
    assert float(made.std()) == pytest.approx(0.5, rel=0.01)
    assert abs(float(made.mean())) < 0.01


@given(st.integers(1, 60), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_combine_after_dispatch_gives_the_weighted_sum(
    tokens: int, choices: int, contiguous: bool, seed: int
) -> None:
    """With identity experts, the result is x times the sum of its local routing weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(8, generator=generator)[:choices] for _ in range(tokens)])
    weights = torch.rand(tokens, choices, generator=generator) + 0.1
    math, experts = ExpertMath(), (2, 6)
    if contiguous:
        rows = contiguous_rows(tokens * choices, 4)
        sent = math.dispatch_contiguous(x, ids, experts, rows)
        for block in sent.groups.view(-1, 128):
            used = block[block >= 0]
            assert len(used.unique()) <= 1, "a block of 128 rows serves one expert"
    else:
        sent = math.dispatch_masked(x, ids, experts, 256, 1)
        local = (ids >= 2) & (ids < 6)
        assert int(sent.groups.sum()) == int(local.sum())
    back = math.combine_expert_outputs(sent.x, sent.slots, Routing(weights, ids), 2.0)
    inside = torch.where((ids >= 2) & (ids < 6), weights, 0.0).sum(1, keepdim=True)
    expected = (2.0 * inside.double() * x.double()).to(torch.bfloat16)
    assert torch.allclose(back.float(), expected.float(), rtol=1e-2, atol=1e-3)


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_contiguous_rows_suffice_for_any_routing(choices: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, experts, (choices,), generator=generator).bincount(minlength=experts)
    needed = int(((counts + 127) // 128 * 128).sum())
    assert needed <= contiguous_rows(choices, experts)


def test_index_pages_round_trip() -> None:
    values, scales = quantise_tokens(torch.randn(128, 128))
    pages = pack_pages(values, scales.squeeze(-1))
    assert pages.shape == (2, 64, 1, 132)
    expected = dequantise_tokens(values, scales)
    assert torch.equal(unpack_pages(pages).view(128, 128), expected)


@pytest.mark.parametrize(
    ("tokens", "splits"),
    [(1, 64), (128, 64), (129, 44), (1024, 8), (4224, 2), (4225, 1), (8448, 1)],
)
def test_hyper_connection_splits_on_132_sms(tokens: int, splits: int) -> None:
    """K = 16384 caps the splits at 64; with 67 or more blocks of 64 rows there is one."""
    assert hc_num_splits(tokens, 16384, 132) == splits
