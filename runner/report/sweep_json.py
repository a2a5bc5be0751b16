"""A sweep as plain data."""

from __future__ import annotations

from typing import Any

from sim.sweep.points import Point, Result, Sweep


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """Every point: those simulated, fastest first, those that do not fit, those not reached."""
    return {
        "version": 1,
        "settings": sweep.settings,
        "points": [
            _result_json(result, frontier=result.point in sweep.frontier)
            for result in sweep.results
        ],
        "skipped": [{**_point_json(item.point), "reason": item.reason} for item in sweep.skipped],
        "unfinished": [_point_json(point) for point in sweep.unfinished],
    }


def _point_json(point: Point) -> dict[str, Any]:
    return {**vars(point), "policy": point.policy.value}


def _result_json(result: Result, *, frontier: bool) -> dict[str, Any]:
    return {
        **_point_json(result.point),
        "frontier": frontier,
        "up_seconds": result.up_seconds,
        "kernels_present": result.present,
        "kernels_planned": result.planned,
        "coverage": float(result.coverage),
        "kernels_compiled": result.kernels_compiled,
        "duplicates": result.duplicates,
        "compile_cpu_seconds": result.cpu_seconds,
        "timeout_seconds": result.timeout_seconds,
    }
