"""A server's own warm-up code in a separate process, with stubs for the rest of the server.

``server_warmup.py sglang|vllm SITE SIZES``: SITE holds files unpacked from the server's wheel,
SIZES is JSON. Prints which M of which GEMM reached DeepGEMM, what the server announced, and how
many compiles the stand-in nvcc was asked for.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

DENSE = "fp8_gemm_nt"
CONTIGUOUS = "m_grouped_fp8_gemm_nt_contiguous"
MASKED = "fp8_m_grouped_gemm_nt_masked"

CALLS: dict[str, list[int]] = {}
"""From ``entry point:N:K:GROUPS`` to the M of its calls, in order."""
ANNOUNCED: list[int] = []
"""Number of steps of each of the server's progress bars."""


def stub(name: str, **attributes: Any) -> None:
    """Install a stub module with only these attributes."""
    module = module_from_spec(ModuleSpec(name, None))
    vars(module).update(attributes)
    sys.modules[name] = module


def nothing(*_: Any, **__: Any) -> None:
    """Stub for a function whose work is not needed."""


class Bar:
    """Stub for tqdm, as both servers use it: around a list, or with explicit updates."""

    def __init__(self, steps: Iterable[int] = (), total: int | None = None, **_: Any) -> None:
        self.steps = list(steps)
        ANNOUNCED.append(len(self.steps) if total is None else total)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to close."""

    def update(self, steps: int) -> None:
        """Ignore progress."""


def note_calls(library: ModuleType, *names: str) -> None:
    """Make entry points record their calls; must run before they are imported elsewhere."""
    for name in names:
        setattr(library, name, noting(name, getattr(library, name)))


def noting(name: str, entry_point: Callable[..., Any]) -> Callable[..., Any]:
    def call(lhs: Any, rhs: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
        m, *_ = lhs[0].shape
        *groups, n, k = rhs[0].shape
        if name == MASKED:
            m = kwargs["expected_m"] if "expected_m" in kwargs else args[1]
        CALLS.setdefault(f"{name}:{n}:{k}:{groups[0] if groups else 1}", []).append(m)
        return entry_point(lhs, rhs, out, *args, **kwargs)

    return call


def fp8(*shape: int, scale_rows: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantised tensor and its scales, one per block of ``scale_rows`` x 128."""
    *groups, rows, columns = shape
    scales = (*groups, -(-rows // scale_rows), -(-columns // 128))
    values = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
    return values, torch.ones(scales, device="cuda", dtype=torch.float32)


def stub_sglang(chunked_prefill_size: int) -> None:
    """Stub what deep_gemm_wrapper imports of SGLang, except its own folder and environ.py."""
    major, minor = torch.cuda.get_device_capability()
    stub(
        "sglang.srt.utils",
        ceil_align=lambda value, step: -(-value // step) * step,
        ceil_div=lambda value, by: -(-value // by),
        get_available_gpu_memory=lambda **_: torch.cuda.mem_get_info()[0] / (1 << 30),
        get_device_sm=lambda: 10 * major + minor,
        is_cuda=lambda: True,
        is_musa=lambda: False,
    )
    stub(
        "sglang.srt.distributed.device_communicators.pynccl_allocator",
        disable_symmetric_memory_context=nothing,
        restore_symmetric_memory_context=nothing,
    )
    stub("sglang.srt.model_executor.forward_batch_info", ForwardMode=None)
    stub(
        "sglang.srt.runtime_context",
        get_device=lambda: SimpleNamespace(base_gpu_id=0),
        get_disagg=nothing,
        get_parallel=nothing,
        get_platform=lambda: SimpleNamespace(is_sm100=major == 10),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=chunked_prefill_size),
    )


def warm_up_sglang(chunked_prefill_size: int, gemms: list[list[Any]]) -> None:
    """Call each GEMM once with the fewest rows; all other calls are SGLang's pre-compile."""
    stub_sglang(chunked_prefill_size)
    wrapper = import_module("sglang.srt.layers.deep_gemm_wrapper.entrypoint")
    note_calls(import_module("deep_gemm"), DENSE, CONTIGUOUS, MASKED)
    wrapper.update_deep_gemm_config(0)
    for kind, n, k, groups in gemms:
        call_sglang(wrapper, kind, n, k, groups)


def call_sglang(wrapper: Any, kind: str, n: int, k: int, groups: int) -> None:
    def bfloat16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="cuda", dtype=torch.int32)

    if kind == "gemm_nt_f8f8bf16":
        wrapper.gemm_nt_f8f8bf16(fp8(1, k, scale_rows=1), fp8(n, k), bfloat16(1, n))
    elif kind == "grouped_gemm_nt_f8f8bf16_contig":
        lhs, rhs = fp8(128, k, scale_rows=1), fp8(groups, n, k)
        wrapper.grouped_gemm_nt_f8f8bf16_contig(lhs, rhs, bfloat16(128, n), int32(128))
    else:
        lhs, rhs = fp8(groups, 128, k, scale_rows=1), fp8(groups, n, k)
        out = bfloat16(groups, 128, n)
        wrapper.grouped_gemm_nt_f8f8bf16_masked(lhs, rhs, out, int32(groups), 1)


class Linear(torch.nn.Module):
    """A linear layer that vLLM's DeepGEMM kernel offers for the warm-up."""

    def __init__(self, provider: Any, n: int, k: int) -> None:
        super().__init__()
        self.deep_gemm_warmup_provider = provider
        self.weight_block_size = [128, 128]
        self.weights = fp8(n, k)


class LinearKernel:
    """Stub for DeepGemmFp8BlockScaledMMKernel."""

    def get_deep_gemm_warmup_weights(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.weights


class Experts:
    """Stub for DeepGemmExperts."""


class MoE(torch.nn.Module):
    """Stub for MoERunner: routed experts with a quantisation that uses DeepGEMM."""

    def __init__(self, groups: int, hidden: int, intermediate: int, top_k: int) -> None:
        super().__init__()
        w13, w13_scale = fp8(groups, 2 * intermediate, hidden)
        w2, w2_scale = fp8(groups, hidden, intermediate)
        self.routed_experts = SimpleNamespace(
            w13_weight=w13,
            w13_weight_scale_inv=w13_scale,
            w2_weight=w2,
            w2_weight_scale_inv=w2_scale,
            top_k=top_k,
        )
        config = SimpleNamespace(quant_dtype=torch.float8_e4m3fn, block_shape=[128, 128])
        self._quant_method = SimpleNamespace(
            get_fused_moe_quant_config=lambda _: config,
            moe_kernel=SimpleNamespace(impl=SimpleNamespace(fused_experts=Experts())),
        )


class Workspace:
    """Stub for vLLM's workspace manager, which allocates each requested tensor."""

    @staticmethod
    def get_simultaneous(*wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in wanted]


def stub_vllm() -> None:
    """Stub the modules of vLLM that the warm-up and its DeepGEMM helpers import."""
    sys.modules["deep_gemm"] = None  # type: ignore[assignment]  # else it is preferred to vLLM's copy
    major = torch.cuda.get_device_capability()[0]
    platform = SimpleNamespace(
        support_deep_gemm=lambda: major in {9, 10, 12},
        is_arch_support_pdl=lambda: major >= 9,
        is_device_capability_family=lambda family: family == 10 * major,
        simple_compile_backend="eager",
    )
    stub("vllm.platforms", current_platform=platform)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    stub("vllm.utils.platform_utils", num_compute_units=lambda _: sms)
    stub("vllm.utils.import_utils", has_deep_gemm=lambda: True)
    logger = SimpleNamespace(debug_once=nothing, info_once=nothing, warning_once=say)
    stub("vllm.logger", logger=logger)
    stub("vllm.tracing", instrument=lambda **_: lambda function: function)
    stub("vllm.forward_context", ForwardContext=None, override_forward_context=None)
    stub(
        "vllm.distributed.parallel_state",
        get_dp_group=lambda: SimpleNamespace(world_size=1),
        is_global_first_rank=lambda: True,
    )
    stub("vllm.v1.worker.workspace", current_workspace_manager=Workspace)
    stub("vllm.model_executor.layers.quantization.utils.quant_utils", get_fp8_min_max=None)
    stub_layers()


def say(text: str, *values: Any) -> None:
    print(text % values, file=sys.stderr)


def stub_layers() -> None:
    """Stub the layers that the warm-up looks for, and what its rule for expert rows imports."""
    experts = "vllm.model_executor.layers.fused_moe"
    stub(f"{experts}.experts.deep_gemm_moe", DeepGemmExperts=Experts)
    stub(f"{experts}.experts.triton_deep_gemm_moe", TritonOrDeepGemmExperts=Experts)
    stub(f"{experts}.modular_kernel", ExpertTokensMetadata=object)
    import_module(experts).MoERunner = MoE  # type: ignore[attr-defined]
    stub(f"{experts}.utils", count_expert_num_tokens=None)
    language = SimpleNamespace(constexpr=None)
    stub("vllm.triton_utils", tl=language, triton=SimpleNamespace(jit=lambda kernel: kernel))
    linear = "vllm.model_executor.kernels.linear.scaled_mm.deep_gemm"
    stub(linear, DeepGemmFp8BlockScaledMMKernel=LinearKernel)


def warm_up_vllm(max_tokens: int, linears: list[list[int]], experts: list[list[int]]) -> None:
    """vLLM's warm-up of a model of these layers."""
    stub_vllm()
    note_calls(import_module("vllm.third_party.deep_gemm"), DENSE, CONTIGUOUS)
    warmup = import_module("vllm.model_executor.warmup.deep_gemm_warmup")
    kernel = LinearKernel()
    layers = [Linear(kernel, *sizes) for sizes in linears]
    model = torch.nn.ModuleList([*layers, *(MoE(*sizes) for sizes in experts)])
    warmup.deep_gemm_warmup(model, max_tokens)


def compiles() -> int:
    """Number of compiles requested from the stand-in nvcc."""
    record = Path(os.environ["DEEPGEMM_STANDIN_COMPILES"])
    return len(record.read_bytes().splitlines()) if record.exists() else 0


def main() -> None:
    server, site, sizes = sys.argv[1:]
    sys.path.insert(0, site)
    stub("tqdm", tqdm=Bar)
    with contextlib.redirect_stdout(sys.stderr):
        {"sglang": warm_up_sglang, "vllm": warm_up_vllm}[server](**json.loads(sizes))
    torch.cuda.synchronize()
    print(json.dumps({"compiles": compiles(), "announced": ANNOUNCED, "calls": CALLS}))


if __name__ == "__main__":
    main()
