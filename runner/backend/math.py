"""The work behind each step of the forward, as one protocol with two implementations.

``runner.backend.shapes`` answers with shapes, ``runner.backend.torch_math`` computes. Shapes below
use T new tokens, H hidden size, M copies of the residual stream (hyper-connections), h local
attention heads, D head dimension, E local experts, k experts per token. Element types are bf16
unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from runner.backend.forward_batch import ForwardBatch
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.model import Dsv3Config, Dsv4Config, MoeConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """Result of expert selection: ``weights`` [T, k] fp32 and expert ``ids`` [T, k] int64."""

    weights: Any
    ids: Any


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Tokens laid out for a grouped GEMM, and the way back.

    Attributes:
        x: [rows, H], or [E, rows, H] in the masked layout.
        groups: expert of each row, -1 for padding [rows] int32; masked: rows in use [E] int32.
        slots: flat row of each (token, choice), -1 where the expert is not local: [T * k] int64.
        expected_m: M that the GEMM's configuration is chosen by.
    """

    x: Any
    groups: Any
    slots: Any
    expected_m: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """The new tokens a rank works on: positions ``start`` to ``stop`` of the batch's token list."""

    batch: ForwardBatch
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class Math(Protocol):
    """See the module's docstring. Weights come from the matching ``WeightSource``."""

    def gemm_sms(self, count: int | None) -> AbstractContextManager[None]:
        """Inside the block GEMMs use ``count`` SMs; None changes nothing."""

    def embed(self, tokens: Tokens, weight: Any, first_row: int) -> Any:
        """Rows of a vocabulary shard that starts at ``first_row``, zero elsewhere: [T, H]."""

    def repeat(self, x: Any, copies: int) -> Any:
        """[T, H] -> [T, copies * H]."""

    def rows(self, x: Any, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of [T, ...]."""

    def padded(self, x: Any, rows: int) -> Any:
        """Rows of zeros added or cut off at the end: [T, ...] -> [rows, ...]."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """Rows one after the other."""

    def sum_blocks(self, x: Any, blocks: int) -> Any:
        """Sum of equal blocks of rows: [blocks * T, H] -> [T, H]."""

    def block_for_each(self, x: Any, routing: Routing, ranks: int, per_rank: int) -> Any:
        """For each of ``ranks`` ranks the rows that have one of its ``per_rank`` experts among
        their choices, the others zero: [T, H] -> [ranks * T, H]."""

    def pack_routing(self, routing: Routing, tokens: int) -> Any:
        """Weights and ids side by side, [T, 2k] fp32; rows from ``tokens`` on choose no expert."""

    def unpack_routing(self, packed: Any) -> Routing:
        """The inverse."""

    def columns(self, x: Any, start: int, stop: int) -> Any:
        """Columns ``start`` to ``stop`` of [T, N], contiguous."""

    def last_tokens(self, x: Any, batch: ForwardBatch) -> Any:
        """The last new token of each sequence: [T, N] -> [sequences, N]."""

    def argmax(self, logits: Any) -> Any:
        """Greedy sampling: [sequences, vocab] -> [sequences] int64."""

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """Root-mean-square norm over the last dimension."""

    def add(self, x: Any, y: Any) -> Any:
        """Sum of two tensors of one shape."""

    def linear(self, x: Any, weight: Any) -> Any:
        """[T, K] x [N, K] -> [T, N], plain bf16."""

    def round_hidden(self, x: Any) -> Any:
        """A sum of partial results in the element type of hidden states."""

    def gemm_fp8(self, x: Any, weight: Any, *, partial: bool = False) -> Any:
        """[T, K] bf16, quantised per token and 128 columns, x FP8 [N, K] -> [T, N].

        A ``partial`` result is one rank's part of a sum and may be kept wider than bf16 until
        :meth:`round_hidden`; the grouped GEMMs likewise.
        """

    def gemm_bf16_fp32(self, x: Any, weight: Any, algo: Bf16Fp32Algo) -> Any:
        """[T, K] x [N, K] -> [T, N] fp32, by the named algorithm."""

    def einsum_fp8(self, x: Any, weight: Any) -> Any:
        """``bhr,hdr->bhd``: [T, G, R] bf16, quantised along R, x FP8 [G, D, R] -> [T, G, D]."""

    def gemm_fp8_contiguous(
        self, dispatched: Dispatched, weight: Any, *, partial: bool = False
    ) -> Any:
        """[rows, K] x FP8 [E, N, K] by the row's expert -> [rows, N]."""

    def gemm_fp8_masked(self, dispatched: Dispatched, weight: Any, *, partial: bool = False) -> Any:
        """[E, rows, K] x FP8 [E, N, K] -> [E, rows, N]; rows out of use are undefined."""

    def hc_prenorm(self, x: Any, fn: Any, num_splits: int) -> Any:
        """[T, M * H] x fn fp32 [24, M * H]; (out fp32 [splits, T, 24], squares [splits, T])."""

    def hc_pre(
        self, x: Any, gemm: Any, base: Any, scale: Any, config: Dsv4Config
    ) -> tuple[Any, Any, Any]:
        """Mix the copies into one input: ([T, H], post fp32 [T, M], comb fp32 [T, M, M])."""

    def hc_post(self, y: Any, x: Any, post: Any, comb: Any) -> Any:
        """New residual stream [T, M * H] from the sub-layer's output [T, H] and the old stream."""

    def hc_head(self, x: Any, fn: Any, base: Any, scale: Any, config: Dsv4Config) -> Any:
        """Collapse the residual stream at the end: [T, M * H] -> [T, H]."""

    def q_norm_rope(self, q: Any, tokens: Tokens, layer: int, config: Dsv4Config) -> Any:
        """[T, h * D] -> [T, h, D], each head normed without weight, its last part rotated."""

    def store_kv(
        self, kv: Any, weight: Any, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> None:
        """Norm and rotate the shared key-value row [T, D] and put it into the cache."""

    def store_compressor(self, name: str, raw: Any, tokens: Tokens, layer: int) -> None:
        """Put a compressor's projections [T, N] fp32 into the cache."""

    def index_query(self, q: Any, tokens: Tokens, layer: int, config: Dsv4Config) -> Any:
        """Rotate the indexer's query: [T, heads * dim] -> [T, heads, dim]."""

    def mqa_logits(
        self,
        q: Any,
        weights: Any,
        ape: Any,
        norm: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
        *,
        paged: bool,
        metadata: Any,
    ) -> Any:
        """Index scores of each token against compressed entries: [T, entries] fp32."""

    def paged_mqa_metadata(self, tokens: Tokens, num_sms: int) -> Any:
        """Work split of the paged kernel over SMs for ratio-4 entries, once per forward."""

    def top_entries(self, scores: Any, tokens: Tokens, config: Dsv4Config) -> Any:
        """Which compressed entries each token attends to: [T, entries] bool."""

    def attention(
        self,
        q: Any,
        selected: Any,
        ape: Any,
        norm: Any,
        sink: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
    ) -> Any:
        """Window and compressed attention with sink, output rotated back: [T, h, D]."""

    def group_heads(self, x: Any, groups: int) -> Any:
        """[T, h, D] -> [T, groups, h * D / groups]."""

    def flatten_heads(self, x: Any) -> Any:
        """[T, a, b] -> [T, a * b]."""

    def mla_absorbed(self, weight: Any, config: Dsv3Config) -> tuple[Any, Any]:
        """From FP8 kv_b_proj: bf16 ([h, nope, kv_lora], [h, v, kv_lora]) for absorbed decode."""

    def mla_store(
        self, latent: Any, weight: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> Any:
        """Norm the latent, rotate its rope part, cache both; returns the normed latent."""

    def mla_extend(self, q: Any, kv: Any, tokens: Tokens, layer: int, config: Dsv3Config) -> Any:
        """Multi-head attention over the batch's own tokens: [T, h * v_head_dim]."""

    def mla_decode(
        self, q: Any, w_kc: Any, w_vc: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> Any:
        """Absorbed attention over the cached latents: [T, h * v_head_dim]."""

    def top_k(self, logits: Any, bias: Any, config: MoeConfig) -> Routing:
        """Expert selection from gate logits fp32 [T, experts]."""

    def hash_top_k(self, logits: Any, table: Any, tokens: Tokens, config: MoeConfig) -> Routing:
        """Experts looked up by token id, weighted by the gate."""

    def dispatch_contiguous(
        self, x: Any, routing: Routing, experts: tuple[int, int], rows: int
    ) -> Dispatched:
        """Sort tokens by local expert, each expert's rows padded to 128, into ``rows`` rows."""

    def dispatch_masked(
        self, x: Any, routing: Routing, experts: tuple[int, int], rows: int, expected_m: int
    ) -> Dispatched:
        """One block of ``rows`` rows per local expert."""

    def silu_and_mul(self, x: Any, limit: float) -> Any:
        """[..., 2 * N] -> [..., N]: silu(first half) * second half, clamped where limit > 0."""

    def combine(self, y: Any, slots: Any, routing: Routing, factor: float) -> Any:
        """Weighted sum of each token's expert outputs, times ``factor``: [T, H]."""
