"""What a warm-up policy compiles of a plan, and what it leaves to stall a request."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner.deployment import Deployment, recorded_calls
from runner.jit.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.jit.kernel_type import CONTIGUOUS_TYPES
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernels import Kernel
from runner.jit.plan import GemmShape, KernelUse, Plan, kernel_ranges
from runner.jit.plan_json import use_to_json
from runner.m_lists import fast_m_list, full_m_list, multiples_of, relax_m_list
from runner.warmup import WarmupOptions, WarmupPolicy, dummy_modes, resolve_batch_sizes

HOOKED_TYPES = frozenset(
    {
        T.GEMM_NT_F8F8BF16,
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        T.GEMM_NT_BF16BF16F32,
        T.GROUPED_GEMM_NT_BF16_CONTIG,
        T.GROUPED_GEMM_NT_BF16_MASKED,
        T.TF32_HC_PRENORM_GEMM,
    }
)
"""Types that SGLang's M-walking warm-ups know; einsum, logits and metadata compile on first use."""


@dataclass(frozen=True)
class Coverage:
    """A policy against a plan.

    Attributes:
        policy: the policy.
        compiled: kernels that it compiles.
        uncovered: M of each GEMM that would stall afterwards.
        missing: planned kernels that it does not compile.
        superfluous: kernels that it compiles and no forward needs.
    """

    policy: WarmupPolicy
    compiled: frozenset[Kernel]
    uncovered: tuple[KernelUse, ...]
    missing: int
    superfluous: int


def coverage(policy: WarmupPolicy, deployment: Deployment, plan: Plan) -> Coverage:
    """What the policy leaves uncovered, from a cold cache."""
    compiled = frozenset(_compiled(policy, deployment, plan))
    planned = {item.kernel for item in plan.kernels}
    return Coverage(
        policy,
        compiled,
        tuple(plan.uncovered(compiled)),
        missing=len(planned - compiled),
        superfluous=len(compiled - planned),
    )


def _compiled(policy: WarmupPolicy, deployment: Deployment, plan: Plan) -> Iterator[Kernel]:
    if policy in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT):
        yield from (item.kernel for item in plan.kernels)
    elif policy is WarmupPolicy.PP_PARALLEL:
        yield from _of_dummy_runs(deployment, plan)
    elif policy is not WarmupPolicy.NONE:
        for demand in plan.demands:
            walked = _walked(policy, deployment, demand.shape, demand.ms)
            yield from kernel_ranges(demand.shape, walked, plan.rules)


def _walked(
    policy: WarmupPolicy, deployment: Deployment, shape: GemmShape, ms: Sequence[int]
) -> Sequence[int]:
    """M that the policy calls a GEMM with."""
    tokens = deployment.max_tokens
    contiguous = shape.type in CONTIGUOUS_TYPES
    if policy is WarmupPolicy.RELAX:
        # vLLM walks all of a contiguous GEMM's M, a dense one's wave boundaries, nothing else.
        if contiguous:
            return ms
        dense = shape.type is T.GEMM_NT_F8F8BF16
        return relax_m_list(tokens, shape.n, deployment.num_sms) if dense else ()
    if shape.type not in HOOKED_TYPES:
        return ()
    if shape.type is T.TF32_HC_PRENORM_GEMM:
        return ms  # SGLang calls it once for each number of splits that a forward can ask for.
    listed = full_m_list(tokens) if policy is WarmupPolicy.FULL else fast_m_list(tokens)
    return multiples_of(listed, CONTIGUOUS_M_ALIGNMENT) if contiguous else listed


def _of_dummy_runs(deployment: Deployment, plan: Plan) -> Iterator[Kernel]:
    """Kernels of the five dummy batches in each mode; there are none with one stage."""
    if deployment.parallel.pp == 1:
        return
    options = WarmupOptions(
        policy=WarmupPolicy.PP_PARALLEL, disaggregation=deployment.disaggregation
    )
    sizes = resolve_batch_sizes(None, deployment.num_sms, deployment.parallel.attn_cp)
    modes = dummy_modes(options, is_generation=True)
    for call in recorded_calls(deployment, [(size, mode) for size in sizes for mode in modes]):
        yield from plan.rules.kernels_of(call)


def node_coverage(node: int, plan: Plan, present: Collection[Kernel]) -> dict[str, Any]:
    """A node's proof of coverage as plain data.

    It tells how many planned kernels the cache holds, and the M of each GEMM that would compile.
    """
    return {
        "node": node,
        "planned": len(plan.kernels),
        "present": sum(item.kernel in present for item in plan.kernels),
        "stalls": [use_to_json(use) for use in plan.uncovered(present)],
    }
