"""A whole run of one rank, warm-up and requests, and its recording as a Schedule."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from typing import Any, TypeVar

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch
from runner.backend.gemm_walks import ExecutionHook, relaxed_ms
from runner.backend.sink import ScheduleRecorder
from runner.config.gemm_algo import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.driver.model_runner import ModelRunner
from runner.driver.requests import Request, serve, serve_all
from runner.driver.warmup import (
    PLANNING_POLICIES,
    KernelSet,
    WarmupOptions,
    WarmupPolicy,
    capture_graphs,
    dummy_modes,
    kernel_warmup,
    resolve_batch_sizes,
    walked_ms,
)
from runner.errors import UserError
from runner.kernels.heuristics_sm90 import align
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource
from runner.kernels.table import Demand, KernelTable
from runner.kernels.types import GemmShape, KernelCall, expand, steps_of
from runner.model.strategy import OverlapStrategy
from runner.planning.demands import Deployment, demands, plan_of
from runner.planning.partition import share_out
from runner.planning.plan import Plan
from runner.schedule import OF_HOSTS, Begin, Collective, KernelWork, Op, Recv, Schedule, Send, Walk
from runner.timeline import FIRST_REQUEST

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run: everything that decides the operations of every rank, and nothing else.

    The requests have the warm-up's batch sizes, so that every policy ends at the same point: all
    these shapes served once.

    Attributes:
        num_sms: SMs of the GPU that kernels are chosen for.
        max_tokens: most tokens of a forward: what ``planned`` and ``prebuilt`` cover, and what a
            run's coverage is told for.
        prompt_len: see :class:`runner.driver.requests.Request`.
        stream: token counts of the requests after the first one; None takes the batch sizes.
        walk_memory: bytes of GPU memory that a walk may take; None is no limit to a recording,
            and what is free to a run on a GPU.
        bf16_fp32_algo: see :class:`runner.backend.base.Backend`.
        overlap: strategies of two-batch overlap, at most one for a forward mode.
        source: says which kernels GEMMs run.
    """

    model: ModelConfig
    parallel: ParallelConfig
    warmup: WarmupOptions
    num_sms: int = 132
    prompt_len: int = 1
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    max_tokens: int = 16384
    stream: tuple[int, ...] | None = None
    walk_memory: float | None = None
    overlap: tuple[OverlapStrategy, ...] = ()
    source: KernelSource = RULES

    def __post_init__(self) -> None:
        assert self.deployment, "made here so that bad values are told before a run"
        if min(self.stream or (1,)) < 1:
            raise UserError(f"token counts {_listed(self.stream)} must all be at least 1")
        step = self.parallel.attn_cp
        if any(size % step for size in self.warmup.graph_batch_sizes):
            sizes = _listed(self.warmup.graph_batch_sizes)
            raise UserError(f"graph batch sizes {sizes} must all be multiples of attn_cp={step}")
        largest = max(request.tokens for request in self.requests)
        if self.warmup.policy in PLANNING_POLICIES and largest > self.max_tokens:
            what = "batch size" if self.stream is None else "token count"
            raise UserError(
                f"{what} {largest} is above --max-tokens {self.max_tokens}, for which "
                f"{self.warmup.policy.value} prepares: give smaller ones"
            )

    @property
    def plan(self) -> Plan:
        """Every kernel that a forward of up to ``max_tokens`` can need, on any rank."""
        return plan_of(self.deployment, self.source)

    @cached_property
    def table(self) -> KernelTable:
        """Kernels of every call that the run makes, its walks included."""
        return self.source.table(lambda: run_demands(self))

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
            overlap=self.overlap,
        )

    def is_node_leader(self, rank: int) -> bool:
        """Whether a rank is the first of its node."""
        return rank % self.parallel.ranks_per_node == 0

    def hook(
        self,
        rank: int,
        budget: Callable[[], float] | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> ExecutionHook:
        """What a rank walks at first calls; ``budget`` asks for the GPU's free memory."""
        given = self.walk_memory
        limit = budget or (lambda: inf)
        return ExecutionHook(
            m_list=walked_ms(self.warmup.policy, self.max_tokens, self.warmup.walk_max_m),
            is_node_leader=self.is_node_leader(rank),
            budget=limit if given is None else lambda: given,
            warn=warn,
        )

    def kernel_set(self, rank: int) -> KernelSet:
        """What the policy makes a rank do with kernels apart from any forward."""
        stage = self.parallel.coordinates(rank).pp_rank
        if self.warmup.policy is WarmupPolicy.RELAX:
            return KernelSet(walks=self._relax_walks(stage))
        if self.warmup.policy not in PLANNING_POLICIES:
            return KernelSet()
        leads = self.is_node_leader(rank)
        return KernelSet(
            total=len(self.plan.kernels),
            checked=tuple(item.kernel for item in self.plan.kernels) if leads else (),
            share=self._shares[self.parallel.node_of(rank)] if leads else (),
            own=self._own_kernels[stage],
        )

    @cached_property
    def _own_kernels(self) -> list[tuple[Kernel, ...]]:
        """Planned kernels of each stage."""
        return [
            tuple(item.kernel for item in self.plan.kernels if stage in item.stages)
            for stage in range(self.parallel.pp)
        ]

    def _relax_walks(self, stage: int) -> tuple[Walk, ...]:
        """What vLLM's ``relax`` warm-up walks on each rank of a stage."""
        limit = self.warmup.walk_max_m
        walks = []
        for demand in self.plan.demands:
            if stage in demand.stages:
                ms = relaxed_ms(demand.shape, demand.ms, self.max_tokens)
                steps = steps_of(ms if limit is None else ms[: bisect_right(ms, limit)])
                walks += [Walk(demand.shape, steps)] if steps else []
        return tuple(walks)

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
        sizes = self.batch_sizes
        if self.stream is not None:
            step = self.parallel.attn_cp
            sizes = (sizes[0], *(align(count, step) for count in self.stream))
        return tuple(Request(size, self.prompt_len, modes) for size in sizes)

    @property
    def unwalked(self) -> Scenario:
        """The same without what adds walks and leaves every other operation as it is."""
        policy = WarmupPolicy.PP_PARALLEL if self.warmup.policy.runs_dummies else WarmupPolicy.NONE
        warmup = replace(self.warmup, policy=policy, walk_max_m=None, compile_lock=False)
        return replace(self, warmup=warmup, walk_memory=None)

    def with_policy(self, policy: WarmupPolicy) -> Scenario:
        """The same scenario under another policy."""
        return replace(self, warmup=replace(self.warmup, policy=policy))


def with_one_table(scenarios: Iterable[Scenario]) -> list[Scenario]:
    """Scenarios of one source with a table of all that they call, which is asked for at once.

    Raises:
        UserError: the source does not know all of it.
    """
    given = list(scenarios)

    if not given:
        return []
    demanded = (demand for scenario in given for demand in run_demands(scenario))
    table = given[0].source.table(lambda: demanded)
    return [replace(scenario, source=table) for scenario in given]


def run_demands(scenario: Scenario) -> list[Demand]:
    """Every GEMM that a run calls, with every M, whatever it serves and walks."""
    tokens = max(
        scenario.max_tokens,
        *scenario.batch_sizes,
        *scenario.warmup.graph_batch_sizes,
        *(request.tokens for request in scenario.requests),
    )
    served = demands(replace(scenario.deployment, max_tokens=tokens))
    walks = _walks_at_most(scenario, [demand.shape for demand in served])
    return [*served, *(Demand(walk.shape, expand(walk.steps)) for walk in walks)]


def _walks_at_most(scenario: Scenario, shapes: Sequence[GemmShape]) -> Iterator[Walk]:
    """The walks that a rank would make if it called every GEMM."""
    hook = replace(scenario.hook(0), is_node_leader=True)
    for shape in shapes:
        yield from hook.before(shape.call(1))
    if scenario.warmup.policy is WarmupPolicy.RELAX:
        for stage in range(scenario.parallel.pp):
            yield from scenario._relax_walks(stage)


def run_rank(
    runner: ModelRunner, scenario: Scenario, keep: Callable[[Any], None] = lambda logits: None
) -> None:
    """Warm up and serve on this rank; ``keep`` gets the requests' logits on the last stage."""
    _warm_up(runner, scenario)
    _come_up(runner, scenario, keep)


def _warm_up(runner: ModelRunner, scenario: Scenario) -> None:
    runner.backend.mark("phase", "warm-up")
    kernel_warmup(runner, scenario.warmup, scenario.kernel_set(runner.rank))


def _come_up(runner: ModelRunner, scenario: Scenario, keep: Callable[[Any], None]) -> None:
    """All after the warm-up. A server is up once its first request is answered."""
    first, *others = scenario.requests
    backend = runner.backend
    if scenario.warmup.graph_batch_sizes:
        backend.mark("phase", "graph capture")
        capture_graphs(runner, scenario.warmup)
    backend.mark("phase", FIRST_REQUEST)
    serve(runner, first, keep)
    if others:
        backend.mark("phase", "requests")
        serve_all(runner, others, keep)
    backend.mark("phase", "end")


def record_rank(scenario: Scenario, rank: int) -> tuple[Op, ...]:
    """Operations of one rank, from shapes alone."""
    parallel, plain = scenario.parallel, scenario.unwalked
    at = parallel.coordinates(rank)
    # Ranks of a stage run the same, but where attention splits tokens over them.
    like = rank if parallel.attn_cp > 1 else parallel.rank_of(at.pp_rank, 0, at.replica)
    served = _recorded(plain.with_policy(WarmupPolicy.NONE), like, _serve)
    if plain.warmup.policy.runs_dummies:
        ops = (*_recorded(plain, like, _warm_up), *served)
        ops = tuple(moved(like, ops, scenario, rank))
    else:
        ops = (*_record(scenario, rank, _warm_up), *moved(like, served, scenario, rank))
    hook = scenario.hook(rank)
    return ops if hook.m_list is None else tuple(_with_walks(ops, hook))


def _serve(runner: ModelRunner, scenario: Scenario) -> None:
    _come_up(runner, scenario, lambda logits: None)


def _record(
    scenario: Scenario, rank: int, part: Callable[[ModelRunner, Scenario], None]
) -> tuple[Op, ...]:
    recorder = ScheduleRecorder()
    backend = Backend(recorder, scenario.num_sms, bf16_fp32_algo=scenario.bf16_fp32_algo)
    runner = ModelRunner.build(
        scenario.model,
        scenario.parallel,
        rank,
        backend=backend,
        overlap=scenario.overlap,
    )
    part(runner, scenario)
    return tuple(recorder.ops)


def record_forward(scenario: Scenario, rank: int, batch: ForwardBatch) -> tuple[Op, ...]:
    """Operations of one forward of a rank's stage, from shapes alone."""

    def part(runner: ModelRunner, scenario: Scenario) -> None:
        runner.forward(batch, runner.dummy_proxy(batch))

    return _record(scenario, rank, part)


_recorded = lru_cache(maxsize=512)(_record)
"""Policies differ in a few operations; the forwards that they share are recorded once."""


def _with_walks(ops: Sequence[Op], hook: ExecutionHook) -> Iterator[Op]:
    """What a backend with this hook announces."""
    seen = set()
    for op in ops:
        if id(op) not in seen and isinstance(op, KernelCall):
            seen.add(id(op))
            yield from hook.before(op)
        yield op


def record(scenario: Scenario, *, folded: bool = False) -> Schedule:
    """Operations of every rank.

    Tensor ranks of a stage run the same operations on the same shapes, so one is recorded and the
    others differ only in whom they talk to and in what the first rank of a node does; where
    attention splits tokens over ranks, each is recorded.

    Args:
        scenario: what is run.
        folded: cut the replicas after the first one off behind the last operation that all of
            them take part in; from there on each does what the first does.

    Raises:
        UserError: the model does not fit the layout.
    """
    roles = record_roles(scenario, folded=folded)
    return Schedule(
        tuple(tuple(moved(role.first, role.ops, scenario, rank)) for rank, role in enumerate(roles))
    )


@dataclass(frozen=True, eq=False)
class Role:
    """What several ranks do alike: operations as rank ``first`` runs them."""

    first: int
    ops: tuple[Op, ...]


def record_roles(scenario: Scenario, *, folded: bool = False) -> list[Role]:
    """Role of every rank; see :func:`record`.

    Raises:
        UserError: the model does not fit the layout.
    """
    parallel = scenario.parallel
    parallel.check_fits(scenario.model)
    recorded: dict[tuple[int, ...], Role] = {}
    roles = []
    for rank in range(parallel.world_size):
        at = parallel.coordinates(rank)
        cut = bool(folded and at.replica)
        split = at.tp_rank if parallel.attn_cp > 1 else 0
        key = (at.pp_rank, split, scenario.is_node_leader(rank), cut)
        if key not in recorded:
            whole = recorded.get((*key[:3], False)) or Role(rank, record_rank(scenario, rank))
            ops = whole.ops[: common_end(whole.ops)] if cut else whole.ops
            recorded[key] = Role(whole.first, ops)
        roles.append(recorded[key])
    return roles


def common_end(ops: Sequence[Op]) -> int:
    """Index behind the last operation that ranks of all replicas take part in."""
    shared = (i for i, op in enumerate(ops) if isinstance(op, Collective) and op.name in OF_HOSTS)
    return max((index + 1 for index in shared), default=0)


def moved(
    first: int, ops: Sequence[Item], scenario: Scenario, rank: int
) -> Sequence[Item | Collective | Begin | Send | Recv | KernelWork]:
    """Operations of rank ``first`` as another rank of the same role runs them.

    What is among them that is no operation, or concerns no other rank, stays as it is.
    """
    by = rank - first
    if by == 0:
        return ops
    tp_groups = scenario.parallel.tp_group(first), scenario.parallel.tp_group(rank)
    own = scenario.kernel_set(rank)
    groups: dict[tuple[int, ...], tuple[int, ...]] = {tp_groups[0]: tp_groups[1]}
    found: list[Item | Collective | Begin | Send | Recv | KernelWork] = []
    for op in ops:
        if isinstance(op, Collective | Begin) and op.name not in OF_HOSTS:
            if op.group not in groups:
                groups[op.group] = tuple(member + by for member in op.group)
            found.append(type(op)(op.name, groups[op.group], op.bytes))
        elif isinstance(op, Send):
            found.append(Send(op.name, op.peer + by, op.bytes))
        elif isinstance(op, Recv):
            found.append(Recv(op.name, op.peer + by, op.bytes))
        elif isinstance(op, KernelWork) and op.action in ("build", "verify"):
            kernels = own.share if op.action == "build" else own.checked
            found.append(KernelWork(op.action, kernels))
        else:
            found.append(op)
    return found


def _listed(values: tuple[int, ...] | None) -> str:
    return ",".join(map(str, values or ()))


def run_meta(scenario: Scenario) -> dict[str, Any]:
    """What a Timeline says of its scenario; the same for measured and predicted ones."""
    parallel = scenario.parallel
    coordinates = [parallel.coordinates(rank) for rank in range(parallel.world_size)]
    return {
        "model": scenario.model.name,
        "layers": scenario.model.num_hidden_layers,
        "pp": parallel.pp,
        "tp": parallel.tp,
        "replicas": parallel.replicas,
        "ep": parallel.ep,
        "moe_a2a": parallel.moe_a2a,
        "overlap": [strategy.to_json() for strategy in scenario.overlap],
        "attn_cp": parallel.attn_cp,
        "stage_layers": list(parallel.stage_layers) if parallel.stage_layers else None,
        "nodes": parallel.nodes,
        "prompt_len": scenario.prompt_len,
        "disaggregation": scenario.warmup.disaggregation.value,
        "batch_sizes": list(scenario.batch_sizes),
        "max_tokens": scenario.max_tokens,
        "stream": None if scenario.stream is None else list(scenario.stream),
        "graph_batch_sizes": list(scenario.warmup.graph_batch_sizes),
        "walk_max_m": scenario.warmup.walk_max_m,
        "walk_memory": scenario.walk_memory,
        "compile_lock": scenario.warmup.compile_lock,
        "bf16_fp32_algo": scenario.bf16_fp32_algo.value,
        "speculative": scenario.warmup.speculative,
        "num_sms": scenario.num_sms,
        "library": scenario.source.origin.library,
        "gpu": scenario.source.origin.gpu,
        "ranks": [
            {"pp_rank": at.pp_rank, "tp_rank": at.tp_rank, "node": parallel.node_of(rank)}
            for rank, at in enumerate(coordinates)
        ],
    }
