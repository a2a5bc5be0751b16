"""Configuration choice of DeepGEMM 0.1.4.post1 on SM90 (``get_best_config<SM90ArchSpec>``).

Source: csrc/jit_kernels/heuristics/{common,config,sm90,utils}.hpp of DeepGEMM 2.6. The arithmetic
is repeated as written there, single-precision steps included, because ties and roundings decide
which kernel is built.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from math import inf

from runner.errors import UserError

SMEM_CAPACITY = 232448
_MAX_STAGES = 16
_WGMMA_M = 64
_INT64_MAX = 2**63 - 1
CONTIGUOUS_M_ALIGNMENT = 128
"""Rows to which each expert's tokens are padded in the contiguous grouped layout."""


class GemmType(Enum):
    """DeepGEMM's ``GemmType``; the value is its C++ spelling."""

    NORMAL = "GemmType::Normal"
    M_GROUPED_CONTIGUOUS = "GemmType::MGroupedContiguous"
    M_GROUPED_MASKED = "GemmType::MGroupedMasked"
    BATCHED = "GemmType::Batched"


class KernelFamily(Enum):
    """DeepGEMM's ``KernelType``: with 1D2D block scales, or without scales."""

    FP8_1D2D = "1d2d"
    NO_SF = "no_sf"


@dataclass(frozen=True, slots=True)
class GemmDesc:
    """What a GEMM is asked to do. Sizes in elements; both operands K-major, no accumulation."""

    gemm_type: GemmType
    family: KernelFamily
    m: int
    n: int
    k: int
    num_groups: int
    num_sms: int
    fp32_output: bool = False
    expected_m: int = 0
    expected_num_groups: int = 0

    @property
    def ab_bytes(self) -> int:
        """Bytes of an input element."""
        return 1 if self.family is KernelFamily.FP8_1D2D else 2

    @property
    def cd_bytes(self) -> int:
        """Bytes of an output element."""
        return 4 if self.fp32_output else 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Tile and cluster sizes."""

    block_m: int
    block_n: int
    block_k: int
    cluster_m: int
    cluster_n: int

    @property
    def cluster_size(self) -> int:
        """Thread blocks that share loads."""
        return self.cluster_m * self.cluster_n


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How a GEMM is done: everything that the kernel's template arguments need."""

    layout: Layout
    swizzle_a_mode: int
    swizzle_b_mode: int
    swizzle_cd_mode: int
    num_stages: int
    num_tma_threads: int
    num_math_threads: int
    num_sms: int


def ceil_div(a: int, b: int) -> int:
    """Integer division rounded up."""
    return -(-a // b)


def align(a: int, b: int) -> int:
    """``a`` rounded up to a multiple of ``b``."""
    return ceil_div(a, b) * b


def swizzle_mode(block_size: int, element_bytes: int) -> int:
    """Widest TMA swizzle, in bytes, that divides a row of the block."""
    return next(mode for mode in (128, 64, 32, 16) if block_size * element_bytes % mode == 0)


def get_best_config(desc: GemmDesc) -> GemmConfig:
    """The configuration that the library picks for ``desc``; the first of equals wins."""
    return _chooser(replace(desc, m=_bracket(desc.m), expected_m=0)).choose(
        desc.expected_m or desc.m
    )


def _bracket(m: int) -> int:
    """M as far as the candidates depend on it."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


M_GRANULE = 64
"""Above M = 32 the choice can change only after a multiple of this many rows: M enters the model
as ``ceil(M / block_m)`` alone, and every candidate's ``block_m`` is a multiple of 64 there."""


@lru_cache(maxsize=4096)
def _chooser(desc: GemmDesc) -> _Chooser:
    return _Chooser(desc)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layout with everything of the cycle model that does not depend on M."""

    layout: Layout
    blocks_per_row: int
    l1_bytes: int
    l2_bytes: int
    cycles: float


class _Chooser:
    """Picks the layout for any M of one bracket; all else of the GEMM is fixed."""

    def __init__(self, desc: GemmDesc) -> None:
        self._desc = desc
        self._l1 = 128 * desc.num_sms
        self._l2 = int(min(64.0 * desc.num_sms, 8e6 / 1.3e3))
        self._candidates = [self._candidate(layout) for layout in _layout_candidates(desc)]
        if not self._candidates:
            raise UserError(
                f"no {desc.family.value} kernel of {desc.gemm_type.value} exists for n={desc.n}, "
                f"k={desc.k}: its tiles do not fit shared memory"
            )
        self._configs: dict[Layout, GemmConfig] = {}

    def choose(self, m: int) -> GemmConfig:
        """The configuration for ``m`` rows (the expected ones where the library is told)."""
        layout = self._best(m)
        if layout not in self._configs:
            self._configs[layout] = _config(self._desc, layout)
        return self._configs[layout]

    def _best(self, m: int) -> Layout:
        """The first candidate with the fewest modelled cycles.

        An estimate sorts out all but the closest; those are compared in the library's own
        arithmetic. The library cuts cycles to whole ones before it divides by the efficiency
        (at least 1 / num_sms) and rounds to 24 bits, so it is off by less than the bound allows.
        """
        num_sms = self._desc.num_sms
        rough = []
        for candidate in self._candidates:
            blocks = -(-m // candidate.layout.block_m) * candidate.blocks_per_row
            waves = -(-blocks // num_sms)
            multicast_of_one_wave = waves <= 1 and candidate.layout.cluster_size > 1
            rough.append(inf if multicast_of_one_wave else candidate.cycles * waves * num_sms)
        bound = min(rough) * (1 + 1e-6) + 2 * num_sms
        close = [c for c, cycles in zip(self._candidates, rough, strict=True) if cycles <= bound]
        if len(close) == 1:
            return close[0].layout
        return min(close, key=lambda candidate: self._cycles(candidate, m)).layout

    def _candidate(self, layout: Layout) -> _Candidate:
        desc, ab = self._desc, self._desc.ab_bytes
        block_m, block_n = layout.block_m, layout.block_n
        output = block_m * block_n * desc.cd_bytes
        l2_in = desc.k * (block_m // layout.cluster_n + block_n // layout.cluster_m) * ab
        l1_in = desc.k * (block_m + block_n) * ab
        l1_tensor_core = desc.k * (max(_WGMMA_M, block_m) + block_n) * ab + output
        l1, l2 = l1_in + l1_tensor_core + output, l2_in + output
        groups = desc.expected_num_groups or desc.num_groups
        rate = max(l1 / self._l1, l2 / self._l2)
        return _Candidate(layout, ceil_div(desc.n, block_n) * groups, l1, l2, rate)

    def _cycles(self, candidate: _Candidate, m: int) -> int:
        """Modelled L1/L2 cycles, the only quantity that the library compares."""
        blocks = ceil_div(m, candidate.layout.block_m) * candidate.blocks_per_row
        waves = ceil_div(blocks, self._desc.num_sms)
        if candidate.layout.cluster_size > 1 and waves <= 1:
            return _INT64_MAX
        l1_cycles = candidate.l1_bytes * blocks // self._l1
        l2_cycles = candidate.l2_bytes * blocks // self._l2
        efficiency = _f32(_f32(blocks) / _f32(waves * self._desc.num_sms))
        return int(_f32(_f32(max(l1_cycles, l2_cycles)) / efficiency))


def _config(desc: GemmDesc, layout: Layout) -> GemmConfig:
    swizzles = _swizzles(desc, layout)
    return GemmConfig(
        layout=layout,
        swizzle_a_mode=swizzles[0],
        swizzle_b_mode=swizzles[1],
        swizzle_cd_mode=swizzles[2],
        num_stages=_num_stages(desc, layout),
        num_tma_threads=128,
        num_math_threads=128 if layout.block_m <= 64 else 256,
        num_sms=desc.num_sms,
    )


def _layout_candidates(desc: GemmDesc) -> list[Layout]:
    candidates = []
    for cluster_m, cluster_n in _clusters(desc):
        for block_m in _block_m_candidates(desc):
            for block_n in range(16, (192 if _has_scales(desc) else 256) + 1, 16):
                layout = Layout(block_m, block_n, 128 // desc.ab_bytes, cluster_m, cluster_n)
                if _is_legal(desc, layout):
                    candidates.append(layout)
    return candidates


def _clusters(desc: GemmDesc) -> list[tuple[int, int]]:
    pairs = [(1, 1)] if desc.gemm_type is GemmType.BATCHED else [(1, 1), (1, 2), (2, 1)]
    return [pair for pair in pairs if desc.num_sms % (pair[0] * pair[1]) == 0]


def _block_m_candidates(desc: GemmDesc) -> list[int]:
    if desc.gemm_type is GemmType.M_GROUPED_CONTIGUOUS:
        return [CONTIGUOUS_M_ALIGNMENT]
    if desc.gemm_type is GemmType.M_GROUPED_MASKED:
        return [64, 128]
    sizes = [64, 128]
    if desc.m <= 16:
        sizes.append(16)
    if desc.m <= 32:
        sizes.append(32)
    if not desc.fp32_output:
        sizes.append(256)
    return sizes


def _is_legal(desc: GemmDesc, layout: Layout) -> bool:
    block_m, block_n, block_k = layout.block_m, layout.block_n, layout.block_k
    excess = block_n - block_k
    if _has_scales(desc) and excess > 0 and block_n % excess and block_k % excess:
        return False
    masked = desc.gemm_type is GemmType.M_GROUPED_MASKED
    if masked and ceil_div(desc.n, block_n) % layout.cluster_size:
        return False
    if block_m > 128 and block_n > 128:
        return False
    swizzle_a, swizzle_b, _ = _swizzles(desc, layout)
    if swizzle_a % 64 or swizzle_b % 64:
        return False
    num_stages = _num_stages(desc, layout)
    return num_stages >= 4 or (num_stages == 3 and block_m * block_n >= 128 * 192)


def _has_scales(desc: GemmDesc) -> bool:
    return desc.family is KernelFamily.FP8_1D2D


def _swizzles(desc: GemmDesc, layout: Layout) -> tuple[int, int, int]:
    operand = swizzle_mode(layout.block_k, desc.ab_bytes)
    output = 0 if desc.fp32_output else swizzle_mode(layout.block_n, desc.cd_bytes)
    return operand, operand, output


def _num_stages(desc: GemmDesc, layout: Layout) -> int:
    block_m, block_n, block_k = layout.block_m, layout.block_n, layout.block_k
    extra = align(block_m * block_n * desc.cd_bytes, 1024) + _MAX_STAGES * 8 * 2
    per_stage = (block_m + block_n) * block_k * desc.ab_bytes
    if _has_scales(desc):
        scales_per_k_block = 1 if block_k % block_n == 0 else 2
        extra += align(ceil_div(desc.k, block_k) * 4 * scales_per_k_block, 8)
        per_stage += align(block_m * 4, 128)
    return min((SMEM_CAPACITY - extra) // per_stage, _MAX_STAGES)


def _f32(value: float) -> float:
    """``value`` rounded to single precision, as the C++ code's ``float`` holds it."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
