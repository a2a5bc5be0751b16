"""Hand-made points and results of a sweep."""

from __future__ import annotations

from typing import Any

from runner.config.warmup import WarmupPolicy
from sim.sweep.points import Point, Result


def point(policy: str = "none", **changes: Any) -> Point:
    values: dict[str, Any] = {"pp": 4, "tp": 2, "ep": False, "nodes": 4, "cores": 16, **changes}
    return Point(policy=WarmupPolicy(policy), **values)


def result(seconds: float, present: int, at: Point | None = None, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "kernels_compiled": 8,
        "duplicates": 4,
        "cpu_seconds": 12.5,
        "planned": 100,
        "timeout_seconds": None,
        **changes,
    }
    return Result(point=at or point(), up_seconds=seconds, present=present, **values)


SETTINGS: dict[str, Any] = {
    "model": "a model",
    "layers": 3,
    "hardware": "a machine",
    "link": "a link",
    "batch_sizes": [1, 64],
    "max_tokens": 128,
}
