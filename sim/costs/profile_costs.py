"""A profile's cost model: tables for compiles, roofline for kernels, alpha-beta for links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from runner.build.estimates import expected_schedule, plain_seconds, unrolled_k_blocks
from runner.build.units import split_into_units
from runner.kernels.kernel import Kernel
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import Begin, Capture, Collective, Compute
from sim.costs.profile import CompileTimes, Link, Profile

_FP8_TYPES = frozenset(
    {
        T.GEMM_NT_F8F8BF16,
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        T.FP8_EINSUM_BHR_HDR_BHD,
        T.FP8_MQA_LOGITS,
        T.FP8_PAGED_MQA_LOGITS,
    }
)

_SENDS = {"all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1}
"""How often a rank sends each byte of its input, except for its own share."""

_ONE_STEP = "all_to_all"
"""The collective in which all ranks send at once; others take ``n - 1`` steps around a ring."""


_TILED = ("sm90_fp8_gemm_1d2d", "sm90_bf16_gemm")
_SHAPE = (1, 2)
"""Template arguments for dimensions and the number of groups."""

_SMS = 8
"""The template argument that is or begins with the number of SMs."""


class Seconds(NamedTuple):
    """Work of one rank: overlapping seconds of its host and of its GPU."""

    host: float
    device: float = 0.0


@dataclass(frozen=True, eq=False)
class ProfileCosts:
    """Seconds that a Schedule's operations take on a profile's machine."""

    profile: Profile
    link: Link  # of collectives and transfers
    cores: int  # CPU cores of a machine
    ranks_per_gpu: int = 1  # they share its time
    _compile_seconds: dict[Kernel, float] = field(default_factory=dict, init=False)

    @property
    def host_call(self) -> float:
        """Seconds of one operation on the host."""
        host = self.profile.host
        return host.call if self.ranks_per_gpu == 1 else host.shared_call

    @property
    def first_forward(self) -> float:
        """Extra seconds of a rank's first forward on its host."""
        return self.profile.host.first_forward

    def compile_seconds(self, kernel: Kernel) -> float:
        """Seconds of one compile alone on a machine."""
        if kernel not in self._compile_seconds:
            self._compile_seconds[kernel] = compile_seconds(self.profile.compile, kernel)
        return self._compile_seconds[kernel]

    def slowdown(self, compilers: int) -> float:
        """Factor by which each of ``compilers`` parallel compiles is slower than one alone."""
        return slowdown(self.profile.compile, compilers, self.cores)

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        """One builder's steps from its start; kernel None is a front end for several kernels."""
        if not kernels:
            return []
        builder = self.profile.builder
        units = split_into_units(kernels, cores)
        return [
            (
                step.kernel,
                builder.start + builder.scale * step.start,
                builder.start + builder.scale * step.end,
            )
            for step in expected_schedule(units, cores)
        ]

    def verify_seconds(self) -> float:
        """Seconds to check that a compiled kernel on disk is whole."""
        return self.profile.cache.verify

    def load_seconds(self, *, bulk: bool) -> float:
        """Seconds to load a compiled kernel from disk, on its own or inside a call."""
        return self.profile.cache.load if bulk else self.profile.cache.first_use

    def kernel_seconds(self, call: KernelCall) -> Seconds:
        """Time of one call whose kernels are loaded."""
        return Seconds(self.host_call, self._device(call) * self.ranks_per_gpu)

    def walk_seconds(self) -> float:
        """Seconds of a walk without its calls."""
        return self.profile.host.walk

    def walk_call_seconds(self, shape: GemmShape, mean_m: float, max_m: int) -> Seconds:
        """Time of one call of a walk up to ``max_m``; linear in M, so a mean M covers many calls.

        As in upstream's executor, a walk of a masked GEMM uses no rows; it only transposes the
        scales of ``max_m`` rows per group.
        """
        if shape.type in MASKED_TYPES:
            scales = 8.0 * shape.num_groups * max_m * (shape.k // 128)
            device = scales / self.profile.gpu.memory_bandwidth
        else:
            device = self._device(shape.call(round(mean_m)))
        return Seconds(self.profile.host.walk_call, device)

    def compute_seconds(self, op: Compute) -> Seconds:
        """Time of work other than DeepGEMM kernels."""
        gpu = self.profile.gpu
        device = max(op.flops / gpu.bf16_flops, op.bytes / gpu.memory_bandwidth)
        return Seconds(self.host_call, device * self.ranks_per_gpu)

    def capture_seconds(self, op: Capture) -> float:
        start_up = self.profile.start_up
        return start_up.capture + op.operations * start_up.capture_operation

    def _device(self, call: KernelCall) -> float:
        """Roofline of a call; fewer SMs lower the peak rate but not the bandwidth."""
        gpu = self.profile.gpu
        flops, nbytes = gemm_work(call)
        peak = gpu.fp8_flops if call.type in _FP8_TYPES else gpu.bf16_flops
        peak *= min(1.0, call.num_sms / self.profile.num_sms)
        return gpu.kernel + max(flops / peak, nbytes / gpu.memory_bandwidth)

    def collective_seconds(self, op: Collective | Begin) -> float:
        """Seconds of a collective of ``n`` ranks once all have arrived and their links are free.

        Of a rank's bytes, an all-reduce sends 2 (n - 1) / n, a reduce-scatter or an all-to-all
        (n - 1) / n, and a gather n - 1 times all. All but the all-to-all go around a ring.
        """
        n, kind = len(op.group), op.name.partition(" ")[0]
        times = _SENDS.get(kind)
        turns = self._turns(1 if kind == _ONE_STEP else (times or 1) * (n - 1))
        if times is not None:
            return turns + self.link.seconds(times * (n - 1) / n * op.bytes)
        bandwidth = self.link.gather_bandwidth or self.link.bandwidth
        return turns + self.link.latency + (n - 1) * op.bytes / bandwidth

    def transfer_seconds(self, nbytes: int) -> float:
        """Seconds from a send until its bytes arrive."""
        return self._turns(1) + self.link.seconds(nbytes)

    def _turns(self, steps: int) -> float:
        """Seconds that NCCL's steps wait for the GPU's other ranks, which take turns."""
        if not self.link.queues:
            return 0.0
        return steps * (self.ranks_per_gpu - 1) * self.profile.gpu.time_slice


def gemm_work(call: KernelCall) -> tuple[float, float]:
    """(floating-point operations, bytes moved) of a call."""
    m, n, k, groups = call.m, call.n, call.k, call.num_groups
    if call.type in MASKED_TYPES:
        return 2.0 * groups * m * n * k, groups * (m * k + n * k + 2.0 * m * n)
    if call.type in CONTIGUOUS_TYPES:
        used = min(groups, m // 128)
        return 2.0 * m * n * k, m * k + used * n * k + 2.0 * m * n
    if call.type is T.FP8_EINSUM_BHR_HDR_BHD:
        return 2.0 * groups * m * n * k, groups * (m * k + n * k + 2.0 * m * n)
    if call.type is T.TF32_HC_PRENORM_GEMM:
        return 2.0 * m * n * k, 2.0 * m * k + 4.0 * n * k + 4.0 * max(1, groups) * m * n
    width = 1 if call.type in _FP8_TYPES else 2
    return 2.0 * m * n * k, width * (m * k + n * k) + 4.0 * m * n


def template_of(kernel: Kernel) -> str:
    """The kernel's template, shared by dense, contiguous and masked GEMMs of a family."""
    return kernel.entry.rsplit("::", 1)[-1].removesuffix("_impl")


def config_key(kernel: Kernel) -> str:
    """Template and configuration (tile, stages, threads, ...) of a kernel.

    Shape, groups and SMs are left out: of these, only a short K changes the code size, since its
    loop is fully unrolled.
    """
    template = template_of(kernel)
    if template not in _TILED:
        return template
    words = [word for i, word in enumerate(kernel.arguments) if i not in (*_SHAPE, _SMS)]
    words += kernel.arguments[_SMS].split(", ")[1:]
    words.append(f"{unrolled_k_blocks(kernel)} K-blocks")
    return f"{template} {' | '.join(words)}"


def compile_seconds(times: CompileTimes, kernel: Kernel) -> float:
    """Seconds of a compile alone on a machine: measured, or else estimated from its code size."""
    measured = times.by_config.get(config_key(kernel))
    if measured is not None:
        return measured
    return times.scale.get(template_of(kernel), times.default_scale) * plain_seconds(kernel)


def slowdown(times: CompileTimes, compilers: int, cores: int) -> float:
    """Factor by which each of ``compilers`` compiles on ``cores`` cores is slower than alone."""
    busy = min(compilers, cores)
    contention = times.contention * (busy - 1) / max(cores - 1, 1)
    return (1.0 + contention) * compilers / busy
