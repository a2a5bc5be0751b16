"""``Backend``: what the model's forward is written against.

Each method is one step of the forward. It announces the step's operations, with shapes taken from
the tensors at hand, to a sink, and leaves the work to a ``Math``; communication goes to a
``Communicator``. The same class serves the record backend and the torch backend, so the two
cannot differ in what they call, only in how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

from runner.backend.communicator import Communicator
from runner.backend.kernel_store import KernelStore, NoKernels
from runner.backend.layout import (
    MASKED_BUDGET,
    contiguous_rows,
    hc_num_splits,
    masked_bytes,
    masked_expected_m,
    masked_rows,
)
from runner.backend.math import Dispatched, Math, Routing, Tokens
from runner.backend.pairs import causal_pairs, visible_entries
from runner.backend.sink import OpSink, R
from runner.bf16_fp32 import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.model import Dsv3Config, Dsv4Config, MoeConfig
from runner.errors import UserError
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel
from runner.schedule import (
    BARRIER,
    EXCHANGE,
    Await,
    Begin,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Recv,
    Send,
    Walk,
)
from runner.walks import ExecutionHook


@dataclass(frozen=True, slots=True)
class Begun:
    """A collective under way: its name, and what the communicator keeps of it."""

    name: str
    handle: Any


@dataclass(frozen=True)
class Backend:
    """One rank's interpreter of the forward.

    Attributes:
        math: does the work behind each step.
        comm: moves tensors between ranks.
        sink: is told every operation in order.
        num_sms: SMs of the GPU that runs, or would run, the kernels.
        bf16_fp32_algo: what computes bf16 x bf16 -> fp32 GEMMs.
        masked_budget: bytes that a masked expert layout may take before the contiguous one is
            used instead, as SGLang's automatic layout choice does with a share of free memory.
        kernels: where compiled kernels come from.
        hook: tells what to walk before a call.
        left: SMs that GEMMs leave to communication, the innermost block's last.
    """

    math: Math
    comm: Communicator
    sink: OpSink
    num_sms: int
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    masked_budget: int = MASKED_BUDGET
    kernels: KernelStore = field(default_factory=NoKernels)
    hook: ExecutionHook = field(default_factory=ExecutionHook)
    left: list[int] = field(default_factory=lambda: [0])

    @property
    def gemm_sms(self) -> int:
        """SMs that GEMMs use at the moment."""
        return self.num_sms - self.left[-1]

    @contextmanager
    def leaving_sms(self, count: int) -> Iterator[None]:
        """GEMMs inside the block leave ``count`` SMs to communication.

        Raises:
            UserError: none would be left.
        """
        if count >= self.num_sms:
            raise UserError(f"comm_sms = {count} leaves none of the GPU's {self.num_sms} SMs")
        self.left.append(count)
        try:
            with self.math.gemm_sms(self.gemm_sms if count else None):
                yield
        finally:
            self.left.pop()

    # -- marks and plain steps ------------------------------------------------------------------

    def mark(self, kind: str, name: str) -> None:
        """Note a point of the forward: a phase, a layer, a yield."""
        self.sink.run(Mark(kind, name), lambda: None)

    def embed(self, tokens: Tokens, weight: Any, first_row: int, hidden: int) -> Any:
        """See :meth:`Math.embed`."""
        return self._compute(
            "embed", 4 * tokens.count * hidden, lambda: self.math.embed(tokens, weight, first_row)
        )

    def repeat(self, x: Any, copies: int) -> Any:
        """See :meth:`Math.repeat`."""
        return self._compute("repeat", (1 + copies) * x.nbytes, lambda: self.math.repeat(x, copies))

    def rows(self, x: Any, start: int, stop: int) -> Any:
        """A view of some rows; no operation."""
        return self.math.rows(x, start, stop)

    def padded(self, x: Any, rows: int) -> Any:
        """See :meth:`Math.padded`; no operation."""
        return x if x.shape[0] == rows else self.math.padded(x, rows)

    def joined(self, *parts: Any) -> Any:
        """See :meth:`Math.joined`."""
        traffic = 2 * sum(_bf16_bytes(part) for part in parts)
        return self._compute("join", traffic, lambda: self.math.joined(parts))

    def columns(self, x: Any, *sizes: int) -> list[Any]:
        """Cut [T, sum(sizes)] into pieces of the given widths; no operation."""
        edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [self.math.columns(x, a, b) for a, b in pairwise(edges)]

    def last_tokens(self, x: Any, tokens: Tokens) -> Any:
        """See :meth:`Math.last_tokens`."""
        return self.math.last_tokens(x, tokens.batch)

    def argmax(self, logits: Any) -> Any:
        """See :meth:`Math.argmax`."""
        return self._compute("argmax", logits.nbytes, lambda: self.math.argmax(logits))

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """See :meth:`Math.rms_norm`."""
        return self._compute("rms_norm", 2 * x.nbytes, lambda: self.math.rms_norm(x, weight, eps))

    def add(self, x: Any, y: Any) -> Any:
        """See :meth:`Math.add`."""
        return self._compute("add", 3 * _bf16_bytes(x), lambda: self.math.add(x, y))

    def linear(self, x: Any, weight: Any) -> Any:
        """See :meth:`Math.linear`."""
        m, k = x.shape
        n = weight.shape[0]
        traffic = 2 * (m * k + n * k + m * n)
        return self._compute(
            "linear", traffic, lambda: self.math.linear(x, weight), flops=2 * m * n * k
        )

    # -- DeepGEMM kernels -----------------------------------------------------------------------

    def gemm_fp8(self, x: Any, weight: Any, *, partial: bool = False) -> Any:
        """Dense FP8 GEMM; see :meth:`Math.gemm_fp8`."""
        m, k = x.shape
        self._quantise(x)
        call = self._call(T.GEMM_NT_F8F8BF16, m, weight.n, k, 1)
        return self._kernel(call, lambda: self.math.gemm_fp8(x, weight, partial=partial))

    def gemm_bf16_fp32(self, x: Any, weight: Any) -> Any:
        """bf16 GEMM with fp32 output; see :meth:`Math.gemm_bf16_fp32`.

        Only DeepGEMM's is a kernel call: the others' kernels come compiled with their libraries.
        """
        m, k = x.shape
        n = weight.shape[0]
        algo = self.bf16_fp32_algo

        def work() -> Any:
            return self.math.gemm_bf16_fp32(x, weight, algo)

        if algo is Bf16Fp32Algo.DEEP_GEMM:
            return self._kernel(self._call(T.GEMM_NT_BF16BF16F32, m, n, k, 1), work)
        traffic = 2 * (m * k + n * k) + 4 * m * n
        return self._compute("linear_bf16_fp32", traffic, work, flops=2 * m * n * k)

    def einsum_fp8(self, x: Any, weight: Any) -> Any:
        """Grouped output projection; see :meth:`Math.einsum_fp8`."""
        m, groups, k = x.shape
        self._quantise(x)
        call = self._call(T.FP8_EINSUM_BHR_HDR_BHD, m, weight.n, k, groups)
        return self._kernel(call, lambda: self.math.einsum_fp8(x, weight))

    def hc_prenorm(self, x: Any, fn: Any) -> Any:
        """Hyper-connection GEMM with splits; see :meth:`Math.hc_prenorm`."""
        m, k = x.shape
        splits = hc_num_splits(m, k, self.num_sms)
        call = self._call(T.TF32_HC_PRENORM_GEMM, m, fn.shape[0], k, splits)
        return self._kernel(call, lambda: self.math.hc_prenorm(x, fn, splits))

    def experts_gemm(self, dispatched: Dispatched, weight: Any, *, partial: bool = False) -> Any:
        """Grouped GEMM over the local experts, contiguous or masked as the tokens are laid out."""
        k = dispatched.x.shape[-1]
        self._quantise(dispatched.x)
        masked = len(dispatched.x.shape) == 3
        kind = T.GROUPED_GEMM_NT_F8F8BF16_MASKED if masked else T.GROUPED_GEMM_NT_F8F8BF16_CONTIG
        work = self.math.gemm_fp8_masked if masked else self.math.gemm_fp8_contiguous
        call = self._call(kind, dispatched.expected_m, weight.n, k, weight.groups)
        return self._kernel(call, lambda: work(dispatched, weight, partial=partial))

    def paged_mqa_metadata(self, tokens: Tokens) -> Any:
        """See :meth:`Math.paged_mqa_metadata`."""
        call = self._call(T.PAGED_MQA_LOGITS_METADATA, tokens.count, 1, 1, 1)
        return self._kernel(call, lambda: self.math.paged_mqa_metadata(tokens, self.gemm_sms))

    def mqa_logits(
        self, q: Any, weights: Any, ape: Any, norm: Any, tokens: Tokens, layer: int,
        config: Dsv4Config, metadata: Any,
    ) -> Any:  # fmt: skip
        """See :meth:`Math.mqa_logits`; paged where ``metadata`` is given."""
        m, heads, dim = q.shape
        self._quantise(q)
        paged = metadata is not None
        kind = T.FP8_PAGED_MQA_LOGITS if paged else T.FP8_MQA_LOGITS
        return self._kernel(
            self._call(kind, m, heads, dim, 1),
            lambda: self.math.mqa_logits(
                q, weights, ape, norm, tokens, layer, config, paged=paged, metadata=metadata
            ),
        )

    # -- kernels themselves ---------------------------------------------------------------------

    def build_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.build`."""
        self.sink.run(KernelWork("build", kernels), lambda: self.kernels.build(kernels))

    def verify_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.verify`."""
        self.sink.run(KernelWork("verify", kernels), lambda: self.kernels.verify(kernels))

    def load_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.load`."""
        self.sink.run(KernelWork("load", kernels), lambda: self.kernels.load(kernels))

    def barrier(self, group: tuple[int, ...]) -> None:
        """See :meth:`KernelStore.wait`; ``group`` is every rank."""
        self.sink.run(Collective(BARRIER, group, 0), self.kernels.wait)

    def walk(self, walk: Walk) -> None:
        """See :meth:`KernelStore.walk`."""
        self.sink.run(walk, lambda: self.kernels.walk(walk))

    def capture(self, name: str, forward: Callable[[], Any]) -> None:
        """Capture a CUDA graph of ``forward``; its operations are counted, not announced."""
        self.sink.capture(name, forward)

    def exchange_kernels(self, group: tuple[int, ...], nbytes: int) -> None:
        """See :meth:`KernelStore.exchange`; every rank of ``group`` takes part."""
        self.sink.run(Collective(EXCHANGE, group, nbytes), self.kernels.exchange)

    # -- hyper-connections ----------------------------------------------------------------------

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

    # -- attention ------------------------------------------------------------------------------

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
        self, q: Any, selected: Any, ape: Any, norm: Any, sink: Any, tokens: Tokens, layer: int,
        config: Dsv4Config,
    ) -> Any:  # fmt: skip
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

    # -- mixture of experts ---------------------------------------------------------------------

    def top_k(self, logits: Any, bias: Any, config: MoeConfig) -> Routing:
        """See :meth:`Math.top_k`."""
        return self._compute("top_k", logits.nbytes, lambda: self.math.top_k(logits, bias, config))

    def hash_top_k(self, logits: Any, table: Any, tokens: Tokens, config: MoeConfig) -> Routing:
        """See :meth:`Math.hash_top_k`."""
        return self._compute(
            "hash_top_k",
            logits.nbytes,
            lambda: self.math.hash_top_k(logits, table, tokens, config),
        )

    def dispatch(
        self, x: Any, routing: Routing, experts: tuple[int, int], config: MoeConfig,
        intermediate: int, *, decode: bool,
    ) -> Dispatched:  # fmt: skip
        """Lay tokens out by local expert: masked in DECODE within the budget, else contiguous."""
        tokens, hidden = x.shape
        local = experts[1] - experts[0]
        rows = masked_rows(tokens)
        fits = masked_bytes(local, rows, hidden, intermediate) <= self.masked_budget
        choices = tokens * config.num_experts_per_tok
        if decode and fits:
            expected_m = masked_expected_m(choices, config.n_routed_experts)
            return self._compute(
                "dispatch_masked",
                2 * choices * hidden * 2,
                lambda: self.math.dispatch_masked(x, routing, experts, rows, expected_m),
            )
        rows = contiguous_rows(choices, local)
        return self._compute(
            "dispatch_contiguous",
            2 * choices * hidden * 2,
            lambda: self.math.dispatch_contiguous(x, routing, experts, rows),
        )

    def block_for_each(self, x: Any, routing: Routing, ranks: int, per_rank: int) -> Any:
        """See :meth:`Math.block_for_each`."""
        traffic = (1 + ranks) * _bf16_bytes(x)
        return self._compute(
            "block_for_each", traffic, lambda: self.math.block_for_each(x, routing, ranks, per_rank)
        )

    def sum_blocks(self, x: Any, blocks: int) -> Any:
        """See :meth:`Math.sum_blocks`."""
        traffic = _bf16_bytes(x) * (1 + blocks) // blocks
        return self._compute("sum_blocks", traffic, lambda: self.math.sum_blocks(x, blocks))

    def silu_and_mul(self, x: Any, limit: float) -> Any:
        """See :meth:`Math.silu_and_mul`."""
        return self._compute(
            "silu_and_mul", x.nbytes + x.nbytes // 2, lambda: self.math.silu_and_mul(x, limit)
        )

    def combine(self, y: Any, dispatched: Dispatched, routing: Routing, factor: float) -> Any:
        """See :meth:`Math.combine`."""
        choices = prod(routing.ids.shape)
        return self._compute(
            "combine",
            2 * choices * y.shape[-1],
            lambda: self.math.combine(y, dispatched.slots, routing, factor),
        )

    # -- communication --------------------------------------------------------------------------

    def all_reduce(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum over ``group``; nothing happens in a group of one."""
        if len(group) == 1:
            return x
        op = Collective(f"all_reduce {name}", group, x.nbytes)
        return self.sink.run(op, lambda: self.comm.all_reduce(x, group))

    def sum_hidden(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum partial results [T, H] over ``group`` into hidden states, bf16 on the wire.

        The CPU reference really moves wider partial sums; the operation is the real model's.
        """
        if len(group) > 1:
            op = Collective(f"all_reduce {name}", group, _bf16_bytes(x))
            x = self.sink.run(op, lambda: self.comm.all_reduce(x, group))
        return self.math.round_hidden(x)

    def all_gather(self, name: str, x: Any, group: tuple[int, ...], dim: int) -> Any:
        """Concatenate over ``group`` along ``dim``; nothing happens in a group of one."""
        if len(group) == 1:
            return x
        op = Collective(f"all_gather {name}", group, x.nbytes)
        return self.sink.run(op, lambda: self.comm.all_gather(x, group, dim))

    def reduce_scatter(self, name: str, x: Any, group: tuple[int, ...]) -> Any:
        """Sum partial results [T, H] over ``group``; each rank keeps its block of the rows."""
        op = Collective(f"reduce_scatter {name}", group, _bf16_bytes(x))
        return self.sink.run(op, lambda: self.comm.end(self.comm.begin("reduce_scatter", x, group)))

    def begin(
        self, kind: str, name: str, x: Any, group: tuple[int, ...], *, width: int = 2
    ) -> Begun:
        """Start a collective that goes on beside what follows; see :meth:`Communicator.begin`.

        Args:
            kind: of the collective.
            name: what is moved; no two that are under way have one.
            x: what a rank gives.
            group: world ranks.
            width: bytes of an element on the wire; the CPU reference may really move more.
        """
        op = Begin(f"{kind} {name}", group, width * int(prod(x.shape)))
        return Begun(op.name, self.sink.run(op, lambda: self.comm.begin(kind, x, group)))

    def finish(self, begun: Begun) -> Any:
        """Wait for a collective and take its result."""
        return self.sink.run(Await(begun.name), lambda: self.comm.end(begun.handle))

    def send(self, name: str, x: Any, peer: int) -> None:
        """Send to a world rank."""
        self.sink.run(Send(name, peer, x.nbytes), lambda: self.comm.send(x, peer))

    def recv(self, name: str, shape: tuple[int, ...], dtype: str, nbytes: int, peer: int) -> Any:
        """Receive from a world rank; blocks until it is there."""
        return self.sink.run(Recv(name, peer, nbytes), lambda: self.comm.recv(shape, dtype, peer))

    # -- helpers --------------------------------------------------------------------------------

    def _call(self, kind: T, m: int, n: int, k: int, groups: int) -> KernelCall:
        # What asks for the whole GPU does so beside communication too.
        sms = self.num_sms if kind is T.TF32_HC_PRENORM_GEMM else self.gemm_sms
        return KernelCall(kind, m, n, k, groups, sms)

    def _kernel(self, call: KernelCall, work: Callable[[], R]) -> R:
        for walk in self.hook.before(call):
            self.walk(walk)
        return self.sink.run(call, work)

    def _quantise(self, x: Any) -> None:
        """Announce the activation quantisation; the work is part of the GEMM's math."""
        self.sink.run(Compute("quantise_fp8", 0, x.nbytes + x.nbytes // 2), lambda: None)

    def _compute(self, name: str, nbytes: int, work: Callable[[], R], *, flops: int = 0) -> R:
        return self.sink.run(Compute(name, flops, nbytes), work)


def _bf16_bytes(x: Any) -> int:
    return 2 * int(prod(x.shape))
