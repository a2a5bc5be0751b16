"""Steps of attention and of the hyper-connections around it."""

from __future__ import annotations

from typing import Any

from runner.backend.announcer import Announcer
from runner.backend.math import Tokens
from runner.backend.pairs import causal_pairs, visible_entries
from runner.config.model import Dsv3Config, Dsv4Config


class AttentionSteps(Announcer):
    """Hyper-connections, DSV4 attention and MLA."""

    def hc_pre(
        self, x: Any, gemm: Any, base: Any, scale: Any, config: Dsv4Config
    ) -> tuple[Any, Any, Any]:
        """See :meth:`Math.hc_pre`."""
        traffic = x.nbytes + x.nbytes // config.hc_mult
        return self._compute(
            "hc_pre", traffic, lambda: self.math.hc_pre(x, gemm, base, scale, config)
        )

    def hc_post(self, y: Any, x: Any, post: Any, comb: Any) -> Any:
        """See :meth:`Math.hc_post`."""
        return self._compute(
            "hc_post", 2 * x.nbytes + y.nbytes, lambda: self.math.hc_post(y, x, post, comb)
        )

    def hc_head(self, x: Any, fn: Any, base: Any, scale: Any, config: Dsv4Config) -> Any:
        """See :meth:`Math.hc_head`."""
        traffic = x.nbytes + x.nbytes // config.hc_mult
        return self._compute(
            "hc_head", traffic, lambda: self.math.hc_head(x, fn, base, scale, config)
        )

    def q_norm_rope(self, q: Any, tokens: Tokens, layer: int, config: Dsv4Config) -> Any:
        """See :meth:`Math.q_norm_rope`."""
        return self._compute(
            "q_norm_rope", 2 * q.nbytes, lambda: self.math.q_norm_rope(q, tokens, layer, config)
        )

    def store_kv(
        self, kv: Any, weight: Any, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> None:
        """See :meth:`Math.store_kv`."""
        self._compute(
            "store_kv",
            2 * kv.nbytes,
            lambda: self.math.store_kv(kv, weight, tokens, layer, config),
        )

    def store_compressor(self, name: str, raw: Any, tokens: Tokens, layer: int) -> None:
        """See :meth:`Math.store_compressor`."""
        self._compute(
            "store_compressor",
            2 * raw.nbytes,
            lambda: self.math.store_compressor(name, raw, tokens, layer),
        )

    def index_query(self, q: Any, tokens: Tokens, layer: int, config: Dsv4Config) -> Any:
        """See :meth:`Math.index_query`."""
        return self._compute(
            "index_query", 2 * q.nbytes, lambda: self.math.index_query(q, tokens, layer, config)
        )

    def top_entries(self, scores: Any, tokens: Tokens, config: Dsv4Config) -> Any:
        """See :meth:`Math.top_entries`."""
        return self._compute(
            "top_entries", scores.nbytes, lambda: self.math.top_entries(scores, tokens, config)
        )

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
        """See :meth:`Math.attention`."""
        visible = visible_entries(tokens, config, layer)
        _, heads, dim = q.shape
        return self._compute(
            "attention",
            2 * q.nbytes + 2 * visible * dim,
            lambda: self.math.attention(q, selected, ape, norm, sink, tokens, layer, config),
            flops=4 * visible * heads * dim,
        )

    def group_heads(self, x: Any, groups: int) -> Any:
        """A view; no operation."""
        return self.math.group_heads(x, groups)

    def flatten_heads(self, x: Any) -> Any:
        """A view; no operation."""
        return self.math.flatten_heads(x)

    def mla_store(
        self, latent: Any, weight: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> Any:
        """See :meth:`Math.mla_store`."""
        return self._compute(
            "mla_store",
            2 * latent.nbytes,
            lambda: self.math.mla_store(latent, weight, tokens, layer, config),
        )

    def mla_extend(self, q: Any, kv: Any, tokens: Tokens, layer: int, config: Dsv3Config) -> Any:
        """See :meth:`Math.mla_extend`."""
        pairs = causal_pairs(tokens)
        return self._compute(
            "mla_extend",
            q.nbytes + kv.nbytes,
            lambda: self.math.mla_extend(q, kv, tokens, layer, config),
            flops=4 * pairs * q.shape[1],
        )

    def mla_decode(
        self, q: Any, w_kc: Any, w_vc: Any, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> Any:
        """See :meth:`Math.mla_decode`."""
        pairs = causal_pairs(tokens)
        heads = w_kc.shape[0]
        return self._compute(
            "mla_decode",
            q.nbytes + w_kc.nbytes + w_vc.nbytes + 2 * pairs * config.kv_lora_rank,
            lambda: self.math.mla_decode(q, w_kc, w_vc, tokens, layer, config),
            flops=4 * pairs * heads * config.kv_lora_rank,
        )
