"""Model shapes as frozen values.

All sizes are in elements; "replicated" weights are whole on every tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import UserError

FP8_BLOCK = 128
"""Edge of a weight scaling block and length of an activation scaling group, in elements."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Sizes and routing rules of one mixture-of-experts block."""

    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    swiglu_limit: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in "
                f"1..n_routed_experts={self.n_routed_experts}"
            )
        if self.scoring_func not in ("sigmoid", "sqrtsoftplus"):
            raise UserError(
                f"scoring_func={self.scoring_func!r} is not known: use sigmoid or sqrtsoftplus"
            )
        if self.n_routed_experts % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise UserError(
                f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts} "
                f"and topk_group={self.topk_group} must lie in 1..n_group"
            )
        _require_blocks("moe_intermediate_size", self.moe_intermediate_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What both model families share. Use :class:`Dsv4Config` or :class:`Dsv3Config`."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    qk_rope_head_dim: int
    vocab_size: int
    moe: MoeConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    hc_mult = 1

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers={self.num_hidden_layers} must be at least 1")
        _require_blocks("hidden_size", self.hidden_size)
        _require_blocks("q_lora_rank", self.q_lora_rank)

    @property
    def hc_hidden_size(self) -> int:
        """Width of the tensor that flows between layers and pipeline stages, per token."""
        return self.hc_mult * self.hidden_size

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """Sizes that the tensor-parallel degree must divide, by name."""
        return {"num_attention_heads": self.num_attention_heads, "vocab_size": self.vocab_size}

    def fp8_head_widths(self) -> dict[str, int]:
        """Rows per attention head of FP8 weights that are split by head, by name.

        A rank's heads must fill whole scaling blocks, or its scales would differ from the model's.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Dsv4Config(ModelConfig):
    """DeepSeek-V4: hyper-connections, compressed sparse attention with an indexer, MoE throughout.

    ``compress_ratios`` has one entry per layer: 0 is sliding window only, 4 is compressed sparse
    (with an indexer), 128 is heavily compressed.
    """

    head_dim: int
    o_groups: int
    o_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    num_hash_layers: int
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    compress_rope_theta: float = 160000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise UserError(
                f"compress_ratios has {len(self.compress_ratios)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}: one per layer is needed"
            )
        unknown = sorted(set(self.compress_ratios) - {0, 4, 128})
        if unknown:
            raise UserError(f"compress_ratios holds {unknown}: only 0, 4 and 128 are known")
        if self.num_attention_heads % self.o_groups:
            raise UserError(
                f"o_groups={self.o_groups} must divide num_attention_heads="
                f"{self.num_attention_heads}"
            )
        _require_blocks("head_dim", self.head_dim)
        _require_blocks("o_lora_rank", self.o_lora_rank)

    def compress_ratio(self, layer_id: int) -> int:
        return self.compress_ratios[layer_id]

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {**super().tensor_parallel_sizes(), "o_groups": self.o_groups}


@dataclass(frozen=True, kw_only=True)
class Dsv3Config(ModelConfig):
    """DeepSeek-V3/R1: multi-head latent attention, dense first layers, then MoE."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    first_k_dense_replace: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_blocks("kv_lora_rank", self.kv_lora_rank)
        _require_blocks("intermediate_size", self.intermediate_size)

    def fp8_head_widths(self) -> dict[str, int]:
        return {
            "q_b_proj": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "kv_b_proj": self.qk_nope_head_dim + self.v_head_dim,
            "o_proj": self.v_head_dim,
        }

    def is_dense(self, layer_id: int) -> bool:
        return layer_id < self.first_k_dense_replace


def _require_blocks(name: str, value: int) -> None:
    if value <= 0 or value % FP8_BLOCK:
        raise UserError(f"{name}={value} must be a positive multiple of {FP8_BLOCK} (FP8 blocks)")
