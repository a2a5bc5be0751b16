"""Published model sizes by name, and ``dsv4-tiny``, which runs in seconds on two cores."""

from __future__ import annotations

from dataclasses import replace

from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig, MoeConfig

DSV4 = Dsv4Config(
    name="dsv4",
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    sliding_window=128,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4,),
    num_hash_layers=3,
    vocab_size=129280,
    moe=MoeConfig(
        n_routed_experts=256,
        num_experts_per_tok=6,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
        scoring_func="sqrtsoftplus",
        swiglu_limit=10.0,
    ),
)

DSV4_PRO = replace(
    DSV4,
    name="dsv4-pro",
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    index_topk=1024,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4,),
    moe=replace(
        DSV4.moe, n_routed_experts=384, moe_intermediate_size=3072, routed_scaling_factor=2.5
    ),
)

DSV3 = Dsv3Config(
    name="dsv3",
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    first_k_dense_replace=3,
    vocab_size=129280,
    moe=MoeConfig(
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
    ),
)

DSV4_TINY = replace(
    DSV4,
    name="dsv4-tiny",
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    head_dim=128,
    qk_rope_head_dim=32,
    q_lora_rank=256,
    o_groups=2,
    o_lora_rank=128,
    # SM90 MQA-logits kernels take 32 or 64 heads of 32, 64 or 128.
    index_n_heads=32,
    index_topk=8,
    sliding_window=16,
    compress_ratios=(0, 4, 128, 4, 128, 4, 128, 4),
    num_hash_layers=2,
    vocab_size=1024,
    moe=replace(DSV4.moe, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256),
)

PRESETS: dict[str, ModelConfig] = {
    config.name: config for config in (DSV4, DSV4_PRO, DSV3, DSV4_TINY)
}
