"""What the engine asks of a cost model. All answers are in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from runner.kernels.kernel import Kernel
from runner.kernels.types import GemmShape, KernelCall
from runner.schedule import Begin, Capture, Collective, Compute


class Seconds(NamedTuple):
    """Work of one rank: seconds of its host and of its GPU, which overlap."""

    host: float
    device: float = 0.0


class CostModel(Protocol):
    """Durations of the operations of a Schedule."""

    @property
    def first_forward(self) -> float:
        """What a rank's first forward takes more than those after it, on its host."""

    def compile_seconds(self, kernel: Kernel) -> float:
        """One compile alone on a node."""

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        """One builder on a node's cores: its steps, from its start; None is for several kernels."""

    def verify_seconds(self, kernel: Kernel) -> float:
        """Finding a compiled kernel whole on disk."""

    def load_seconds(self, kernel: Kernel, *, bulk: bool) -> float:
        """Bringing a compiled kernel from disk into the process: on its own, or inside a call."""

    def kernel_seconds(self, call: KernelCall) -> Seconds:
        """One call with all its kernels loaded."""

    def walk_call_seconds(self, shape: GemmShape, mean_m: float, max_m: int) -> Seconds:
        """A call of a walk up to ``max_m`` whose kernels are loaded."""

    def walk_seconds(self) -> float:
        """What a walk takes besides its calls."""

    def compute_seconds(self, op: Compute) -> Seconds:
        """Work that is no DeepGEMM kernel."""

    def capture_seconds(self, op: Capture) -> float:
        """Capturing a CUDA graph."""

    def collective_seconds(self, op: Collective | Begin) -> float:
        """A collective once every rank has arrived, or begun it, and their links are free."""

    def transfer_seconds(self, nbytes: int) -> float:
        """A point-to-point transfer once it has been sent."""

    def slowdown(self, compilers: int) -> float:
        """How much longer a compile takes while so many run on a node."""
