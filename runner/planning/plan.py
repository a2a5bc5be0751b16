"""The plan: exactly those kernels that given GEMMs can need at any M."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from runner.backend.gemm_walks import ExecutionHook, fast_m_list, full_m_list, relaxed_ms
from runner.config.warmup import WarmupPolicy
from runner.kernels.call_template import CallShape
from runner.kernels.describe import config_of
from runner.kernels.kernel import Kernel
from runner.kernels.keys import CacheKeys
from runner.kernels.table import Demand, KernelTable, MRanges, Shape, union
from runner.kernels.types import GemmShape, expand, steps_of
from runner.planning.demands import demands
from runner.scenario import Scenario
from runner.schedule import Walk


@dataclass(frozen=True, slots=True)
class KernelUse:
    """The values of M at which one GEMM runs a kernel."""

    shape: Shape
    m_ranges: MRanges
    stages: tuple[int, ...]


@dataclass(frozen=True)
class PlannedKernel:
    """A kernel and the GEMMs that need it."""

    kernel: Kernel
    uses: tuple[KernelUse, ...]

    @cached_property
    def m_ranges(self) -> MRanges:
        """The M of all GEMMs that run it, combined."""
        return union(use.m_ranges for use in self.uses)

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Pipeline stages that need it."""
        return tuple(sorted({stage for use in self.uses for stage in use.stages}))


@dataclass(frozen=True)
class Plan:
    """Distinct kernels, ordered by first need, with the GEMMs that need them."""

    kernels: tuple[PlannedKernel, ...]
    demands: tuple[Demand, ...]
    table: KernelTable

    def needed_by(self, stages: Collection[int]) -> list[PlannedKernel]:
        """Kernels that any of the stages can need."""
        return [item for item in self.kernels if not set(stages).isdisjoint(item.stages)]

    def uncovered(self, covered: Collection[Kernel], stages: Collection[int]) -> list[KernelUse]:
        """M of each of the stages' GEMMs that would still compile with only ``covered``."""
        missing: dict[Shape, list[KernelUse]] = {}
        for planned in self.kernels:
            if planned.kernel not in covered:
                for use in planned.uses:
                    if not set(stages).isdisjoint(use.stages):
                        missing.setdefault(use.shape, []).append(use)
        return [
            KernelUse(shape, union(use.m_ranges for use in uses), uses[0].stages)
            for shape, uses in missing.items()
        ]


def make_plan(demands: Iterable[Demand], table: KernelTable) -> Plan:
    """Plan all demands; a kernel that several of them need appears once.

    Raises:
        UserError: a GEMM that the table does not know.
    """
    given = tuple(demands)
    uses: dict[Kernel, list[KernelUse]] = {}
    for demand in given:
        for kernel, m_ranges in table.kernel_ranges(demand.shape, demand.ms).items():
            uses.setdefault(kernel, []).append(KernelUse(demand.shape, m_ranges, demand.stages))
    kernels = tuple(PlannedKernel(kernel, tuple(found)) for kernel, found in uses.items())
    return Plan(kernels, given, table)


def plan_to_json(plan: Plan, keys: CacheKeys | None) -> dict[str, object]:
    """The plan as plain data; cache keys are null if ``keys`` is None.

    ``kernels`` has one item per distinct kernel: ``name``, ``cache_key``, ``config`` (template
    arguments by name), ``m_ranges`` (the M of all its GEMMs, [[first, last], ...]) and ``uses``
    (the same for each GEMM, with the stages that run it).
    """
    origin = plan.table.origin
    return {
        "version": 1,
        "library": origin.library,
        "generation": origin.generation,
        "gpu": origin.gpu,
        "arch": plan.table.recipe.arch,
        "source": origin.source.value,
        "num_sms": sorted({demand.shape.num_sms for demand in plan.demands}),
        "signature": keys.signature if keys else None,
        "flags": keys.flags if keys else None,
        "extra_signature": keys.recipe.extra_signature if keys else "",
        "kernels": [_kernel(item, keys) for item in plan.kernels],
    }


def _kernel(item: PlannedKernel, keys: CacheKeys | None) -> dict[str, object]:
    return {
        "name": item.kernel.name,
        "cache_key": keys.cache_key(item.kernel) if keys else None,
        "config": config_of(item.kernel),
        "m_ranges": [list(pair) for pair in item.m_ranges],
        "uses": [use_to_json(use) for use in item.uses],
    }


def use_to_json(use: KernelUse) -> dict[str, object]:
    """One GEMM, or one recorded call, with its M."""
    shape = use.shape
    sizes: dict[str, object] = (
        {"call": shape.text}
        if isinstance(shape, CallShape)
        else {
            "type": shape.type.name.lower(),
            "n": shape.n,
            "k": shape.k,
            "num_groups": shape.num_groups,
        }
    )
    return {
        **sizes,
        "num_sms": shape.num_sms,
        "m_step": shape.m_step,
        "m_ranges": [list(pair) for pair in use.m_ranges],
        "stages": list(use.stages),
    }


# -- the plan of a scenario


def plan_of(scenario: Scenario) -> Plan:
    """Every kernel that a forward of up to ``max_tokens`` tokens can need on any rank.

    Raises:
        UserError: the source does not know all of its GEMMs.
    """
    return _plan_of(scenario.deployment)


@lru_cache(maxsize=32)
def _plan_of(deployment: Scenario) -> Plan:
    needed = demands(deployment)
    return make_plan(needed, deployment.source.table(lambda: needed))


def with_one_table(scenarios: Iterable[Scenario]) -> list[Scenario]:
    """Give scenarios with the same source one table of all their calls, asking the source once.

    Raises:
        UserError: the source does not know all calls.
    """
    given = list(scenarios)
    if not given:
        return []
    called = [demand for scenario in given for demand in run_demands(scenario)]
    table = given[0].source.table(lambda: called)
    return [replace(scenario, source=table) for scenario in given]


@lru_cache(maxsize=32)
def table_of(scenario: Scenario) -> KernelTable:
    """Kernels of every call in a run of the scenario, including walks."""
    return scenario.source.table(lambda: run_demands(scenario))


def run_demands(scenario: Scenario) -> list[Demand]:
    """Every GEMM that a run can call, with every M, in walks as well as in forwards."""
    tokens = max(
        scenario.max_tokens,
        *scenario.resolved_batch_sizes,
        *scenario.graph_batch_sizes,
        *scenario.request_tokens,
    )
    served = demands(replace(scenario, max_tokens=tokens))
    hook = ExecutionHook(m_list=hook_m_list(scenario))
    shapes = [demand.shape for demand in served if isinstance(demand.shape, GemmShape)]
    walks = [walk for shape in shapes for walk in hook.before(shape.call(1))]
    if scenario.policy is WarmupPolicy.RELAX:
        for stage in range(scenario.parallel.pp):
            walks += relax_walks(scenario, stage)
    return [*served, *(Demand(walk.shape, expand(walk.steps)) for walk in walks)]


def hook_m_list(scenario: Scenario) -> Sequence[int] | None:
    """M that the execution hook walks under the policy; None if it walks nothing."""
    if not scenario.policy.walked:
        return None
    make = full_m_list if scenario.policy.walked == "full" else fast_m_list
    return _up_to(make(scenario.max_tokens), scenario.walk_max_m)


@lru_cache(maxsize=32)
def relax_walks(scenario: Scenario, stage: int) -> tuple[Walk, ...]:
    """What vLLM's ``relax`` warm-up walks on each rank of a stage."""
    walks = []
    for demand in demands(scenario):
        shape = demand.shape
        if stage in demand.stages and isinstance(shape, GemmShape):
            ms = relaxed_ms(shape, demand.ms, scenario.max_tokens)
            steps = steps_of(_up_to(ms, scenario.walk_max_m))
            walks += [Walk(shape, steps)] if steps else []
    return tuple(walks)


def _up_to(ms: Sequence[int], limit: int | None) -> Sequence[int]:
    return ms if limit is None else ms[: bisect_right(ms, limit)]
