"""What a rank runs before it serves: its policy's warm-up, and CUDA graph capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf

from runner.backend.forward_batch import ForwardMode
from runner.backend.gemm_walks import ExecutionHook
from runner.build.partition import share_out
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.kernels.heuristics_sm90 import ceil_div
from runner.kernels.kernel import Kernel
from runner.model.model_runner import ModelRunner
from runner.planning.plan import hook_m_list, plan_of, relax_walks
from runner.scenario import Scenario

_CUBIN_BYTES = 40960
"""Typical size of a compiled kernel, to estimate how much an exchange moves."""

_EAGER_RUNS = 2
"""Forwards that SGLang runs before each graph capture."""


def warm_up(runner: ModelRunner, scenario: Scenario) -> None:
    """Run the policy's warm-up on this rank; exceptions are not swallowed.

    The ``pp-parallel`` policies do dummy runs only with more than one stage and without
    speculation, as in SGLang. With ``full`` and ``fast``, the execution hook walks at a GEMM's
    first call, in these dummy runs or later. ``relax`` walks each GEMM of this rank's stage here,
    as in vLLM. ``planned`` builds each planned kernel on one node, copies it to the others and
    loads it; ``prebuilt`` expects all planned kernels in the cache.
    """
    if scenario.policy.runs_dummies:
        _dummy_runs(runner, scenario)
    elif scenario.policy is WarmupPolicy.RELAX:
        stage = scenario.parallel.coordinates(runner.rank).pp_rank
        for walk in relax_walks(scenario, stage):
            runner.backend.walk(walk)
    elif scenario.policy.plans:
        _bring_in_plan(runner, scenario)


def _dummy_runs(runner: ModelRunner, scenario: Scenario) -> None:
    if runner.parallel.pp == 1 or scenario.speculative:
        return
    for batch_size in scenario.resolved_batch_sizes:
        for mode in dummy_modes(scenario, is_generation=runner.is_generation):
            runner._dummy_run(batch_size, forward_mode_override=mode)


def _bring_in_plan(runner: ModelRunner, scenario: Scenario) -> None:
    """Build or verify the planned kernels on node leaders, then load those of this rank's stage."""
    backend, parallel, plan = runner.backend, scenario.parallel, plan_of(scenario)
    is_leader = scenario.is_node_leader(runner.rank)
    everyone = tuple(range(parallel.world_size))
    if scenario.policy is WarmupPolicy.PLANNED:
        share = node_shares(scenario)[parallel.node_of(runner.rank)]
        backend.work_on_kernels("build", share if is_leader else ())
        most = ceil_div(len(plan.kernels), parallel.nodes) if parallel.nodes > 1 else 0
        backend.exchange_kernels(everyone, _CUBIN_BYTES * most)
    else:
        every = tuple(item.kernel for item in plan.kernels)
        backend.work_on_kernels("verify", every if is_leader else ())
        # A load could compile, so nobody loads before every node's cache has been verified.
        backend.barrier(everyone)
    own = plan.needed_by({parallel.coordinates(runner.rank).pp_rank})
    backend.work_on_kernels("load", tuple(item.kernel for item in own))


def dummy_modes(scenario: Scenario, *, is_generation: bool = True) -> tuple[ForwardMode, ...]:
    """Forward modes of dummy runs and requests: prefill nodes never DECODE, decode nodes EXTEND."""
    modes = []
    if is_generation and scenario.disaggregation is not DisaggregationMode.PREFILL:
        modes.append(ForwardMode.DECODE)
    if scenario.disaggregation is not DisaggregationMode.DECODE:
        modes.append(ForwardMode.EXTEND)
    return tuple(modes)


def capture_graphs(runner: ModelRunner, scenario: Scenario) -> None:
    """Capture a CUDA graph of a DECODE forward for each graph batch size, the largest first.

    A prefill node captures nothing, because it never decodes.
    """
    if ForwardMode.DECODE not in dummy_modes(scenario, is_generation=runner.is_generation):
        return
    for batch_size in sorted(scenario.graph_batch_sizes, reverse=True):
        forward = runner.prepare_dummy_run(batch_size, ForwardMode.DECODE)
        for _ in range(_EAGER_RUNS):
            forward()
        runner.backend.capture(f"graph DECODE {batch_size}", forward)


def node_shares(scenario: Scenario) -> list[tuple[Kernel, ...]]:
    """The planned kernels that each node builds and shares with the others."""
    return _node_shares(scenario.deployment, scenario.parallel.nodes)


@lru_cache(maxsize=32)
def _node_shares(deployment: Scenario, nodes: int) -> list[tuple[Kernel, ...]]:
    return share_out([item.kernel for item in plan_of(deployment).kernels], nodes)


def execution_hook(
    scenario: Scenario,
    rank: int,
    free_memory: Callable[[], float] = lambda: inf,
    warn: Callable[[str], None] = lambda line: None,
) -> ExecutionHook:
    """What a rank walks at first calls; ``free_memory`` returns the GPU's free bytes."""
    limit = scenario.walk_memory
    return ExecutionHook(
        m_list=hook_m_list(scenario),
        is_node_leader=scenario.is_node_leader(rank),
        budget=free_memory if limit is None else lambda: limit,
        warn=warn,
    )
