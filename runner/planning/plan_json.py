"""A plan as plain data: what ``runner plan --json`` prints and a cache's manifest keeps."""

from __future__ import annotations

from typing import Any

from runner.cache.describe import config_of
from runner.cache.keys import CacheKeys
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.kernels.types import CONTIGUOUS_TYPES
from runner.planning.plan import KernelUse, Plan, PlannedKernel


def plan_to_json(plan: Plan, keys: CacheKeys | None) -> dict[str, Any]:
    """The plan; keys are null where ``keys`` is None.

    ``kernels`` holds one item a distinct kernel: ``name``, ``cache_key``, ``config`` (template
    arguments by name), ``m_ranges`` (M of any of its GEMMs, [[first, last], ...]) and ``uses``
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


def _kernel(item: PlannedKernel, keys: CacheKeys | None) -> dict[str, Any]:
    return {
        "name": item.kernel.name,
        "cache_key": keys.cache_key(item.kernel) if keys else None,
        "config": config_of(item.kernel),
        "m_ranges": [list(pair) for pair in item.m_ranges],
        "uses": [use_to_json(use) for use in item.uses],
    }


def use_to_json(use: KernelUse) -> dict[str, Any]:
    """One GEMM with its M."""
    shape = use.shape
    return {
        "type": shape.type.name.lower(),
        "n": shape.n,
        "k": shape.k,
        "num_groups": shape.num_groups,
        "num_sms": shape.num_sms,
        "m_step": CONTIGUOUS_M_ALIGNMENT if shape.type in CONTIGUOUS_TYPES else 1,
        "m_ranges": [list(pair) for pair in use.m_ranges],
        "stages": list(use.stages),
    }
