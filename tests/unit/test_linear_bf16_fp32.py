"""bf16 x bf16 -> fp32 GEMMs: three algorithms, and how one is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from launch.cli import main as launch  # noqa: E402
from runner.backend.forward_batch import ForwardMode  # noqa: E402
from runner.backend.torch_math import TorchMath  # noqa: E402
from runner.cli import cli  # noqa: E402
from runner.config.environ import Bf16Fp32Algo, Environ  # noqa: E402
from runner.config.parallel import ParallelConfig  # noqa: E402
from runner.config.warmup import WarmupPolicy  # noqa: E402
from runner.deep_gemm_wrapper import reference  # noqa: E402
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper  # noqa: E402
from runner.driver.run import record  # noqa: E402
from runner.errors import run_guarded  # noqa: E402
from runner.kernels.types import DeepGemmKernelType as T  # noqa: E402
from runner.kernels.types import KernelCall  # noqa: E402
from runner.planning.plan import plan_of  # noqa: E402
from runner.scenario import Scenario  # noqa: E402
from runner.schedule import Compute  # noqa: E402
from tests.unit.cpu_runner import (  # noqa: E402
    CPU,
    FOUR_LAYERS,
    SMALL_DSV3,
    cpu_runner,
    on_reference,
)
from tests.unit.test_launch_options import parsed  # noqa: E402

VARIABLE = "SGLANG_OPT_BF16_FP32_GEMM_ALGO"
each_algo = pytest.mark.parametrize("algo", Bf16Fp32Algo, ids=lambda algo: algo.value)
others = pytest.mark.parametrize(
    "algo", [Bf16Fp32Algo.CUBLAS, Bf16Fp32Algo.TORCH], ids=lambda algo: algo.value
)


class Spy(DeepGemmWrapper):
    """The reference library; records the (m, n, k) of its bf16 GEMMs."""

    def __init__(self, *, compute: bool = True) -> None:
        super().__init__(reference)
        self.calls: list[tuple[int, int, int]] = []
        self._compute = compute

    def gemm_nt_bf16bf16f32(self, lhs: Any, rhs: Any, out: Any) -> None:
        self.calls.append((lhs.shape[0], rhs.shape[0], lhs.shape[1]))
        if self._compute:
            super().gemm_nt_bf16bf16f32(lhs, rhs, out)


# -- one linear layer -----------------------------------------------------------------------------


@each_algo
@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 40), n=st.integers(1, 70), k=st.integers(1, 600), seed=st.integers(0, 99))
def test_each_algorithm_agrees_with_float64(
    algo: Bf16Fp32Algo, m: int, n: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(torch.bfloat16)
    y = torch.randn(n, k, generator=generator).to(torch.bfloat16)
    out = TorchMath(CPU, on_reference()).gemm_bf16_fp32(x, y, algo)
    assert out.dtype == torch.float32 and out.shape == (m, n) and out.device == x.device
    # A product of two bf16 is exact in fp32. The error of a sum of k products is at most k half
    # ulps of the sum of their magnitudes.
    limit = (x.double().abs() @ y.double().abs().T) * (k + 1) * 2**-24
    assert bool(((out.double() - x.double() @ y.double().T).abs() <= limit).all())


class Log(TorchDispatchMode):
    """Records the names of torch operators as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def products_on(device: str, algo: Bf16Fp32Algo) -> tuple[list[str], list[tuple[int, int, int]]]:
    """torch's conversions and matrix products, and calls of the DeepGEMM entry point.

    Uses fake tensors, so that "cuda" works without a GPU.
    """
    spy = Spy(compute=False)
    with FakeTensorMode(), Log() as log:
        x = torch.empty(5, 256, dtype=torch.bfloat16, device=device)
        y = torch.empty(7, 256, dtype=torch.bfloat16, device=device)
        made = TorchMath(x.device, spy).gemm_bf16_fp32(x, y, algo)
    assert made.dtype == torch.float32 and made.shape == (5, 7) and made.device.type == device
    return [name for name in log.names if "mm" in name or "_to_copy" in name], spy.calls


WIDENED = ["aten._to_copy.default", "aten._to_copy.default", "aten.mm.default"]


@pytest.mark.parametrize(
    ("device", "algo", "operators", "calls"),
    [
        ("cpu", Bf16Fp32Algo.DEEP_GEMM, [], [(5, 7, 256)]),
        ("cuda", Bf16Fp32Algo.DEEP_GEMM, [], [(5, 7, 256)]),
        # torch has a bf16 product with fp32 output only on CUDA.
        ("cpu", Bf16Fp32Algo.CUBLAS, WIDENED, []),
        ("cuda", Bf16Fp32Algo.CUBLAS, ["aten.mm.dtype"], []),
        ("cpu", Bf16Fp32Algo.TORCH, WIDENED, []),
        ("cuda", Bf16Fp32Algo.TORCH, WIDENED, []),
    ],
)
def test_operators_and_entry_points_called_by_each_algorithm(
    device: str, algo: Bf16Fp32Algo, operators: list[str], calls: list[tuple[int, int, int]]
) -> None:
    assert products_on(device, algo) == (operators, calls)


# -- the model ------------------------------------------------------------------------------------


def wide_shapes(model: Any) -> list[tuple[int, int, int]]:
    """(m, n, k) of gate and compressors in a DECODE of three tokens, in call order."""
    found = []
    hidden, experts = model.hidden_size, model.moe.n_routed_experts
    for layer in range(model.num_hidden_layers):
        ratio = model.compress_ratio(layer)
        overlap = 2 if ratio == 4 else 1
        if ratio:
            found.append((3, 2 * overlap * model.head_dim, hidden))
        if ratio == 4:
            found.append((3, 4 * model.index_head_dim, hidden))
        found.append((3, experts, hidden))
    return found


@each_algo
def test_gate_and_compressors_of_dsv4_use_the_chosen_algorithm(algo: Bf16Fp32Algo) -> None:
    """One layer has sliding-window attention, two compress by 4 and one by 128."""
    spy = Spy()
    runner = cpu_runner(FOUR_LAYERS, spy, algo=algo)
    with torch.inference_mode():
        assert runner._dummy_run(3, ForwardMode.DECODE).shape == (3, 1024)
    expected = wide_shapes(FOUR_LAYERS)
    assert len(expected) == 4 + 3 + 2
    assert spy.calls == (expected if algo is Bf16Fp32Algo.DEEP_GEMM else [])


MODELS = {"dsv4": FOUR_LAYERS, "dsv3": SMALL_DSV3}


@others
@pytest.mark.parametrize("name", MODELS)
def test_other_algorithms_replace_only_the_bf16_kernel_calls(name: str, algo: Bf16Fp32Algo) -> None:
    def recorded(chosen: Bf16Fp32Algo) -> list[Any]:
        scenario = Scenario(
            model=MODELS[name],
            parallel=ParallelConfig(tp=2),
            bf16_fp32_algo=chosen,
            policy=WarmupPolicy.NONE,
            batch_sizes=(1, 24),
        )
        return list(record(scenario).ranks[0])

    changed = 0
    pairs = zip(recorded(Bf16Fp32Algo.DEEP_GEMM), recorded(algo), strict=True)
    for before, after in pairs:
        if isinstance(before, KernelCall) and before.type is T.GEMM_NT_BF16BF16F32:
            changed += 1
            nbytes = 2 * (before.m + before.n) * before.k + 4 * before.m * before.n
            flops = 2 * before.m * before.n * before.k
            assert after == Compute("linear_bf16_fp32", flops, nbytes)
        else:
            assert after == before
    assert changed


# -- the environment ------------------------------------------------------------------------------


@each_algo
def test_launch_takes_algorithm_from_environment(algo: Bf16Fp32Algo) -> None:
    environ = Environ.read({VARIABLE: algo.value})
    options = parsed("--model", "dsv4-tiny", "--max-tokens", "64", "--batch-sizes", "1")
    scenario = options.scenario(environ, policy=WarmupPolicy.PLANNED)
    assert scenario.bf16_fp32_algo is scenario.deployment.bf16_fp32_algo is algo
    types = {demand.shape.type for demand in plan_of(scenario).demands}
    assert (T.GEMM_NT_BF16BF16F32 in types) == (algo is Bf16Fp32Algo.DEEP_GEMM)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv(VARIABLE, raising=False)
    return monkeypatch


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_guarded(cli, arguments, program="runner") == 0
    return capsys.readouterr().out


def test_plan_takes_algorithm_from_environment_and_prints_it(
    clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("plan", "--model", "dsv4-tiny", "--pp", "1", "--tp", "1", "--max-tokens", "32")
    unset = printed(capsys, *command)
    assert "gemm_nt_bf16bf16f32" in unset
    clean.setenv(VARIABLE, "deep_gemm")
    assert printed(capsys, *command) == unset
    for name in ("cublas", "torch"):
        clean.setenv(VARIABLE, name)
        narrowed = printed(capsys, *command)
        assert "gemm_nt_bf16bf16f32" not in narrowed
        assert f", bf16 -> fp32 GEMMs by {name}\n" in narrowed


@pytest.mark.parametrize("name", ["launch", "sim", "plan"])
def test_unknown_algorithm_is_a_one_line_error(
    name: str, clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.setenv(VARIABLE, "hpc")
    arguments = ["--model", "dsv4-tiny"]
    code = (
        launch(arguments)
        if name == "launch"
        else run_guarded(cli, [name, *arguments], program="runner")
    )
    assert code == 2
    assert capsys.readouterr().err == (
        f"error: {VARIABLE}='hpc' is not known: use one of cublas, deep_gemm, torch, or leave it "
        "unset\n"
    )
