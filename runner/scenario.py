"""A whole run of one rank, warm-up and requests, and its recording as a Schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from runner.backend.base import Backend
from runner.backend.shapes import NoComm, ShapeMath, ShapeWeights
from runner.backend.sink import ScheduleRecorder
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.model_runner import ModelRunner, NoBuffers
from runner.schedule import Collective, Op, Recv, Schedule, Send
from runner.traffic import Request, serve_all
from runner.warmup import (
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
        prompt_len: see :class:`runner.traffic.Request`.
        deep_gemm_bf16_fp32: see :class:`runner.backend.base.Backend`.
    """

    model: ModelConfig
    parallel: ParallelConfig
    warmup: WarmupOptions
    num_sms: int = 132
    prompt_len: int = 1
    deep_gemm_bf16_fp32: bool = True

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
    kernel_warmup(runner, scenario.warmup)
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
        deep_gemm_bf16_fp32=scenario.deep_gemm_bf16_fp32,
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
        first = parallel.rank_of(stage, 0)
        ranks.append(_moved(stages[stage], rank - first, parallel.tp_group(rank)))
    return Schedule(tuple(ranks))


def _moved(ops: tuple[Op, ...], by: int, group: tuple[int, ...]) -> tuple[Op, ...]:
    """The same operations for a rank ``by`` further on, with its own tensor-parallel group."""
    if by == 0:
        return ops
    moved: list[Op] = []
    for op in ops:
        if isinstance(op, Send | Recv):
            moved.append(replace(op, peer=op.peer + by))
        elif isinstance(op, Collective) and op.group != group:
            moved.append(replace(op, group=group))
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
        "num_sms": scenario.num_sms,
        "ranks": [
            {"pp_rank": at.pp_rank, "tp_rank": at.tp_rank, "node": parallel.node_of(rank)}
            for rank, at in enumerate(coordinates)
        ],
    }
