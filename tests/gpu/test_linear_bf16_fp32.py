"""Each algorithm of bf16 x bf16 -> fp32 GEMMs on a real GPU, against float64."""

from __future__ import annotations

import pytest

from runner.config.environ import Bf16Fp32Algo
from tests.gpu.library import real_wrapper

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_ERROR = 1e-4
"""A result rounded to bf16 would have an error of at least 1e-3."""

GATE, COMPRESSOR, WIDE_COMPRESSOR = (256, 4096), (1024, 4096), (2048, 4096)
"""(n, k) of dsv4."""

each_algo = pytest.mark.parametrize("algo", Bf16Fp32Algo, ids=lambda algo: algo.value)


class _Untouched:
    """Entry points that must not be called."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"{name} was called")


def _entry_points(algo: Bf16Fp32Algo):  # type: ignore[no-untyped-def]
    return real_wrapper() if algo is Bf16Fp32Algo.DEEP_GEMM else _Untouched()


@each_algo
@pytest.mark.parametrize(("n", "k"), [GATE, COMPRESSOR, WIDE_COMPRESSOR])
@pytest.mark.parametrize("m", [1, 129, 1024])
def test_each_algorithm_agrees_with_float64_on_a_gpu(
    algo: Bf16Fp32Algo, m: int, n: int, k: int
) -> None:
    from runner.backend.torch_math import TorchMath

    torch.manual_seed(m + n)
    x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
    y = torch.randn((n, k), device="cuda", dtype=torch.bfloat16)
    out = TorchMath(x.device, _entry_points(algo)).gemm_bf16_fp32(x, y, algo)
    assert out.dtype == torch.float32 and out.shape == (m, n) and out.is_cuda
    expected = x.double() @ y.double().mT
    error = float((out.double() - expected).norm() / expected.norm())
    print(f"{algo.value} m{m} n{n} k{k}: relative error {error:.2e}")
    assert error < MAX_ERROR


@each_algo
def test_input_without_rows_gives_output_without_rows(algo: Bf16Fp32Algo) -> None:
    from runner.backend.torch_math import TorchMath

    n, k = GATE
    x = torch.empty((0, k), device="cuda", dtype=torch.bfloat16)
    y = torch.ones((n, k), device="cuda", dtype=torch.bfloat16)
    out = TorchMath(x.device, _entry_points(algo)).gemm_bf16_fp32(x, y, algo)
    assert out.dtype == torch.float32 and out.shape == (0, n) and out.is_cuda
