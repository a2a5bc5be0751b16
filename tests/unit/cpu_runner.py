"""A rank that really computes, on the CPU with the reference library."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch

from runner.backend.base import Backend
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.torch_math import TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.config.environ import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.hf import from_hf
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.deep_gemm_wrapper import reference
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.model.model_runner import ModelRunner
from tests.models import DSV3_SMALL

CPU = torch.device("cpu")
FOUR_LAYERS = replace(DSV4_TINY, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
"""One layer has sliding-window attention, two compress by 4 and one by 128."""

SMALL_DSV3 = from_hf(DSV3_SMALL, "dsv3-small")


def on_reference(*, check: bool = False) -> DeepGemmWrapper:
    return DeepGemmWrapper(cast(ModuleType, reference), sanity_check=check)


def cpu_runner(
    model: ModelConfig,
    gemms: Any = None,
    *,
    algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO,
    **parallel: int,
) -> ModelRunner:
    """The runner of rank 0 of a layout."""
    math = TorchMath(CPU, gemms or on_reference())
    backend = Backend(ScheduleRecorder(), 132, math, bf16_fp32_algo=algo)
    return ModelRunner.build(
        model,
        ParallelConfig(**parallel),
        0,
        backend=backend,
        weights=TorchWeights(0, CPU),
    )
