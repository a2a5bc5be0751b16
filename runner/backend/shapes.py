"""``ShapeMath``: the forward's steps on shapes alone. No torch, no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Dispatched, Routing, Tokens
from runner.backend.tensor import TensorSpec
from runner.backend.weights import WeightRequest
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.model import Dsv3Config, Dsv4Config, MoeConfig


@dataclass(frozen=True, slots=True)
class Fp8WeightSpec:
    """An FP8 weight by shape: [n, k] or [groups, n, k]."""

    n: int
    k: int
    groups: int


class ShapeWeights:
    """Makes weights that are only shapes."""

    def make(self, request: WeightRequest) -> Any:
        """The weight's shape."""
        if request.kind == "fp8":
            *groups, n, k = request.view
            return Fp8WeightSpec(n, k, prod(groups))
        dtype = "int64" if request.kind == "ids" else request.kind
        return TensorSpec(request.view, dtype)


class ShapeMath:
    """Implements :class:`runner.backend.math.Math` on :class:`TensorSpec`."""

    def gemm_sms(self, count: int | None) -> AbstractContextManager[None]:
        """Nothing runs here."""
        return nullcontext()

    def embed(self, tokens: Tokens, weight: TensorSpec, first_row: int) -> TensorSpec:
        """[T, H]."""
        return TensorSpec((tokens.count, weight.shape[1]))

    def repeat(self, x: TensorSpec, copies: int) -> TensorSpec:
        """[T, copies * H]."""
        return TensorSpec((x.shape[0], copies * x.shape[1]), x.dtype)

    def rows(self, x: TensorSpec, start: int, stop: int) -> TensorSpec:
        """[stop - start, ...]."""
        return TensorSpec((stop - start, *x.shape[1:]), x.dtype)

    def padded(self, x: TensorSpec, rows: int) -> TensorSpec:
        """[rows, ...]."""
        return TensorSpec((rows, *x.shape[1:]), x.dtype)

    def joined(self, parts: Sequence[TensorSpec]) -> TensorSpec:
        """[sum of rows, ...]."""
        return self.padded(parts[0], sum(part.shape[0] for part in parts))

    def sum_blocks(self, x: TensorSpec, blocks: int) -> TensorSpec:
        """[rows / blocks, ...]."""
        return self.padded(x, x.shape[0] // blocks)

    def block_for_each(
        self, x: TensorSpec, routing: Routing, ranks: int, per_rank: int
    ) -> TensorSpec:
        """[ranks * T, H]."""
        return self.padded(x, ranks * x.shape[0])

    def pack_routing(self, routing: Routing, tokens: int) -> TensorSpec:
        """[T, 2k] fp32."""
        rows, choices = routing.ids.shape
        return TensorSpec((rows, 2 * choices), "fp32")

    def unpack_routing(self, packed: TensorSpec) -> Routing:
        """[T, k] twice."""
        shape = (packed.shape[0], packed.shape[1] // 2)
        return Routing(TensorSpec(shape, "fp32"), TensorSpec(shape, "int64"))

    def columns(self, x: TensorSpec, start: int, stop: int) -> TensorSpec:
        """[T, stop - start]."""
        return TensorSpec((x.shape[0], stop - start), x.dtype)

    def last_tokens(self, x: TensorSpec, batch: ForwardBatch) -> TensorSpec:
        """[sequences, N]."""
        return TensorSpec((batch.batch_size, x.shape[1]), x.dtype)

    def argmax(self, logits: TensorSpec) -> TensorSpec:
        """[sequences] int64."""
        return TensorSpec((logits.shape[0],), "int64")

    def rms_norm(self, x: TensorSpec, weight: TensorSpec, eps: float) -> TensorSpec:
        """Shape of x."""
        return x

    def add(self, x: TensorSpec, y: TensorSpec) -> TensorSpec:
        """Shape of x."""
        return x

    def linear(self, x: TensorSpec, weight: TensorSpec) -> TensorSpec:
        """[T, N]."""
        return TensorSpec((x.shape[0], weight.shape[0]))

    def round_hidden(self, x: TensorSpec) -> TensorSpec:
        """Shape of x."""
        return x

    def gemm_fp8(
        self, x: TensorSpec, weight: Fp8WeightSpec, *, partial: bool = False
    ) -> TensorSpec:
        """[T, N]."""
        return TensorSpec((x.shape[0], weight.n))

    def gemm_bf16_fp32(self, x: TensorSpec, weight: TensorSpec, algo: Bf16Fp32Algo) -> TensorSpec:
        """[T, N] fp32."""
        return TensorSpec((x.shape[0], weight.shape[0]), "fp32")

    def einsum_fp8(self, x: TensorSpec, weight: Fp8WeightSpec) -> TensorSpec:
        """[T, G, D]."""
        return TensorSpec((x.shape[0], weight.groups, weight.n))

    def gemm_fp8_contiguous(
        self, dispatched: Dispatched, weight: Fp8WeightSpec, *, partial: bool = False
    ) -> TensorSpec:
        """[rows, N]."""
        return TensorSpec((dispatched.x.shape[0], weight.n))

    def gemm_fp8_masked(
        self, dispatched: Dispatched, weight: Fp8WeightSpec, *, partial: bool = False
    ) -> TensorSpec:
        """[E, rows, N]."""
        return TensorSpec((*dispatched.x.shape[:2], weight.n))

    def hc_prenorm(
        self, x: TensorSpec, fn: TensorSpec, num_splits: int
    ) -> tuple[TensorSpec, TensorSpec]:
        """([splits, T, 24], [splits, T]) fp32."""
        tokens = x.shape[0]
        out = TensorSpec((num_splits, tokens, fn.shape[0]), "fp32")
        return out, TensorSpec((num_splits, tokens), "fp32")

    def hc_pre(
        self, x: TensorSpec, gemm: Any, base: Any, scale: Any, config: Dsv4Config
    ) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
        """([T, H], [T, M], [T, M, M])."""
        tokens, copies = x.shape[0], config.hc_mult
        layer_input = TensorSpec((tokens, x.shape[1] // copies))
        post = TensorSpec((tokens, copies), "fp32")
        return layer_input, post, TensorSpec((tokens, copies, copies), "fp32")

    def hc_post(self, y: TensorSpec, x: TensorSpec, post: Any, comb: Any) -> TensorSpec:
        """[T, M * H]."""
        return x

    def hc_head(
        self, x: TensorSpec, fn: Any, base: Any, scale: Any, config: Dsv4Config
    ) -> TensorSpec:
        """[T, H]."""
        return TensorSpec((x.shape[0], x.shape[1] // config.hc_mult))

    def q_norm_rope(
        self, q: TensorSpec, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> TensorSpec:
        """[T, h, D]."""
        return TensorSpec((q.shape[0], q.shape[1] // config.head_dim, config.head_dim))

    def store_kv(
        self, kv: Any, weight: Any, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> None:
        """Nothing to keep."""

    def store_compressor(self, name: str, raw: Any, tokens: Tokens, layer: int) -> None:
        """Nothing to keep."""

    def index_query(
        self, q: TensorSpec, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> TensorSpec:
        """[T, heads, dim]."""
        return TensorSpec((q.shape[0], config.index_n_heads, config.index_head_dim))

    def mqa_logits(
        self,
        q: TensorSpec,
        weights: Any,
        ape: Any,
        norm: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
        *,
        paged: bool,
        metadata: Any,
    ) -> TensorSpec:
        """[T, entries] fp32."""
        return TensorSpec((q.shape[0], compressed_entries(tokens.batch, 4)), "fp32")

    def paged_mqa_metadata(self, tokens: Tokens, num_sms: int) -> TensorSpec:
        """[SMs + 1, 2] int32."""
        return TensorSpec((num_sms + 1, 2), "int32")

    def top_entries(self, scores: TensorSpec, tokens: Tokens, config: Dsv4Config) -> TensorSpec:
        """Shape of the scores."""
        return scores

    def attention(
        self,
        q: TensorSpec,
        selected: Any,
        ape: Any,
        norm: Any,
        sink: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
    ) -> TensorSpec:
        """Shape of q."""
        return q

    def group_heads(self, x: TensorSpec, groups: int) -> TensorSpec:
        """[T, groups, h * D / groups]."""
        tokens, heads, dim = x.shape
        return TensorSpec((tokens, groups, heads * dim // groups), x.dtype)

    def flatten_heads(self, x: TensorSpec) -> TensorSpec:
        """[T, a * b]."""
        return TensorSpec((x.shape[0], prod(x.shape[1:])), x.dtype)

    def mla_absorbed(
        self, weight: Fp8WeightSpec, config: Dsv3Config
    ) -> tuple[TensorSpec, TensorSpec]:
        """([h, nope, kv_lora], [h, v, kv_lora])."""
        nope, v = config.qk_nope_head_dim, config.v_head_dim
        heads = weight.n // (nope + v)
        return TensorSpec((heads, nope, weight.k)), TensorSpec((heads, v, weight.k))

    def mla_store(
        self, latent: TensorSpec, weight: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> TensorSpec:
        """[T, kv_lora]."""
        return TensorSpec((latent.shape[0], config.kv_lora_rank))

    def mla_extend(
        self, q: TensorSpec, kv: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> TensorSpec:
        """[T, h * v_head_dim]."""
        heads = q.shape[1] // (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return TensorSpec((q.shape[0], heads * config.v_head_dim))

    def mla_decode(
        self,
        q: TensorSpec,
        w_kc: TensorSpec,
        w_vc: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv3Config,
    ) -> TensorSpec:
        """[T, h * v_head_dim]."""
        return TensorSpec((q.shape[0], w_kc.shape[0] * config.v_head_dim))

    def top_k(self, logits: TensorSpec, bias: Any, config: MoeConfig) -> Routing:
        """[T, k] twice."""
        return _routing(logits.shape[0], config)

    def hash_top_k(
        self, logits: TensorSpec, table: Any, tokens: Tokens, config: MoeConfig
    ) -> Routing:
        """[T, k] twice."""
        return _routing(logits.shape[0], config)

    def dispatch_contiguous(
        self, x: TensorSpec, routing: Routing, experts: tuple[int, int], rows: int
    ) -> Dispatched:
        """[rows, H]."""
        slots = TensorSpec((prod(routing.ids.shape),), "int64")
        groups = TensorSpec((rows,), "int32")
        return Dispatched(TensorSpec((rows, x.shape[1])), groups, slots, rows)

    def dispatch_masked(
        self,
        x: TensorSpec,
        routing: Routing,
        experts: tuple[int, int],
        rows: int,
        expected_m: int,
    ) -> Dispatched:
        """[E, rows, H]."""
        local = experts[1] - experts[0]
        slots = TensorSpec((prod(routing.ids.shape),), "int64")
        groups = TensorSpec((local,), "int32")
        return Dispatched(TensorSpec((local, rows, x.shape[1])), groups, slots, expected_m)

    def silu_and_mul(self, x: TensorSpec, limit: float) -> TensorSpec:
        """[..., N]."""
        return TensorSpec((*x.shape[:-1], x.shape[-1] // 2), x.dtype)

    def combine(self, y: TensorSpec, slots: Any, routing: Routing, factor: float) -> TensorSpec:
        """[T, H]."""
        return TensorSpec((routing.ids.shape[0], y.shape[-1]))


def compressed_entries(batch: ForwardBatch, ratio: int) -> int:
    """Compressed entries of the longest sequence; at least one, as pages are never empty."""
    return max(1, max(batch.seq_lens) // ratio)


def _routing(tokens: int, config: MoeConfig) -> Routing:
    shape = (tokens, config.num_experts_per_tok)
    return Routing(TensorSpec(shape, "fp32"), TensorSpec(shape, "int64"))


class NoComm:
    """A communicator for shapes: gathers grow, the rest keeps its shape."""

    def all_reduce(self, x: TensorSpec, group: tuple[int, ...]) -> TensorSpec:
        """Shape of x."""
        return x

    def all_gather(self, x: TensorSpec, group: tuple[int, ...], dim: int) -> TensorSpec:
        """``dim`` grows by the group's size."""
        shape = list(x.shape)
        shape[dim] *= len(group)
        return TensorSpec(tuple(shape), x.dtype)

    def begin(self, kind: str, x: TensorSpec, group: tuple[int, ...]) -> TensorSpec:
        """The shape of the result."""
        if kind == "all_gather":
            return self.all_gather(x, group, 0)
        if kind == "reduce_scatter":
            return TensorSpec((x.shape[0] // len(group), *x.shape[1:]), x.dtype)
        return x

    def end(self, begun: TensorSpec) -> TensorSpec:
        """What was begun."""
        return begun

    def send(self, x: TensorSpec, peer: int) -> None:
        """Nothing to send."""

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> TensorSpec:
        """The shape asked for."""
        return TensorSpec(shape, dtype)
