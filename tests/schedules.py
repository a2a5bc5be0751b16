"""Schedules read back from the JSON that ``launch --schedule`` writes."""

from __future__ import annotations

from typing import Any

from runner.kernels.kernel import Kernel
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.schedule import _TAGS, KernelWork, Op, Schedule, Walk


def schedule_from_json(data: dict[str, Any]) -> Schedule:
    """The inverse of ``Schedule.to_json``."""
    return Schedule(tuple(tuple(_decode(item) for item in ops) for ops in data["ranks"]))


def _decode(item: list[Any]) -> Op:
    tag, *values = item
    if tag == "kernel":
        values[0] = DeepGemmKernelType[values[0]]
    elif tag == "kernels":
        made = (
            Kernel(name, header, entry, tuple(arguments))
            for name, header, entry, arguments in values[1]
        )
        return KernelWork(values[0], tuple(made))
    elif tag == "walk":
        name, *sizes = values[0]
        shape = GemmShape(DeepGemmKernelType[name], *sizes)
        return Walk(shape, tuple((first, last, step) for first, last, step in values[1]))
    op: Op = _TAGS[tag](*(tuple(v) if isinstance(v, list) else v for v in values))
    return op
