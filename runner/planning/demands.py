"""Which GEMMs the ranks of a scenario call, and with which M.

The GEMMs are found by running the model's own forward on shapes, stage by stage, so the plan and
the forward cannot disagree. Their M follow from the token counts that a forward may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.token_to_m import (
    HC_BLOCK,
    contiguous_rows,
    hc_num_splits,
    masked_expected_m,
    masked_token_limit,
)
from runner.config.warmup import DisaggregationMode
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT, ceil_div
from runner.kernels.rules import METADATA_MAX_ROWS
from runner.kernels.table import Demand
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.model.dsv4 import NONPAGED_MIN_QUERY_TOKENS
from runner.model.model_runner import ModelRunner
from runner.model.stage import OVERLAPPED
from runner.scenario import Scenario
from runner.schedule import Mark

Gemm = tuple[T, int, int, bool]
"""Identity of a GEMM: type, n, k, and whether its input is the rank's block of the tokens.

Two GEMMs may have the same n and k: at tp 8, dsv3's o_proj takes all tokens, but its shared experts
take a block.
"""


def demands(scenario: Scenario) -> tuple[Demand, ...]:
    """Every GEMM that the scenario's forwards can call, with every M, ordered by first use."""
    return _demands(scenario.deployment)


@lru_cache(maxsize=32)
def _demands(deployment: Scenario) -> tuple[Demand, ...]:
    ms: dict[GemmShape, set[int]] = {}
    stages: dict[GemmShape, set[int]] = {}
    shapes_of: dict[tuple[ForwardMode, KernelCall, bool, bool], list[GemmShape]] = {}
    tokens = _Tokens(deployment)
    for stage in range(deployment.parallel.pp):
        halved = {mode: _halved_gemms(tokens, stage, mode) for mode in ForwardMode}
        for batch, calls in _probe(tokens, stage):
            for call in calls:
                in_halves, whole = False, True
                if cut := halved[batch.mode]:
                    gemms = _possible_gemms(tokens, call, {batch.num_tokens})
                    in_halves, whole = bool(gemms & cut[0]), bool(gemms & cut[1])
                key = (batch.mode, call, in_halves, whole)
                if key not in shapes_of:
                    found = list(_shapes(tokens, batch, call, in_halves=in_halves, whole=whole))
                    shapes_of[key] = [shape for shape, _ in found]
                    for shape, values in found:
                        ms.setdefault(shape, set()).update(values)
                for shape in shapes_of[key]:
                    stages.setdefault(shape, set()).add(stage)
    return tuple(
        Demand(each, tuple(sorted(values)), tuple(sorted(stages[shape])))
        for shape, values in ms.items()
        for each in _at_each_sm_count(deployment, shape)
        if values and shape.type not in deployment.without
    )


def _at_each_sm_count(scenario: Scenario, shape: GemmShape) -> Iterator[GemmShape]:
    """The GEMM at each SM count; the hyper-connection GEMM always uses the whole GPU."""
    yield shape
    if shape.type is not T.TF32_HC_PRENORM_GEMM:
        for count in dict.fromkeys(scenario.reduced_num_sms):
            if count != shape.num_sms:
                yield replace(shape, num_sms=count)


@dataclass(frozen=True)
class _Tokens:
    """Token counts that a scenario's forwards may have, and how many tokens reach the experts."""

    scenario: Scenario

    @cached_property
    def extend(self) -> Sequence[int]:
        if self.scenario.disaggregation is DisaggregationMode.DECODE:
            return range(0)
        step = self.scenario.parallel.attn_cp
        return range(step, self.scenario.max_tokens + 1, step)

    @cached_property
    def decode(self) -> Sequence[int]:
        if self.scenario.disaggregation is DisaggregationMode.PREFILL:
            return range(0)
        sizes = self.scenario.decode_batch_sizes
        return range(1, self.scenario.max_tokens + 1) if sizes is None else sorted(set(sizes))

    def of(self, mode: ForwardMode) -> Sequence[int]:
        return self.extend if mode.is_extend else self.decode

    def of_halves(self, mode: ForwardMode) -> Sequence[int]:
        """Token counts of half a forward: DECODE is cut in the middle, EXTEND anywhere."""
        if mode.is_extend:
            return range(1, max(self.extend, default=1))
        counts = (count for count in self.decode if count > 1)
        return sorted({half for count in counts for half in (count // 2, count - count // 2)})

    def of_one_sequence(self, mode: ForwardMode) -> Sequence[int]:
        """Token counts of forwards with one sequence, which cannot be cut into halves."""
        return self.extend if mode.is_extend else [count for count in self.decode if count == 1]

    def at_experts(self, tokens: int) -> int:
        """Tokens that a rank's experts see; where ranks have blocks, all blocks have one size."""
        tp = self.scenario.parallel.tp
        return ceil_div(tokens, tp) * tp if self.scenario.parallel.moe_a2a else tokens

    @cached_property
    def local_experts(self) -> int:
        """Number of experts that a rank holds, whole or as slices."""
        experts, parallel = self.scenario.model.moe.n_routed_experts, self.scenario.parallel
        return experts // parallel.tp if parallel.ep else experts

    @cached_property
    def masked_limit(self) -> int:
        """Most tokens with which a DECODE forward still uses the masked expert layout."""
        model, parallel = self.scenario.model, self.scenario.parallel
        width = model.moe.moe_intermediate_size // (1 if parallel.ep else parallel.tp)
        return masked_token_limit(self.local_experts, model.hidden_size, width)

    def runs_in_halves(self, mode: ForwardMode) -> bool:
        """Whether an overlap strategy runs forwards of the mode in halves."""
        return any(strategy.mode is mode for strategy in self.scenario.overlap)


def _probe(tokens: _Tokens, stage: int) -> Iterator[tuple[ForwardBatch, Iterable[KernelCall]]]:
    """Distinct calls of a stage, from forwards that together run every GEMM the stage ever runs.

    Except for the largest forward of each mode, only masked experts count: if a smaller forward
    does not mask them, none does.
    """
    runner, recorder = _shape_runner(replace(tokens.scenario, overlap=()), stage)
    for batch in _probe_batches(tokens):
        recorder.ops.clear()
        runner.forward(batch, runner.dummy_proxy(batch))
        largest = batch.num_tokens == tokens.of(batch.mode)[-1]
        calls = dict.fromkeys(op for op in recorder.ops if isinstance(op, KernelCall))
        yield batch, [call for call in calls if largest or call.type in MASKED_TYPES]


def _probe_batches(tokens: _Tokens) -> Iterator[ForwardBatch]:
    """The largest forwards and the smallest DECODE, which masks the experts if any forward does."""
    if tokens.extend:
        most = tokens.extend[-1]
        yield ForwardBatch.extend((1,) * most)
        if most >= NONPAGED_MIN_QUERY_TOKENS:
            yield ForwardBatch.extend((most,))
    if tokens.decode:
        mode = ForwardMode.DECODE
        halves = tokens.of_halves(mode) if tokens.runs_in_halves(mode) else ()
        smallest = min(tokens.decode[0], *halves[:1], tokens.decode[-1])
        yield ForwardBatch.decode((1,) * smallest)
        yield ForwardBatch.decode((1,) * tokens.decode[-1])


def _shape_runner(scenario: Scenario, stage: int) -> tuple[ModelRunner, ScheduleRecorder]:
    recorder = ScheduleRecorder()
    backend = Backend(recorder, scenario.num_sms, bf16_fp32_algo=scenario.bf16_fp32_algo)
    runner = ModelRunner.build(
        scenario.model,
        scenario.parallel,
        scenario.parallel.rank_of(stage, 0),
        backend=backend,
        overlap=scenario.overlap,
    )
    return runner, recorder


# -- two-batch overlap: what runs in halves, and what runs whole


def _halved_gemms(
    tokens: _Tokens, stage: int, mode: ForwardMode
) -> tuple[set[Gemm], set[Gemm]] | None:
    """GEMMs that a stage runs on halves of a mode's batches, and those it runs on whole batches.

    The latter are in layers without experts. None if no strategy cuts the mode's batches.
    """
    most = max(tokens.of(mode), default=0)
    if most < 2 or not tokens.runs_in_halves(mode):
        return None
    runner, recorder = _shape_runner(tokens.scenario, stage)
    in_halves, whole = set[Gemm](), set[Gemm]()
    for batch in _cut_batches(tokens, mode, most):
        recorder.ops.clear()
        runner.forward(batch, runner.dummy_proxy(batch))
        halves = {half.num_tokens for half in batch.halves or ()}
        inside = False
        for op in recorder.ops:
            if isinstance(op, Mark) and op.kind in ("layer", "batch"):
                inside = (OVERLAPPED in op.name) if op.kind == "layer" else op.name != "both"
            elif isinstance(op, KernelCall) and (
                batch.num_tokens == most or op.type in MASKED_TYPES
            ):
                counts = halves if inside else {batch.num_tokens}
                (in_halves if inside else whole).update(_possible_gemms(tokens, op, counts))
    return in_halves, whole


def _cut_batches(tokens: _Tokens, mode: ForwardMode, most: int) -> Iterator[ForwardBatch]:
    """Batches of more than one sequence whose halves together run every GEMM.

    The largest run everything except masked experts; the smallest DECODE runs those if any does.
    """
    if mode.is_extend:
        yield ForwardBatch.extend((1,) * most)
        yield ForwardBatch.extend((most - 1, 1))
        return
    for count in {min(count for count in tokens.decode if count > 1), most}:
        yield ForwardBatch.decode((1,) * count)


def _possible_gemms(tokens: _Tokens, call: KernelCall, counts: set[int]) -> set[Gemm]:
    """The GEMMs that a call may belong to in forwards, or halves, with these token counts.

    With few tokens, a block may have as many rows as all tokens; the call may then be either.
    """
    parallel = tokens.scenario.parallel
    of_block = {False}
    if parallel.moe_a2a and call.type not in MASKED_TYPES | CONTIGUOUS_TYPES:
        blocks = {ceil_div(count, parallel.tp) for count in counts}
        of_block = {True, False} if min(counts) < 2 * parallel.tp else {call.m in blocks}
    return {(call.type, call.n, call.k, either) for either in of_block}


# -- from a call to its GEMM with every M


def _shapes(
    tokens: _Tokens, batch: ForwardBatch, call: KernelCall, *, in_halves: bool, whole: bool
) -> Iterator[tuple[GemmShape, Iterable[int]]]:
    """The GEMMs of a probed call, with every M that batches of its mode can give them."""
    mode = batch.mode
    counts = tokens.of(mode) if whole else tokens.of_one_sequence(mode)
    yield from _with_every_m(tokens, batch, call, counts)
    for strategy in tokens.scenario.overlap if in_halves else ():
        if strategy.mode is mode:
            left = call
            if call.type is not T.TF32_HC_PRENORM_GEMM:
                left = replace(call, num_sms=tokens.scenario.num_sms - strategy.comm_sms)
            yield from _with_every_m(tokens, batch, left, tokens.of_halves(mode))


def _with_every_m(
    tokens: _Tokens, batch: ForwardBatch, call: KernelCall, counts: Sequence[int]
) -> Iterator[tuple[GemmShape, Iterable[int]]]:
    """The GEMM of a probed call, with every M that batches of ``counts`` tokens can give it."""
    shape = call.shape
    if not counts:
        return
    if call.type in MASKED_TYPES | CONTIGUOUS_TYPES:
        yield shape, _expert_rows(tokens, call.type, counts, extend=batch.mode.is_extend)
    elif call.type is T.FP8_MQA_LOGITS:
        yield shape, (count for count in counts if count >= NONPAGED_MIN_QUERY_TOKENS)
    else:
        rows = _own_rows(tokens.scenario, batch, call, counts)
        if call.type is T.PAGED_MQA_LOGITS_METADATA:
            yield shape, [count for count in rows if count <= METADATA_MAX_ROWS]
        elif call.type is T.TF32_HC_PRENORM_GEMM:
            by_splits = ms_by_splits(shape.k, rows, tokens.scenario.num_sms)
            yield from ((replace(shape, num_groups=splits), ms) for splits, ms in by_splits.items())
        else:
            yield shape, rows


def ms_by_splits(k: int, ms: Iterable[int], num_sms: int) -> dict[int, list[int]]:
    """M of the hyper-connection GEMM by its number of splits, as SGLang's warm-up keys them."""
    found: dict[int, list[int]] = {}
    for block, rows in groupby(ms, key=lambda m: ceil_div(m, HC_BLOCK)):
        found.setdefault(hc_num_splits(block * HC_BLOCK, k, num_sms), []).extend(rows)
    return found


def _own_rows(
    scenario: Scenario, batch: ForwardBatch, call: KernelCall, counts: Sequence[int]
) -> Sequence[int]:
    """Rows for each token count: the rank's part if the probed call had only that, else all."""
    parallel, whole = scenario.parallel, batch.num_tokens
    if batch.mode.is_extend and parallel.attn_cp > 1 and call.m * parallel.attn_cp == whole:
        return [count // parallel.attn_cp for count in counts]
    if parallel.moe_a2a and call.m == ceil_div(whole, parallel.tp) < whole:
        return sorted({ceil_div(count, parallel.tp) for count in counts})
    return counts


def _expert_rows(tokens: _Tokens, kind: T, counts: Sequence[int], *, extend: bool) -> Iterable[int]:
    """M of the grouped GEMMs.

    For contiguous ones, every multiple of the alignment up to the most rows that any routing can
    give, since the routing decides the number of rows.
    """
    moe, limit = tokens.scenario.model.moe, tokens.masked_limit
    top_k = moe.num_experts_per_tok
    if kind in MASKED_TYPES:
        masked = (count for count in map(tokens.at_experts, counts) if count <= limit)
        return {masked_expected_m(count * top_k, moe.n_routed_experts) for count in masked}
    contiguous = [count for count in counts if extend or tokens.at_experts(count) > limit]
    if not contiguous:
        return ()
    most = contiguous_rows(tokens.at_experts(contiguous[-1]) * top_k, tokens.local_experts)
    return range(CONTIGUOUS_M_ALIGNMENT, most + 1, CONTIGUOUS_M_ALIGNMENT)
