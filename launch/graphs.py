"""Real CUDA graphs of a rank's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runner.errors import UserError


class GraphCapture:
    """Captures forwards and keeps the graphs, as a server does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @property
    def last(self) -> torch.cuda.CUDAGraph:
        """The graph that was captured last."""
        return self._graphs[-1]

    def release(self) -> None:
        """Let the graphs go: a communicator that they use does not end before them."""
        self._graphs.clear()

    def __call__(self, forward: Callable[[], object]) -> None:
        """Capture ``forward``; without a GPU it is only run once more.

        Raises:
            UserError: the forward does what no graph can hold.
            torch.OutOfMemoryError: the GPU's memory does not.
        """
        if self._device.type != "cuda":
            forward()
            return
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.graph(graph):
                forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            words = str(error).splitlines()[0]
            raise UserError(f"a CUDA graph of this forward cannot be captured: {words}") from error
        torch.cuda.synchronize(self._device)
        self._graphs.append(graph)
