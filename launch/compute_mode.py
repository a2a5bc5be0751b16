"""Whether a launch computes, and what cannot go with that."""

from __future__ import annotations

from launch.options import REAL_MATH_LIMIT, LaunchOptions
from runner.config.model import ModelConfig
from runner.errors import UserError
from runner.planning.weight_size import model_elements
from runner.scenario import Scenario


def compute_mode(options: LaunchOptions, device: str, model: ModelConfig) -> tuple[str, str]:
    """``real`` or ``skip``, and why."""
    if options.compute is not None:
        return options.compute, "as asked"
    if device == "cuda":
        return "real", "on a GPU"
    total = model_elements(model)
    if total > REAL_MATH_LIMIT:
        return "skip", f"{total / 1e9:.0f} G weights are too many for math on a CPU"
    return "real", "the model is small"


def check_graphs(scenario: Scenario, *, on_gpu: bool, backend: str) -> None:
    """A graph holds what a GPU does: nothing that goes through the host.

    Args:
        scenario: what is to run.
        on_gpu: whether a GPU computes.
        backend: what its tensors go over, ``nccl`` or ``gloo``.

    Raises:
        UserError: a forward that is to be captured goes through the host.
    """
    sizes = scenario.graph_batch_sizes
    if sizes and on_gpu and backend == "gloo" and scenario.parallel.tp > 1:
        raise UserError(
            "--cuda-graphs with --tp above 1 needs NCCL: over gloo the collectives of a "
            "forward go through the host, which no graph can hold"
        )
