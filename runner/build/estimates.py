"""Expected CPU seconds of a build's steps, and the schedule that results.

Estimates only order and divide work; they never change a result. They were fitted to 304 kernels
on two cores with nvcc 13.0.88 (docs/building.md): a kernel's cost in the front end and in the
assembler depends on the size of its PTX, which depends on its tile.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from runner.kernels.describe import config_of
from runner.kernels.heuristics_sm90 import ceil_div
from runner.kernels.kernel import Kernel

_HEADER_SECONDS = {"sm90_paged_mqa_logits": 1.0, "smxx_layout": 0.4}
_OTHER_HEADER_SECONDS = 1.4
_PTX_MEGABYTES = {
    "sm90_bf16_gemm": 0.058,
    "sm90_paged_mqa_logits": 0.044,
    "sm90_tf32_hc_prenorm_gemm": 0.105,
    "smxx_layout": 0.01,
}
_OTHER_PTX_MEGABYTES = 0.05
_FRONT_END_PER_MEGABYTE = 2.35
_MOST_COPIES = 4
_UNROLLED = 8

NVCC_SECONDS = 0.4
"""Seconds that an nvcc process takes besides the stages that it runs."""


def front_end_seconds(kernel: Kernel) -> float:
    """Seconds that a kernel adds to the front end of its unit."""
    return max(0.02, _FRONT_END_PER_MEGABYTE * _ptx_megabytes(kernel))


def assemble_seconds(ptx_bytes: float) -> float:
    """Seconds of the assembler on one kernel's PTX."""
    return float(max(0.04, 7.54e-9 * ptx_bytes**1.469))


def expected_assemble_seconds(kernel: Kernel) -> float:
    """:func:`assemble_seconds` of a kernel whose PTX does not exist yet."""
    return assemble_seconds(1e6 * _ptx_megabytes(kernel))


def plain_seconds(kernel: Kernel) -> float:
    """Seconds of one nvcc process that compiles one kernel."""
    return NVCC_SECONDS + unit_seconds([kernel]) + expected_assemble_seconds(kernel)


def unit_seconds(unit: Sequence[Kernel]) -> float:
    """Seconds of the front end of a unit: kernels of one header in one source."""
    header = _HEADER_SECONDS.get(_stem(unit[0].header), _OTHER_HEADER_SECONDS)
    return header + sum(map(front_end_seconds, unit))


def seconds_to_end(unit: Sequence[Kernel]) -> float:
    """Seconds from a unit's start to the end of its last kernel, with enough cores."""
    return unit_seconds(unit) + max(map(expected_assemble_seconds, unit))


def unrolled_k_blocks(kernel: Kernel) -> int:
    """How many K-blocks the unrolled main loop of a tiled GEMM has.

    Eight (``#pragma unroll 8``), or fewer if K is a compile-time constant with fewer blocks.
    """
    config = config_of(kernel)
    k_blocks = ceil_div(int(config["compiled_k"]), int(config["block_k"]))
    return min(k_blocks or _UNROLLED, _UNROLLED)


_Step = tuple[float, int, float, Sequence[Kernel], bool]


@dataclass(frozen=True, slots=True)
class ExpectedStep:
    """A build step in seconds from the first front end; ``kernel`` is None for a front end."""

    kernel: Kernel | None
    start: float
    end: float


def expected_schedule(units: Sequence[Sequence[Kernel]], workers: int) -> list[ExpectedStep]:
    """The builder's steps ordered by end; it starts the step on the longest path first."""
    ready: list[_Step] = []
    for number, unit in enumerate(units):
        heapq.heappush(ready, (-seconds_to_end(unit), number, unit_seconds(unit), unit, True))
    running: list[_Step] = []
    done = []
    now, number = 0.0, len(units)
    while ready or running:
        while ready and len(running) < workers:
            _, _, seconds, kernels, is_unit = heapq.heappop(ready)
            number += 1
            heapq.heappush(running, (now + seconds, number, now, kernels, is_unit))
        now, _, start, kernels, is_unit = heapq.heappop(running)
        done.append(ExpectedStep(None if is_unit else kernels[0], start, now))
        for kernel in kernels if is_unit else ():
            seconds = expected_assemble_seconds(kernel)
            number += 1
            heapq.heappush(ready, (-seconds, number, seconds, [kernel], False))
    return done


def makespan(units: Sequence[Sequence[Kernel]], workers: int) -> float:
    """Expected seconds of a build, without preprocessing."""
    return max((step.end for step in expected_schedule(units, workers)), default=0.0)


def _stem(header: str) -> str:
    return header.rsplit("/", 1)[-1].removesuffix(".cuh")


@lru_cache(maxsize=8192)
def _ptx_megabytes(kernel: Kernel) -> float:
    config, stem = config_of(kernel), _stem(kernel.header)
    if stem != "sm90_fp8_gemm_1d2d" or not config:
        return _PTX_MEGABYTES.get(stem, _OTHER_PTX_MEGABYTES)
    block_m, block_n, block_k = (int(config[f"block_{axis}"]) for axis in "mnk")
    # The code has one copy of the main loop per number of K-blocks before the scales of B change.
    step = gcd(block_k, block_n)
    many = block_k % block_n and block_k // step <= _MOST_COPIES
    copies = min(block_n, block_k) // step + 1 if many else 1
    unrolled = unrolled_k_blocks(kernel) / _UNROLLED
    return 0.05 + 0.00085 * copies * unrolled * max(1, block_m // 128) * block_n
