"""Our rules against what the library itself asked for: every difference, in words."""

from __future__ import annotations

from collections.abc import Mapping

from runner.jit.keys import CacheKeys
from runner.jit.plan import GemmShape, Plan

FirstM = Mapping[tuple[GemmShape, str], int]
"""For a GEMM and a cache key the first M that runs the kernel."""


def planned_first_m(plan: Plan, keys: CacheKeys) -> dict[tuple[GemmShape, str], int]:
    """The plan in the form that the library's answers have."""
    found: dict[tuple[GemmShape, str], int] = {}
    for item in plan.kernels:
        key = keys.cache_key(item.kernel)
        for use in item.uses:
            m = use.m_ranges[0][0]
            found[use.shape, key] = min(m, found.get((use.shape, key), m))
    return found


def differences(planned: FirstM, asked: FirstM) -> list[str]:
    """One line for each kernel that only one side has, or that begins at another M.

    GEMMs that differ in their number of groups alone are walked in one process, where a kernel is
    asked for once; so for those only the kernels are compared, not which of them was first.
    """
    ours, theirs = _by_family(planned), _by_family(asked)
    lines = []
    for family in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(family, {}), theirs.get(family, {})
        kind, n, k, num_sms = family
        name = f"{kind}:{n}:{k} on {num_sms} SMs"
        for key in dict.fromkeys([*mine, *other]):
            if key not in other:
                lines.append(f"{name}: {key} is planned from M {mine[key]}, never asked for")
            elif key not in mine:
                lines.append(f"{name}: {key} is asked for at M {other[key]}, not planned")
            elif mine[key] != other[key]:
                lines.append(
                    f"{name}: {key} is planned from M {mine[key]}, asked for at {other[key]}"
                )
    return lines


_Family = tuple[str, int, int, int]


def _by_family(first: FirstM) -> dict[_Family, dict[str, int]]:
    found: dict[_Family, dict[str, int]] = {}
    for (shape, key), m in first.items():
        family = (shape.type.name.lower(), shape.n, shape.k, shape.num_sms)
        keys = found.setdefault(family, {})
        keys[key] = min(m, keys.get(key, m))
    return found
