"""``linear_bf16_fp32``: a bf16 linear layer with fp32 output, by one of three algorithms.

The mixture's gate and the compressors use it: what they feed, a choice of experts and a softmax,
wants more than bf16's eight bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runner.backend.entry_points import EntryPoints
from runner.config.gemm_algo import Bf16Fp32Algo


def linear_bf16_fp32(
    x: torch.Tensor, y: torch.Tensor, algo: Bf16Fp32Algo, entry_points: EntryPoints
) -> torch.Tensor:
    """``x @ y.T`` with sums and output in fp32.

    Args:
        x: activations [m, k] bf16; ``m`` may be 0.
        y: weight [n, k] bf16, on the device of ``x``.
        algo: whose code computes it.
        entry_points: what ``DEEP_GEMM`` calls; the others leave it alone.

    Returns:
        [m, n] fp32 on the device of ``x``.
    """
    return _BRANCHES[algo](x, y, entry_points)


def _cublas(x: torch.Tensor, y: torch.Tensor, _: EntryPoints) -> torch.Tensor:
    # As SGLang has it: torch knows ``out_dtype`` on CUDA alone, and for narrow operands.
    if x.is_cuda and x.dtype == y.dtype == torch.bfloat16:
        return torch.mm(x, y.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), y.float().t())


def _deep_gemm(x: torch.Tensor, y: torch.Tensor, entry_points: EntryPoints) -> torch.Tensor:
    out = torch.empty((x.shape[0], y.shape[0]), dtype=torch.float32, device=x.device)
    entry_points.gemm_nt_bf16bf16f32(x, y, out)
    return out


def _torch(x: torch.Tensor, y: torch.Tensor, _: EntryPoints) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), y.float())


_BRANCHES: dict[Bf16Fp32Algo, Callable[[torch.Tensor, torch.Tensor, EntryPoints], torch.Tensor]] = {
    Bf16Fp32Algo.CUBLAS: _cublas,
    Bf16Fp32Algo.DEEP_GEMM: _deep_gemm,
    Bf16Fp32Algo.TORCH: _torch,
}
