"""A deployment: which GEMMs its ranks run, and with which M.

The GEMMs are found by running the model's own forward on shapes, stage by stage, so that the plan
cannot know other GEMMs than the forward runs. Their M follow from the tokens a forward may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.sink import ScheduleRecorder
from runner.backend.token_to_m import (
    contiguous_rows,
    hc_num_splits,
    masked_expected_m,
    masked_token_limit,
)
from runner.config.gemm_algo import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.driver.model_runner import ModelRunner
from runner.driver.warmup import DisaggregationMode
from runner.errors import UserError
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT, ceil_div
from runner.kernels.rules import RULES
from runner.kernels.rules_sm90 import METADATA_MAX_ROWS
from runner.kernels.source import KernelSource
from runner.kernels.table import Demand
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.model.dsv4_attention import NONPAGED_MIN_QUERY_TOKENS
from runner.model.stage import OVERLAPPED
from runner.model.strategy import OverlapStrategy
from runner.planning.plan import Plan, make_plan
from runner.schedule import Mark

MAX_TOKENS = 131072
"""Largest M that SGLang's warm-up ever walks to; more tokens than that in a forward are refused."""

Gemm = tuple[T, int, int, bool]
"""Type, n, k, and whether a rank's block of the tokens goes in: what calls of one GEMM share."""

MAX_SMS = 1024
"""More than any GPU has."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What decides the kernels that a server can ever need.

    Attributes:
        num_sms: SMs of the GPU.
        reduced_num_sms: other SM counts that an overlap strategy leaves to GEMMs.
        max_tokens: most tokens of an EXTEND forward (the chunked prefill size).
        decode_batch_sizes: tokens of DECODE forwards (the captured graphs' batch sizes); None
            means any number up to ``max_tokens``.
        disaggregation: a prefill node never decodes, a decode node never extends.
        bf16_fp32_algo: see :class:`runner.backend.base.Backend`.
        overlap: strategies of two-batch overlap; those that leave SMs to communication run the
            halves of their mode's batches with other kernels.
        without: types that something else than DeepGEMM serves.
    """

    model: ModelConfig
    parallel: ParallelConfig
    num_sms: int = 132
    reduced_num_sms: tuple[int, ...] = ()
    max_tokens: int = 16384
    decode_batch_sizes: tuple[int, ...] | None = None
    disaggregation: DisaggregationMode = DisaggregationMode.NONE
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    overlap: tuple[OverlapStrategy, ...] = ()
    without: frozenset[T] = frozenset()

    def __post_init__(self) -> None:
        if not self.parallel.attn_cp <= self.max_tokens <= MAX_TOKENS:
            raise UserError(
                f"max-tokens {self.max_tokens} must lie in {self.parallel.attn_cp}..{MAX_TOKENS}"
            )
        if not 1 <= self.num_sms <= MAX_SMS:
            raise UserError(f"num-sms {self.num_sms} must lie in 1..{MAX_SMS}")
        for count in self.reduced_num_sms:
            if not 1 <= count <= self.num_sms:
                raise UserError(f"reduced num-sms {count} must lie in 1..{self.num_sms}")
        sizes = self.decode_batch_sizes
        if sizes is not None and not (sizes and 1 <= min(sizes) <= max(sizes) <= MAX_TOKENS):
            raise UserError(
                f"decode batch sizes {','.join(map(str, sizes)) or '(none)'} must lie in "
                f"1..{MAX_TOKENS}"
            )
        if sizes is not None and self.disaggregation is DisaggregationMode.PREFILL:
            raise UserError("decode batch sizes mean nothing for a prefill node: it never decodes")
        self.parallel.check_fits(self.model)

    @property
    def extend_tokens(self) -> range:
        """Tokens that an EXTEND forward may have."""
        if self.disaggregation is DisaggregationMode.DECODE:
            return range(0)
        step = self.parallel.attn_cp
        return range(step, self.max_tokens + 1, step)

    @property
    def decode_tokens(self) -> Sequence[int]:
        """Tokens that a DECODE forward may have."""
        if self.disaggregation is DisaggregationMode.PREFILL:
            return range(0)
        if self.decode_batch_sizes is not None:
            return tuple(sorted(set(self.decode_batch_sizes)))
        return range(1, self.max_tokens + 1)

    def half_tokens(self, mode: ForwardMode) -> Sequence[int]:
        """Tokens that half of a forward may have: DECODE is cut in the middle, EXTEND anywhere."""
        if mode.is_extend:
            return range(1, max(self.extend_tokens, default=1))
        return sorted(
            {
                half
                for count in self.decode_tokens
                if count > 1
                for half in (count // 2, count - count // 2)
            }
        )

    def at_experts(self, tokens: int) -> int:
        """Tokens that a rank's experts see: blocks of one size where ranks have blocks."""
        block = ceil_div(tokens, self.parallel.tp)
        return block * self.parallel.tp if self.parallel.moe_a2a else tokens

    @property
    def local_experts(self) -> int:
        """Experts that a rank holds at least a slice of."""
        experts = self.model.moe.n_routed_experts
        return experts // self.parallel.tp if self.parallel.ep else experts

    @property
    def masked_tokens(self) -> int:
        """Most tokens of a DECODE forward that still uses the masked expert layout."""
        width = self.model.moe.moe_intermediate_size
        width = width if self.parallel.ep else width // self.parallel.tp
        return masked_token_limit(self.local_experts, self.model.hidden_size, width)


@lru_cache(maxsize=32)
def plan_of(deployment: Deployment, source: KernelSource = RULES) -> Plan:
    """The deployment's plan.

    Raises:
        UserError: the source does not know all of its GEMMs.
    """
    needed = demands(deployment)
    return make_plan(needed, source.table(lambda: needed))


@lru_cache(maxsize=32)
def demands(deployment: Deployment) -> tuple[Demand, ...]:
    """Every GEMM of the deployment, with every M, in order of first use."""
    ms: dict[GemmShape, set[int]] = {}
    stages: dict[GemmShape, set[int]] = {}
    shapes_of: dict[tuple[ForwardMode, KernelCall, bool, bool], list[GemmShape]] = {}
    for stage in range(deployment.parallel.pp):
        run_by = {mode: _run_by(deployment, stage, mode) for mode in ForwardMode}
        for batch, calls in _probe(deployment, stage):
            largest = batch.num_tokens == _tokens(deployment, batch.mode)[-1]
            cut = run_by[batch.mode]
            for call in calls:
                if not largest and call.type not in MASKED_TYPES:
                    continue
                gemms = _gemms(deployment, call, {batch.num_tokens})
                in_halves = cut is not None and bool(gemms & cut[0])
                alone = cut is not None and not gemms & cut[1]
                at = (batch.mode, call, in_halves, alone)
                if at not in shapes_of:
                    tokens = _alone(deployment, batch.mode) if alone else None
                    found = list(_shapes(deployment, batch, call, tokens))
                    found += _halves(deployment, batch, call) if in_halves else []
                    shapes_of[at] = [shape for shape, _ in found]
                    for shape, values in found:
                        ms.setdefault(shape, set()).update(values)
                for shape in shapes_of[at]:
                    stages.setdefault(shape, set()).add(stage)
    return tuple(
        Demand(each, tuple(sorted(values)), tuple(sorted(stages[shape])))
        for shape, values in ms.items()
        for each in _with_reduced(deployment, shape)
        if values and shape.type not in deployment.without
    )


def _gemms(deployment: Deployment, call: KernelCall, tokens: set[int]) -> set[Gemm]:
    """What a call may be among those of forwards, or halves, of so many tokens.

    Of few tokens a block may have as many rows as all of them: then it may be either.
    """
    tp, by_rows = deployment.parallel.tp, call.type not in MASKED_TYPES | CONTIGUOUS_TYPES
    blocks = {ceil_div(count, tp) for count in tokens}
    of_block = {False}
    if deployment.parallel.moe_a2a and by_rows:
        of_block = {True, False} if min(tokens) < 2 * tp else {call.m in blocks}
    return {(call.type, call.n, call.k, either) for either in of_block}


def _alone(deployment: Deployment, mode: ForwardMode) -> Sequence[int]:
    """Tokens of forwards that cannot be cut in two: of one sequence."""
    tokens = _tokens(deployment, mode)
    return tokens if mode.is_extend else [count for count in tokens if count == 1]


def _run_by(
    deployment: Deployment, stage: int, mode: ForwardMode
) -> tuple[set[Gemm], set[Gemm]] | None:
    """GEMMs that a stage runs for halves of a mode's batches, and for batches that are cut.

    None where no strategy cuts them. Layers without experts run whole batches all the same.
    """
    most = max(_tokens(deployment, mode), default=0)
    if most < 2 or not any(strategy.mode is mode for strategy in deployment.overlap):
        return None
    runner, recorder = _shape_runner(deployment, stage, deployment.overlap)
    halves: set[Gemm] = set()
    whole: set[Gemm] = set()
    for batch in _cut_batches(deployment, mode, most):
        recorder.ops.clear()
        runner.forward(batch, runner.dummy_proxy(batch))
        cut = {half.num_tokens for half in batch.halves or ()}
        inside = False
        for op in recorder.ops:
            if isinstance(op, Mark) and op.kind in ("layer", "batch"):
                inside = (OVERLAPPED in op.name) if op.kind == "layer" else op.name != "both"
            elif isinstance(op, KernelCall) and (
                batch.num_tokens == most or op.type in MASKED_TYPES
            ):
                counts = cut if inside else {batch.num_tokens}
                (halves if inside else whole).update(_gemms(deployment, op, counts))
    return halves, whole


def _cut_batches(deployment: Deployment, mode: ForwardMode, most: int) -> Iterator[ForwardBatch]:
    """Batches of more than one sequence that between them run every GEMM of halves.

    The largest run all but masked experts, which the smallest DECODE runs, if any does.
    """
    if mode.is_extend:
        yield ForwardBatch.extend((1,) * most)
        yield ForwardBatch.extend((most - 1, 1))
        return
    for tokens in {min(count for count in deployment.decode_tokens if count > 1), most}:
        yield ForwardBatch.decode((1,) * tokens)


def _probe(
    deployment: Deployment, stage: int
) -> Iterator[tuple[ForwardBatch, Iterable[KernelCall]]]:
    """A stage's calls in forwards that between them run every GEMM it ever runs."""
    runner, recorder = _shape_runner(deployment, stage)
    for batch in _probe_batches(deployment):
        recorder.ops.clear()
        runner.forward(batch, runner.dummy_proxy(batch))
        yield batch, _calls(recorder)


def recorded_calls(
    deployment: Deployment, dummies: Iterable[tuple[int, ForwardMode]]
) -> list[KernelCall]:
    """Distinct calls of dummy runs (batch size, mode) of every stage."""
    found: dict[KernelCall, None] = {}
    wanted = list(dummies)
    for stage in range(deployment.parallel.pp):
        runner, recorder = _shape_runner(deployment, stage, deployment.overlap)
        for batch_size, mode in wanted:
            runner._dummy_run(batch_size, forward_mode_override=mode)
        found.update(_calls(recorder))
    return [call for call in found if call.type not in deployment.without]


def _shape_runner(
    deployment: Deployment, stage: int, overlap: tuple[OverlapStrategy, ...] = ()
) -> tuple[ModelRunner, ScheduleRecorder]:
    recorder = ScheduleRecorder()
    parallel = deployment.parallel
    backend = Backend(recorder, deployment.num_sms, bf16_fp32_algo=deployment.bf16_fp32_algo)
    runner = ModelRunner.build(
        deployment.model,
        parallel,
        parallel.rank_of(stage, 0),
        backend=backend,
        overlap=overlap,
    )
    return runner, recorder


def _calls(recorder: ScheduleRecorder) -> dict[KernelCall, None]:
    return dict.fromkeys(op for op in recorder.ops if isinstance(op, KernelCall))


def _probe_batches(deployment: Deployment) -> Iterator[ForwardBatch]:
    """The largest forwards, and the smallest DECODE: experts are masked there or nowhere."""
    extend, decode = deployment.extend_tokens, deployment.decode_tokens
    if extend:
        yield ForwardBatch.extend((1,) * extend[-1])
        if extend[-1] >= NONPAGED_MIN_QUERY_TOKENS:
            yield ForwardBatch.extend((extend[-1],))
    if decode:
        halves = deployment.half_tokens(ForwardMode.DECODE) if _halved(deployment) else ()
        yield ForwardBatch.decode((1,) * min(decode[0], *halves[:1], decode[-1]))
        yield ForwardBatch.decode((1,) * decode[-1])


def _halved(deployment: Deployment) -> bool:
    """Whether DECODE forwards run in halves."""
    return any(strategy.mode is ForwardMode.DECODE for strategy in deployment.overlap)


def _tokens(deployment: Deployment, mode: ForwardMode) -> Sequence[int]:
    """Tokens that a forward of a mode may have."""
    return deployment.extend_tokens if mode.is_extend else deployment.decode_tokens


def _halves(
    deployment: Deployment, batch: ForwardBatch, call: KernelCall
) -> Iterator[tuple[GemmShape, Iterable[int]]]:
    """The same of halves of its mode's batches, on the SMs that a strategy leaves."""
    for strategy in deployment.overlap:
        if strategy.mode is batch.mode:
            left = call
            if call.type is not T.TF32_HC_PRENORM_GEMM:
                left = replace(call, num_sms=deployment.num_sms - strategy.comm_sms)
            yield from _shapes(deployment, batch, left, deployment.half_tokens(batch.mode))


def _shapes(
    deployment: Deployment,
    batch: ForwardBatch,
    call: KernelCall,
    counts: Sequence[int] | None = None,
) -> Iterator[tuple[GemmShape, Iterable[int]]]:
    """The GEMM of a probed call, with every M that batches of ``counts`` tokens can give it.

    Without ``counts`` they are those of all forwards of the batch's mode.
    """
    shape = GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms)
    extend = batch.mode.is_extend
    tokens = _tokens(deployment, batch.mode) if counts is None else counts
    if not tokens:
        return
    if call.type in MASKED_TYPES or call.type in CONTIGUOUS_TYPES:
        yield shape, _expert_rows(deployment, call.type, tokens, extend=extend)
    elif call.type is T.FP8_MQA_LOGITS:
        yield shape, (count for count in tokens if count >= NONPAGED_MIN_QUERY_TOKENS)
    else:
        rows = _own_rows(deployment, batch, call, tokens)
        if call.type is T.PAGED_MQA_LOGITS_METADATA:
            rows = [count for count in rows if count <= METADATA_MAX_ROWS]
        if call.type is T.TF32_HC_PRENORM_GEMM:
            yield from _by_splits(deployment, shape, rows)
        else:
            yield shape, rows


def _own_rows(
    deployment: Deployment, batch: ForwardBatch, call: KernelCall, tokens: Sequence[int]
) -> Sequence[int]:
    """Rows of a rank's part of the tokens, where the probed call has only that part."""
    parallel, whole = deployment.parallel, batch.num_tokens
    if batch.mode.is_extend and parallel.attn_cp > 1 and call.m * parallel.attn_cp == whole:
        return [count // parallel.attn_cp for count in tokens]
    if parallel.moe_a2a and call.m == ceil_div(whole, parallel.tp) < whole:
        return sorted({ceil_div(count, parallel.tp) for count in tokens})
    return tokens


def _by_splits(
    deployment: Deployment, shape: GemmShape, rows: Sequence[int]
) -> Iterator[tuple[GemmShape, Iterable[int]]]:
    """One GEMM a number of splits, as SGLang's warm-up keys them."""
    found: dict[int, list[int]] = {}
    for count in rows:
        splits = hc_num_splits(count, shape.k, deployment.num_sms)
        found.setdefault(splits, []).append(count)
    for splits, values in found.items():
        yield GemmShape(shape.type, shape.n, shape.k, splits, shape.num_sms), values


def _expert_rows(
    deployment: Deployment, kind: T, tokens: Sequence[int], *, extend: bool
) -> Iterable[int]:
    """M of the grouped GEMMs.

    Contiguous: every multiple of the alignment up to the bound that no routing passes, since the
    routing decides how many rows there really are where tokens are dispatched.
    """
    moe, limit = deployment.model.moe, deployment.masked_tokens
    top_k = moe.num_experts_per_tok
    if kind in MASKED_TYPES:
        masked = (count for count in map(deployment.at_experts, tokens) if count <= limit)
        return {masked_expected_m(count * top_k, moe.n_routed_experts) for count in masked}
    contiguous = [count for count in tokens if extend or deployment.at_experts(count) > limit]
    if not contiguous:
        return ()
    most = contiguous_rows(deployment.at_experts(contiguous[-1]) * top_k, deployment.local_experts)
    return range(CONTIGUOUS_M_ALIGNMENT, most + 1, CONTIGUOUS_M_ALIGNMENT)


def _with_reduced(deployment: Deployment, shape: GemmShape) -> Iterator[GemmShape]:
    """The GEMM at each SM count; the hyper-connection GEMM always asks for the whole GPU."""
    yield shape
    if shape.type is not T.TF32_HC_PRENORM_GEMM:
        for count in dict.fromkeys(deployment.reduced_num_sms):
            if count != shape.num_sms:
                yield GemmShape(shape.type, shape.n, shape.k, shape.num_groups, count)
