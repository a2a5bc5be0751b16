"""Expected CPU seconds of a build's steps: only to order and cut work, never a result.

Fitted to 304 kernels on two cores with nvcc 13.0.88 (docs/building.md): what a kernel costs in the
front end and the assembler follows the size of its PTX, and that follows its tile.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from runner.cache.describe import config_of
from runner.kernels.heuristics_sm90 import ceil_div
from runner.kernels.kernel import Kernel

_HEADER_SECONDS = {"sm90_paged_mqa_logits": 1.0, "smxx_layout": 0.4}
_HEADER_DEFAULT = 1.4
_PTX_MEGABYTES = {
    "sm90_bf16_gemm": 0.058,
    "sm90_paged_mqa_logits": 0.044,
    "sm90_tf32_hc_prenorm_gemm": 0.105,
    "smxx_layout": 0.01,
}
_PTX_DEFAULT = 0.05
_FRONT_END_PER_MEGABYTE = 2.35
_MOST_COPIES = 4
_UNROLLED = 8

PREPROCESS_SECONDS = 0.55
PLAIN_OVERHEAD_SECONDS = 0.4


def header_seconds(header: str) -> float:
    """Front end of a unit without kernels: parsing the header."""
    return _HEADER_SECONDS.get(_stem(header), _HEADER_DEFAULT)


def front_end_seconds(kernel: Kernel) -> float:
    """What a kernel adds to its unit's front end."""
    return max(0.02, _FRONT_END_PER_MEGABYTE * _ptx_megabytes(kernel))


def assemble_seconds(ptx_bytes: float) -> float:
    """The assembler on one kernel's PTX."""
    return float(max(0.04, 7.54e-9 * ptx_bytes**1.469))


def expected_assemble_seconds(kernel: Kernel) -> float:
    """The same before there is PTX."""
    return assemble_seconds(1e6 * _ptx_megabytes(kernel))


def plain_seconds(kernel: Kernel) -> float:
    """One nvcc process for one kernel."""
    return (
        PLAIN_OVERHEAD_SECONDS
        + header_seconds(kernel.header)
        + front_end_seconds(kernel)
        + expected_assemble_seconds(kernel)
    )


def unrolled_k_blocks(kernel: Kernel) -> int:
    """How many K-blocks of a tiled GEMM's main loop its code holds.

    Eight (``#pragma unroll 8``), or all of a K that is compiled in and has fewer.
    """
    config = config_of(kernel)
    k_blocks = ceil_div(int(config["compiled_k"]), int(config["block_k"]))
    return min(k_blocks or _UNROLLED, _UNROLLED)


def _stem(header: str) -> str:
    return header.rsplit("/", 1)[-1].removesuffix(".cuh")


@lru_cache(maxsize=8192)
def _ptx_megabytes(kernel: Kernel) -> float:
    config = config_of(kernel)
    if _stem(kernel.header) != "sm90_fp8_gemm_1d2d" or not config:
        return _PTX_MEGABYTES.get(_stem(kernel.header), _PTX_DEFAULT)
    block_m, block_n, block_k = (int(config[f"block_{axis}"]) for axis in "mnk")
    # The main loop is there once for each number of K-blocks before the scales of B change.
    step = gcd(block_k, block_n)
    many = block_k % block_n and block_k // step <= _MOST_COPIES
    copies = min(block_n, block_k) // step + 1 if many else 1
    unrolled = unrolled_k_blocks(kernel) / _UNROLLED
    return 0.05 + 0.00085 * copies * unrolled * max(1, block_m // 128) * block_n
