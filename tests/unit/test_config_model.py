"""Model configurations: presets and validation."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from runner.config.model import Dsv4Config, ModelConfig
from runner.config.presets import DSV3, DSV4, DSV4_PRO, DSV4_TINY, PRESETS
from runner.errors import UserError


def test_presets_by_name() -> None:
    assert list(PRESETS) == ["dsv4", "dsv4-pro", "dsv3", "dsv4-tiny"]
    assert all(model.name == name for name, model in PRESETS.items())


def test_preset_sizes_match_published_models() -> None:
    table = {
        "dsv4": (4096, 43, 64, 512, 64, 1024, 8, 1024, 64, 128, 512, 128, 3, 4, 129280),
        "dsv4-pro": (7168, 61, 128, 512, 64, 1536, 16, 1024, 64, 128, 1024, 128, 3, 4, 129280),
    }
    for name, expected in table.items():
        model = PRESETS[name]
        assert isinstance(model, Dsv4Config)
        assert (
            model.hidden_size,
            model.num_hidden_layers,
            model.num_attention_heads,
            model.head_dim,
            model.qk_rope_head_dim,
            model.q_lora_rank,
            model.o_groups,
            model.o_lora_rank,
            model.index_n_heads,
            model.index_head_dim,
            model.index_topk,
            model.sliding_window,
            model.num_hash_layers,
            model.hc_mult,
            model.vocab_size,
        ) == expected


@pytest.mark.parametrize(
    ("model", "experts"),
    [
        (DSV4, (256, 6, 1, 2048, 1.5, "sqrtsoftplus", 1, 1, 10.0)),
        (DSV4_PRO, (384, 6, 1, 3072, 2.5, "sqrtsoftplus", 1, 1, 10.0)),
        (DSV3, (256, 8, 1, 2048, 2.5, "sigmoid", 8, 4, 0.0)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_preset_experts_match_published_models(
    model: ModelConfig, experts: tuple[object, ...]
) -> None:
    moe = model.moe
    assert (
        moe.n_routed_experts,
        moe.num_experts_per_tok,
        moe.n_shared_experts,
        moe.moe_intermediate_size,
        moe.routed_scaling_factor,
        moe.scoring_func,
        moe.n_group,
        moe.topk_group,
        moe.swiglu_limit,
    ) == experts
    assert moe.norm_topk_prob is True


def test_attention_compression_ratio_of_each_layer() -> None:
    assert Counter(DSV4.compress_ratios) == {4: 21, 128: 20, 0: 2}
    assert [DSV4.compress_ratio(layer) for layer in (0, 1, 2, 3, 41, 42)] == [0, 0, 4, 128, 128, 4]
    assert Counter(DSV4_PRO.compress_ratios) == {4: 30, 128: 31}
    assert [DSV4_PRO.compress_ratio(layer) for layer in (0, 1, 2, 3, 60)] == [128, 128, 4, 128, 4]
    assert len(DSV4_TINY.compress_ratios) == DSV4_TINY.num_hidden_layers == 8


def test_tensor_parallel_sizes_name_the_dimensions_tp_divides() -> None:
    assert DSV4.tensor_parallel_sizes() == {
        "num_attention_heads": 64,
        "vocab_size": 129280,
        "o_groups": 8,
    }
    assert DSV3.tensor_parallel_sizes() == {"num_attention_heads": 128, "vocab_size": 129280}


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (DSV4, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        (DSV4, {"o_groups": 3}, "o_groups=3 must divide num_attention_heads=64"),
        (
            DSV4,
            {"num_hidden_layers": 44},
            "compress_ratios has 43 entries for num_hidden_layers=44: one per layer is needed",
        ),
        (
            DSV4,
            {"compress_ratios": (0, 8, 2) + (4,) * 40},
            "compress_ratios holds [2, 8]: only 0, 4 and 128 are known",
        ),
    ],
)
def test_invalid_model_sizes_are_refused(
    model: ModelConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        replace(model, **change)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0, -128, 100])
@pytest.mark.parametrize(
    ("config", "field"),
    [
        *((DSV4, name) for name in ("hidden_size", "q_lora_rank", "head_dim", "o_lora_rank")),
        *((DSV3, name) for name in ("kv_lora_rank", "intermediate_size")),
        (DSV3.moe, "moe_intermediate_size"),
    ],
)
def test_widths_must_be_multiples_of_fp8_block_size(config: Any, field: str, value: int) -> None:
    with pytest.raises(UserError) as caught:
        replace(config, **{field: value})
    message = f"{field}={value} must be a positive multiple of 128 (FP8 blocks)"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie in 1..n_routed_experts=256"),
        (
            {"num_experts_per_tok": 257},
            "num_experts_per_tok=257 must lie in 1..n_routed_experts=256",
        ),
        (
            {"scoring_func": "softmax"},
            "scoring_func='softmax' is not known: use sigmoid or sqrtsoftplus",
        ),
        (
            {"n_group": 3},
            "n_group=3 must divide n_routed_experts=256 and topk_group=4 must lie in 1..n_group",
        ),
        (
            {"topk_group": 9},
            "n_group=8 must divide n_routed_experts=256 and topk_group=9 must lie in 1..n_group",
        ),
    ],
)
def test_invalid_expert_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(DSV3.moe, **change)
    assert str(caught.value) == message
