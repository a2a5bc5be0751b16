"""The cost model of a profile: tables for compiles, roofline for kernels, alpha-beta for links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from runner.build.cut import cut_units, expected_schedule
from runner.build.unit import Job
from runner.kernels.kernel import Kernel
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import Begin, Capture, Collective, Compute
from sim.costs.compile_time import compile_seconds, slowdown
from sim.costs.model import Seconds
from sim.costs.profile import Link, Profile

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
"""How often a rank sends each byte of what it has, its own share left out."""
_ONE_STEP = "all_to_all"
"""What all ranks do at once; the others go round a ring, as often as a byte is sent."""


@dataclass(frozen=True)
class ProfileCosts:
    """Cost model of a profile.

    Attributes:
        link: the link that collectives and transfers use.
        cores: CPU cores of a node.
        ranks_per_gpu: ranks that share one GPU; its time is divided among them.
        walkers_per_gpu: how many of them walk at a time.
    """

    profile: Profile
    link: Link
    cores: int
    ranks_per_gpu: int = 1
    walkers_per_gpu: int = 1

    @cached_property
    def _compile_memo(self) -> dict[Kernel, float]:
        return {}

    @cached_property
    def host_call(self) -> float:
        """Seconds of the host for one operation."""
        host = self.profile.host
        return host.call if self.ranks_per_gpu == 1 else host.shared_call

    @property
    def first_forward(self) -> float:
        """One constant for all ranks."""
        return self.profile.host.first_forward

    def compile_seconds(self, kernel: Kernel) -> float:
        """See :func:`sim.costs.compile_time.compile_seconds`."""
        memo = self._compile_memo
        if kernel not in memo:
            memo[kernel] = compile_seconds(self.profile.compile, kernel)
        return memo[kernel]

    def slowdown(self, compilers: int) -> float:
        """Linear up to the cores, which are shared beyond."""
        return slowdown(self.profile.compile, compilers, self.cores)

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        """The builder's own expectation, scaled to this machine."""
        if not kernels:
            return []
        builder = self.profile.builder
        units = cut_units([Job("", kernel, "") for kernel in kernels], cores)
        return [
            (
                item.kernel,
                builder.start + builder.scale * item.start,
                builder.start + builder.scale * item.end,
            )
            for item in expected_schedule(units, cores)
        ]

    def verify_seconds(self, kernel: Kernel) -> float:
        """One constant for all kernels."""
        return self.profile.cache.verify

    def load_seconds(self, kernel: Kernel, *, bulk: bool) -> float:
        """One constant for all kernels."""
        return self.profile.cache.load if bulk else self.profile.cache.first_use

    def kernel_seconds(self, call: KernelCall) -> Seconds:
        """Roofline over the shape, plus the host's cost of a call."""
        return Seconds(self.host_call, self._device(call) * self.ranks_per_gpu)

    def walk_call_seconds(self, shape: GemmShape, mean_m: float, max_m: int) -> Seconds:
        """The roofline is linear in M but for its corner, so a mean M stands for many.

        In a walk of a masked GEMM no row is in use, as upstream's executor makes it; what is left
        is the transpose of the scales of ``max_m`` rows a group.
        """
        if shape.type in MASKED_TYPES:
            scales = 8.0 * shape.num_groups * max_m * (shape.k // 128)
            device = scales / self.profile.gpu.memory_bandwidth
        else:
            device = self._device(shape.call(round(mean_m)))
        return Seconds(self.profile.host.walk_call, device * self.walkers_per_gpu)

    def walk_seconds(self) -> float:
        """One constant for all walks."""
        return self.profile.host.walk

    def compute_seconds(self, op: Compute) -> Seconds:
        """Roofline over the announced work, plus the host's cost of a call."""
        gpu = self.profile.gpu
        device = max(op.flops / gpu.bf16_flops, op.bytes / gpu.memory_bandwidth)
        return Seconds(self.host_call, device * self.ranks_per_gpu)

    def capture_seconds(self, op: Capture) -> float:
        """A constant and the host's cost of each operation."""
        start_up = self.profile.start_up
        return start_up.capture + op.operations * start_up.capture_operation

    def _device(self, call: KernelCall) -> float:
        """Roofline and what each call takes; fewer SMs have less of the peak, not of the memory."""
        gpu = self.profile.gpu
        flops, nbytes = gemm_work(call)
        peak = gpu.fp8_flops if call.type in _FP8_TYPES else gpu.bf16_flops
        peak *= min(1.0, call.num_sms / self.profile.num_sms)
        return gpu.kernel + max(flops / peak, nbytes / gpu.memory_bandwidth)

    def collective_seconds(self, op: Collective | Begin) -> float:
        """Bytes that a rank sends in a ring, as shares of what it has, over the link's rate.

        An all-reduce sends twice (n - 1) / n of it, a scatter that sums and an all-to-all
        (n - 1) / n, and what gathers n - 1 times it.
        """
        n, kind = len(op.group), op.name.partition(" ")[0]
        times = _SENDS.get(kind)
        turns = self._turns(1 if kind == _ONE_STEP else (times or 1) * (n - 1))
        if times is not None:
            return turns + self.link.seconds(times * (n - 1) / n * op.bytes)
        bandwidth = self.link.gather_bandwidth or self.link.bandwidth
        return turns + self.link.latency + (n - 1) * op.bytes / bandwidth

    def transfer_seconds(self, nbytes: int) -> float:
        """Latency and bandwidth of the link."""
        return self._turns(1) + self.link.seconds(nbytes)

    def _turns(self, steps: int) -> float:
        """What steps of communication wait for others' turns at the GPU; NCCL's are its work."""
        if not self.link.queues:
            return 0.0
        return steps * (self.ranks_per_gpu - 1) * self.profile.gpu.time_slice


def gemm_work(call: KernelCall) -> tuple[float, float]:
    """(operations, bytes moved) of a call."""
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
