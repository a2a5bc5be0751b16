"""Where the kernels of a ``Backend`` come from."""

from __future__ import annotations

from typing import Protocol

from runner.kernels.kernel import Kernel
from runner.schedule import Walk


class KernelStore(Protocol):
    """Where a rank's compiled kernels come from."""

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Compile kernels into this node's cache; nothing happens for none."""

    def verify(self, kernels: tuple[Kernel, ...]) -> None:
        """Make sure that this node's cache holds kernels, whole."""

    def load(self, kernels: tuple[Kernel, ...]) -> None:
        """Bring kernels into this process."""

    def exchange(self) -> None:
        """Wait for all nodes' builds and give every node's cache what the others built."""

    def walk(self, walk: Walk) -> None:
        """Call a GEMM with every M of a list."""

    def wait(self) -> None:
        """Wait for all ranks."""


class NoKernels:
    """For shapes alone: no kernel is ever there."""

    def build(self, kernels: tuple[Kernel, ...]) -> None:
        """Nothing to build."""

    def verify(self, kernels: tuple[Kernel, ...]) -> None:
        """Nothing to verify."""

    def load(self, kernels: tuple[Kernel, ...]) -> None:
        """Nothing to load."""

    def exchange(self) -> None:
        """Nothing to exchange."""

    def walk(self, walk: Walk) -> None:
        """Nothing to walk."""

    def wait(self) -> None:
        """Nobody to wait for."""
