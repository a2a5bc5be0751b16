"""A whole run of one rank, warm-up and requests, and its recording as a Schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from runner.backend.base import Backend
from runner.backend.shapes import NoComm, ShapeMath, ShapeWeights
from runner.backend.sink import ScheduleRecorder
from runner.bf16_fp32 import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.deployment import Deployment, plan_of
from runner.errors import UserError
from runner.jit.kernels import Kernel
from runner.jit.plan import Plan
from runner.model_runner import ModelRunner, NoBuffers
from runner.schedule import Collective, KernelWork, Op, Recv, Schedule, Send
from runner.sharing import share_out
from runner.traffic import Request, serve_all
from runner.warmup import (
    PLANNING_POLICIES,
    KernelSet,
    WarmupOptions,
    WarmupPolicy,
    dummy_modes,
    kernel_warmup,
    resolve_batch_sizes,
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run: everything that decides the operations of every rank, and nothing else.

    The requests have the warm-up's batch sizes, so that every policy ends at the same point: all
    these shapes served once.

    Attributes:
        num_sms: SMs of the GPU that kernels are chosen for.
        max_tokens: most tokens of a forward: what ``planned`` and ``prebuilt`` cover, and what a
            run's coverage is told for.
        prompt_len: see :class:`runner.traffic.Request`.
        bf16_fp32_algo: see :class:`runner.backend.base.Backend`.
    """

    model: ModelConfig
    parallel: ParallelConfig
    warmup: WarmupOptions
    num_sms: int = 132
    prompt_len: int = 1
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        assert self.deployment, "made here so that bad values are told before a run"
        largest = max(self.batch_sizes)
        if self.warmup.policy in PLANNING_POLICIES and largest > self.max_tokens:
            raise UserError(
                f"batch size {largest} is above --max-tokens {self.max_tokens}, for which "
                f"{self.warmup.policy.value} prepares: give smaller --batch-sizes"
            )

    @property
    def plan(self) -> Plan:
        """Every kernel that a forward of up to ``max_tokens`` can need, on any rank."""
        return plan_of(self.deployment)

    @property
    def deployment(self) -> Deployment:
        """What a run of this scenario can ever need kernels for."""
        return Deployment(
            model=self.model,
            parallel=self.parallel,
            num_sms=self.num_sms,
            max_tokens=self.max_tokens,
            disaggregation=self.warmup.disaggregation,
            bf16_fp32_algo=self.bf16_fp32_algo,
        )

    def kernel_set(self, rank: int) -> KernelSet:
        """What the policy makes a rank do with planned kernels."""
        if self.warmup.policy not in PLANNING_POLICIES:
            return KernelSet()
        stage = self.parallel.coordinates(rank).pp_rank
        node = self.parallel.node_of(rank)
        leads = rank == 0 or self.parallel.node_of(rank - 1) != node
        return KernelSet(
            total=len(self.plan.kernels),
            checked=tuple(item.kernel for item in self.plan.kernels) if leads else (),
            share=self._shares[node] if leads else (),
            own=tuple(item.kernel for item in self.plan.kernels if stage in item.stages),
        )

    @cached_property
    def _shares(self) -> list[tuple[Kernel, ...]]:
        return share_out([item.kernel for item in self.plan.kernels], self.parallel.nodes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of warm-up and requests, ascending."""
        return resolve_batch_sizes(self.warmup.batch_sizes, self.num_sms, self.parallel.attn_cp)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Requests sent after the warm-up."""
        modes = dummy_modes(self.warmup, is_generation=True)
        return tuple(Request(size, self.prompt_len, modes) for size in self.batch_sizes)

    def with_policy(self, policy: WarmupPolicy) -> Scenario:
        """The same scenario under another policy."""
        return replace(self, warmup=replace(self.warmup, policy=policy))


def run_rank(
    runner: ModelRunner, scenario: Scenario, keep: Callable[[Any], None] = lambda logits: None
) -> None:
    """Warm up and serve on this rank; ``keep`` gets the requests' logits on the last stage."""
    runner.backend.mark("phase", "warm-up")
    kernel_warmup(runner, scenario.warmup, scenario.kernel_set(runner.rank))
    runner.backend.mark("phase", "requests")
    serve_all(runner, scenario.requests, keep)
    runner.backend.mark("phase", "end")


def record_rank(scenario: Scenario, rank: int) -> tuple[Op, ...]:
    """Operations of one rank, from shapes alone."""
    recorder = ScheduleRecorder()
    backend = Backend(
        ShapeMath(),
        NoComm(),
        recorder,
        num_sms=scenario.num_sms,
        bf16_fp32_algo=scenario.bf16_fp32_algo,
    )
    runner = ModelRunner.build(
        scenario.model, scenario.parallel, rank,
        backend=backend, weights=ShapeWeights(), buffers=NoBuffers(),
    )  # fmt: skip
    run_rank(runner, scenario)
    return tuple(recorder.ops)


def record(scenario: Scenario) -> Schedule:
    """Operations of every rank.

    Tensor ranks of a stage run the same operations on the same shapes, so one is recorded and the
    others differ only in whom they talk to; where attention splits tokens over ranks, each is
    recorded.

    Raises:
        UserError: the model does not fit the layout.
    """
    parallel = scenario.parallel
    parallel.check_fits(scenario.model)
    stages: dict[int, tuple[Op, ...]] = {}
    ranks = []
    for rank in range(parallel.world_size):
        if parallel.attn_cp > 1:
            ranks.append(record_rank(scenario, rank))
            continue
        stage = parallel.coordinates(rank).pp_rank
        if stage not in stages:
            stages[stage] = record_rank(scenario, rank)
        ranks.append(_moved(stages[stage], scenario, rank))
    return Schedule(tuple(ranks))


def _moved(ops: tuple[Op, ...], scenario: Scenario, rank: int) -> tuple[Op, ...]:
    """A stage's first rank's operations as another tensor rank of the stage runs them."""
    parallel = scenario.parallel
    by, group = rank % parallel.tp, parallel.tp_group(rank)
    if by == 0:
        return ops
    first_group = parallel.tp_group(rank - by)
    moved: list[Op] = []
    for op in ops:
        if isinstance(op, Send | Recv):
            moved.append(replace(op, peer=op.peer + by))
        elif isinstance(op, Collective) and op.group == first_group:
            moved.append(replace(op, group=group))
        elif isinstance(op, KernelWork) and op.action in ("build", "verify"):
            own = scenario.kernel_set(rank)
            moved.append(replace(op, kernels=own.share if op.action == "build" else own.checked))
        else:
            moved.append(op)
    return tuple(moved)


def run_meta(scenario: Scenario) -> dict[str, Any]:
    """What a Timeline says of its scenario; the same for measured and predicted ones."""
    parallel = scenario.parallel
    coordinates = [parallel.coordinates(rank) for rank in range(parallel.world_size)]
    return {
        "model": scenario.model.name,
        "layers": scenario.model.num_hidden_layers,
        "pp": parallel.pp,
        "tp": parallel.tp,
        "ep": parallel.ep,
        "attn_cp": parallel.attn_cp,
        "stage_layers": list(parallel.stage_layers) if parallel.stage_layers else None,
        "nodes": parallel.nodes,
        "prompt_len": scenario.prompt_len,
        "disaggregation": scenario.warmup.disaggregation.value,
        "batch_sizes": list(scenario.batch_sizes),
        "max_tokens": scenario.max_tokens,
        "num_sms": scenario.num_sms,
        "ranks": [
            {"pp_rank": at.pp_rank, "tp_rank": at.tp_rank, "node": parallel.node_of(rank)}
            for rank, at in enumerate(coordinates)
        ],
    }
