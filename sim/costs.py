"""What the engine asks of a cost model. All answers are in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel
from runner.schedule import Collective, Compute


class CostModel(Protocol):
    """Durations of the operations of a Schedule."""

    def compile_seconds(self, kernel: Kernel) -> float:
        """One compile on a core of its own."""

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        """One builder on a node's cores: its steps, from its start; None is for several kernels."""

    def verify_seconds(self, kernel: Kernel) -> float:
        """Finding a compiled kernel whole on disk."""

    def load_seconds(self, kernel: Kernel) -> float:
        """Bringing a compiled kernel from disk into the process."""

    def kernel_seconds(self, call: KernelCall) -> float:
        """One call with all its kernels loaded."""

    def compute_seconds(self, op: Compute) -> float:
        """Work that is no DeepGEMM kernel."""

    def collective_seconds(self, op: Collective) -> float:
        """A collective once every rank has arrived."""

    def transfer_seconds(self, nbytes: int) -> float:
        """A point-to-point transfer once it has been sent."""
