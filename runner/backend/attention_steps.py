"""Steps of attention, of the indexer, and of the hyper-connections around them."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain, islice

from runner.backend.forward_batch import LayerTokens, Tokens
from runner.backend.step_runner import StepRunner
from runner.backend.tensor import Fp8Weight, MixWeights, PoolWeights, Tensor, reshaped, spec
from runner.config.model import Dsv3Config, Dsv4Config
from runner.kernels.types import DeepGemmKernelType as T


class AttentionSteps(StepRunner):
    """Hyper-connections, DSV4 attention with its indexer, and MLA."""

    # -- hyper-connections ------------------------------------------------------------------------

    def hc_pre(
        self, x: Tensor, gemm: tuple[Tensor, Tensor], mix: MixWeights, config: Dsv4Config
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the copies into one input: ([T, H], post fp32 [T, M], comb fp32 [T, M, M])."""
        tokens, copies = x.shape[0], config.hc_mult
        return self._compute(
            "hc_pre",
            x.nbytes + x.nbytes // copies,
            (
                spec(tokens, x.shape[1] // copies),
                spec(tokens, copies, dtype="fp32"),
                spec(tokens, copies, copies, dtype="fp32"),
            ),
            lambda math: math.hc_pre(x, gemm, mix, config),
        )

    def hc_post(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """New residual stream [T, M * H] from the sub-layer's output [T, H] and the old stream."""
        return self._compute(
            "hc_post", 2 * x.nbytes + y.nbytes, x, lambda math: math.hc_post(y, x, post, comb)
        )

    def hc_head(self, x: Tensor, mix: MixWeights, config: Dsv4Config) -> Tensor:
        """Collapse the residual stream at the end: [T, M * H] -> [T, H]."""
        return self._compute(
            "hc_head",
            x.nbytes + x.nbytes // config.hc_mult,
            spec(x.shape[0], x.shape[1] // config.hc_mult),
            lambda math: math.hc_head(x, mix, config),
        )

    # -- DSV4 attention ---------------------------------------------------------------------------

    def q_norm_rope(self, q: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        """[T, h * D] -> [T, h, D]: norm each head without weight, then rotate its last part."""
        dim = at.config.head_dim
        return self._compute(
            "q_norm_rope",
            2 * q.nbytes,
            spec(q.shape[0], q.shape[1] // dim, dim),
            lambda math: math.q_norm_rope(q, at),
        )

    def store_kv(self, kv: Tensor, weight: Tensor, at: LayerTokens[Dsv4Config]) -> None:
        """Norm and rotate the shared key-value rows [T, D] and put them into the cache."""
        self._compute("store_kv", 2 * kv.nbytes, None, lambda math: math.store_kv(kv, weight, at))

    def store_compressor(self, name: str, raw: Tensor, at: LayerTokens[Dsv4Config]) -> None:
        """Put a compressor's projections [T, N] fp32 into the cache."""
        self._compute(
            "store_compressor",
            2 * raw.nbytes,
            None,
            lambda math: math.store_compressor(name, raw, at),
        )

    def index_query(self, q: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        """Rotate the indexer's query: [T, heads * dim] -> [T, heads, dim]."""
        return self._compute(
            "index_query",
            2 * q.nbytes,
            spec(q.shape[0], at.config.index_n_heads, at.config.index_head_dim),
            lambda math: math.index_query(q, at),
        )

    def paged_mqa_metadata(self, tokens: Tokens) -> Tensor:
        """How the paged kernel splits ratio-4 entries over SMs; computed once per forward."""
        sms = self.gemm_sms
        return self._kernel(
            self._call(T.PAGED_MQA_LOGITS_METADATA, tokens.count, 1, 1, 1),
            spec(sms + 1, 2, dtype="int32"),
            lambda math: math.paged_mqa_metadata(tokens, sms),
        )

    def mqa_logits(
        self,
        q: Tensor,
        weights: Tensor,
        pool: PoolWeights,
        at: LayerTokens[Dsv4Config],
        metadata: Tensor | None,
    ) -> Tensor:
        """Index scores of each token against compressed entries: [T, entries] fp32.

        Takes q [T, heads, dim] and head weights [T, heads]. ``metadata`` comes from
        :meth:`paged_mqa_metadata`; without it, keys are read without pages.
        """
        m, heads, dim = q.shape
        self._quantise(q)
        kind = T.FP8_MQA_LOGITS if metadata is None else T.FP8_PAGED_MQA_LOGITS
        return self._kernel(
            self._call(kind, m, heads, dim, 1),
            spec(m, at.tokens.batch.compressed_entries(4), dtype="fp32"),
            lambda math: math.mqa_logits(q, weights, pool, at, metadata),
        )

    def top_entries(self, scores: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        """Which compressed entries each token attends to: [T, entries] bool."""
        return self._compute(
            "top_entries", scores.nbytes, scores, lambda math: math.top_entries(scores, at)
        )

    def attention(
        self,
        q: Tensor,
        selected: Tensor | None,
        pool: PoolWeights | None,
        sink: Tensor,
        at: LayerTokens[Dsv4Config],
    ) -> Tensor:
        """Softmax over window rows, compressed entries and a sink, rotated back: [T, h, D].

        Only layers with ratio 4 have ``selected`` [T, entries]; only layers with compression have
        ``pool``. ``sink`` [h] fp32 holds the logits of a virtual key without value.
        """
        visible = visible_entries(at)
        _, heads, dim = q.shape
        return self._compute(
            "attention",
            2 * q.nbytes + 2 * visible * dim,
            q,
            lambda math: math.attention(q, selected, pool, sink, at),
            flops=4 * visible * heads * dim,
        )

    # -- DSV3 attention ---------------------------------------------------------------------------

    def mla_absorbed(self, weight: Fp8Weight, config: Dsv3Config) -> tuple[Tensor, Tensor]:
        """FP8 kv_b_proj -> bf16 ([h, nope, kv_lora], [h, v, kv_lora]) for absorbed decode.

        This happens before a run, when weights are made, so it records no operation.
        """
        nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
        heads = weight.n // (nope + v_dim)
        return self._without_operation(
            (spec(heads, nope, weight.k), spec(heads, v_dim, weight.k)),
            lambda math: math.mla_absorbed(weight, config),
        )

    def mla_store(self, latent: Tensor, weight: Tensor, at: LayerTokens[Dsv3Config]) -> Tensor:
        """Norm the latent, rotate its rope part, cache both, and return the normed latent."""
        return self._compute(
            "mla_store",
            2 * latent.nbytes,
            reshaped(latent, latent.shape[0], at.config.kv_lora_rank),
            lambda math: math.mla_store(latent, weight, at),
        )

    def mla_extend(self, q: Tensor, kv: Tensor, at: LayerTokens[Dsv3Config]) -> Tensor:
        """Causal attention of this rank's q over kv [all tokens, h * (nope + v)]: [T, h * v]."""
        config = at.config
        heads = q.shape[1] // (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return self._compute(
            "mla_extend",
            q.nbytes + kv.nbytes,
            spec(q.shape[0], heads * config.v_head_dim),
            lambda math: math.mla_extend(q, kv, at),
            flops=4 * causal_pairs(at.tokens) * q.shape[1],
        )

    def mla_decode(
        self, q: Tensor, absorbed: tuple[Tensor, Tensor], at: LayerTokens[Dsv3Config]
    ) -> Tensor:
        """Attention over cached latents with absorbed weights: [T, h * v_head_dim]."""
        w_kc, w_vc = absorbed
        pairs, heads, rank = causal_pairs(at.tokens), w_kc.shape[0], at.config.kv_lora_rank
        return self._compute(
            "mla_decode",
            q.nbytes + w_kc.nbytes + w_vc.nbytes + 2 * pairs * rank,
            spec(q.shape[0], heads * at.config.v_head_dim),
            lambda math: math.mla_decode(q, absorbed, at),
            flops=4 * pairs * heads * rank,
        )


# -- number of (query, key) pairs that attention works on -----------------------------------------


def causal_pairs(tokens: Tokens) -> int:
    """(query, key) pairs under full causal attention."""
    return sum(count * (position + 1) for position, count in _positions(tokens))


def visible_entries(at: LayerTokens[Dsv4Config]) -> int:
    """(query, key) pairs of one DSV4 layer: window plus compressed entries."""
    return _count_visible(_positions(at.tokens), at.config.compress_ratio(at.layer), at.config)


@lru_cache(maxsize=256)
def _count_visible(positions: tuple[tuple[int, int], ...], ratio: int, config: Dsv4Config) -> int:
    total = 0
    for position, count in positions:
        visible = min(position + 1, config.sliding_window)
        if ratio:
            entries = (position + 1) // ratio
            visible += min(entries, config.index_topk) if ratio == 4 else entries
        total += count * visible
    return total


def _positions(tokens: Tokens) -> tuple[tuple[int, int], ...]:
    """(position, number of the rank's tokens at that position) for each position."""
    batch = tokens.batch
    return _count_positions(batch.seq_lens, batch.extend_seq_lens, tokens.start, tokens.stop)


@lru_cache(maxsize=64)
def _count_positions(
    seq_lens: tuple[int, ...], new_lens: tuple[int, ...], start: int, stop: int
) -> tuple[tuple[int, int], ...]:
    each = (range(length - new, length) for length, new in zip(seq_lens, new_lens, strict=True))
    return tuple(Counter(islice(chain.from_iterable(each), start, stop)).items())
