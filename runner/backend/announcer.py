"""How a rank's operations are announced and done: what all steps of a ``Backend`` stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from runner.backend.communicator import Communicator
from runner.backend.gemm_walks import ExecutionHook
from runner.backend.kernel_store import KernelStore, NoKernels
from runner.backend.math import Math
from runner.backend.sink import OpSink, R
from runner.backend.token_to_m import MASKED_BUDGET
from runner.config.gemm_algo import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.errors import UserError
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.schedule import Compute, Mark, Walk


@dataclass(frozen=True)
class Announcer:
    """What every step of the forward needs: its interpreter, and how its operations are announced.

    Attributes:
        math: does the work behind each step.
        comm: moves tensors between ranks.
        sink: is told every operation in order.
        num_sms: SMs of the GPU that runs, or would run, the kernels.
        bf16_fp32_algo: what computes bf16 x bf16 -> fp32 GEMMs.
        masked_budget: bytes that a masked expert layout may take before the contiguous one is
            used instead, as SGLang's automatic layout choice does with a share of free memory.
        kernels: where compiled kernels come from.
        hook: tells what to walk before a call.
        left: SMs that GEMMs leave to communication, the innermost block's last.
    """

    math: Math
    comm: Communicator
    sink: OpSink
    num_sms: int
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    masked_budget: int = MASKED_BUDGET
    kernels: KernelStore = field(default_factory=NoKernels)
    hook: ExecutionHook = field(default_factory=ExecutionHook)
    left: list[int] = field(default_factory=lambda: [0])

    @property
    def gemm_sms(self) -> int:
        """SMs that GEMMs use at the moment."""
        return self.num_sms - self.left[-1]

    @contextmanager
    def leaving_sms(self, count: int) -> Iterator[None]:
        """GEMMs inside the block leave ``count`` SMs to communication.

        Raises:
            UserError: none would be left.
        """
        if count >= self.num_sms:
            raise UserError(f"comm_sms = {count} leaves none of the GPU's {self.num_sms} SMs")
        self.left.append(count)
        try:
            with self.math.gemm_sms(self.gemm_sms if count else None):
                yield
        finally:
            self.left.pop()

    def mark(self, kind: str, name: str) -> None:
        """Note a point of the forward: a phase, a layer, a yield."""
        self.sink.run(Mark(kind, name), lambda: None)

    def walk(self, walk: Walk) -> None:
        """See :meth:`KernelStore.walk`."""
        self.sink.run(walk, lambda: self.kernels.walk(walk))

    def _call(self, kind: T, m: int, n: int, k: int, groups: int) -> KernelCall:
        # What asks for the whole GPU does so beside communication too.
        sms = self.num_sms if kind is T.TF32_HC_PRENORM_GEMM else self.gemm_sms
        return KernelCall(kind, m, n, k, groups, sms)

    def _kernel(self, call: KernelCall, work: Callable[[], R]) -> R:
        for walk in self.hook.before(call):
            self.walk(walk)
        return self.sink.run(call, work)

    def _quantise(self, x: Any) -> None:
        """Announce the activation quantisation; the work is part of the GEMM's math."""
        self.sink.run(Compute("quantise_fp8", 0, x.nbytes + x.nbytes // 2), lambda: None)

    def _compute(self, name: str, nbytes: int, work: Callable[[], R], *, flops: int = 0) -> R:
        return self.sink.run(Compute(name, flops, nbytes), work)


def bf16_bytes(x: Any) -> int:
    """Bytes of a tensor in bf16, in which it goes over memory and wire whatever it is here."""
    return 2 * int(prod(x.shape))
