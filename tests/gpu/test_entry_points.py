"""Every wrapped kernel on a real GPU: its results, and the cache entries it creates."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from runner.config.environ import Environ
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4
from runner.driver.run import record
from runner.kernels.installed import find_library
from runner.kernels.keys import CacheKeys
from runner.kernels.nvcc import find_nvcc, keys_for, nvcc_version
from runner.kernels.source import choose_source
from runner.kernels.table import Demand, KernelTable
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape, KernelCall
from runner.scenario import Scenario
from tests.gpu.library import real_wrapper

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_BF16_ERROR = 5e-3


def _calls() -> list[KernelCall]:
    """Every distinct kernel call of dsv4 at four TP degrees and of dsv3 at two."""
    found: dict[KernelCall, None] = {}
    for model, degrees in ((with_layers(DSV4, 4), (1, 2, 4, 8)), (with_layers(DSV3, 4), (2, 8))):
        for tp in degrees:
            scenario = Scenario(model=model, parallel=ParallelConfig(tp=tp), batch_sizes=(1, 129))
            for op in record(scenario).ranks[0]:
                if isinstance(op, KernelCall):
                    found[op] = None
    found[KernelCall(T.FP8_MQA_LOGITS, 256, 64, 128, 1, 132)] = None
    for m in (1, 200):
        found[KernelCall(T.GEMM_NT_BF16BF16BF16, m, 2048, 4096, 1, 132)] = None
        found[KernelCall(T.GROUPED_GEMM_NT_BF16_MASKED, m, 1024, 2048, 8, 132)] = None
    for m in (128, 2048):
        found[KernelCall(T.GROUPED_GEMM_NT_BF16_CONTIG, m, 1024, 2048, 8, 132)] = None
    return list(found)


@cache
def _answers_of_the_library() -> tuple[KernelTable, CacheKeys]:
    """The library's kernels for all these calls on a stand-in GPU, and this machine's keys."""
    from launch.rank import gpu_of

    library, nvcc = find_library(), find_nvcc(Environ.read(os.environ))
    assert nvcc is not None and library is not None
    source = choose_source(
        gpu_of(torch.device("cuda")),
        library,
        Environ.read(os.environ),
        version_text=nvcc_version(nvcc),
        always_ask=True,
    )
    demands = [
        Demand(GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms), (call.m,))
        for call in _calls()
    ]
    table = source.table(lambda: demands)
    return table, keys_for(library, table.recipe, nvcc_version(nvcc), library.root)


@pytest.mark.parametrize("call", _calls(), ids=lambda call: call.describe().replace(" ", "-"))
def test_kernel_agrees_with_float64_and_creates_the_predicted_entries(call: KernelCall) -> None:
    torch.manual_seed(call.m * 7 + call.n + call.k)
    error = _EXERCISES[call.type](real_wrapper(), call)
    print(f"{call.describe()}: relative error {error:.2e}")
    assert error < MAX_BF16_ERROR
    cached = Path(Environ.read(os.environ).jit_cache_dirs.partition(":")[0]) / "cache"
    table, keys = _answers_of_the_library()
    for kernel in table.kernels_of(call):
        entry = Path(cached) / keys.cache_key(kernel)
        assert entry.is_dir(), f"the library made no {entry.name}"
        assert (entry / "kernel.cu").read_text() == keys.source(kernel)


def _random(*shape: int):  # type: ignore[no-untyped-def]
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _random_experts(call: KernelCall):  # type: ignore[no-untyped-def]
    """Made group by group, to save memory: all fp32 values at once are too large."""
    from runner.backend.tensor import Fp8Weight
    from runner.deep_gemm_wrapper.quantise import quantise_blocks

    parts = [quantise_blocks(_random(call.n, call.k)) for _ in range(call.num_groups)]
    return Fp8Weight(*map(torch.stack, zip(*parts, strict=True)))


def _error(out, expected) -> float:  # type: ignore[no-untyped-def]
    difference = out.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def _dense(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper import quantise as q

    lhs = q.quantise_tokens(_random(call.m, call.k))
    weight = q.quantise_blocks(_random(call.n, call.k))
    out = torch.empty((call.m, call.n), device="cuda", dtype=torch.bfloat16)
    wrapper.gemm_nt_f8f8bf16(lhs, weight, out)
    expected = q.dequantise_tokens(*lhs).double() @ q.dequantise_blocks(*weight).double().mT
    return _error(out, expected)


def _contiguous(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper import quantise as q

    lhs = q.quantise_tokens(_random(call.m, call.k))
    weight = _random_experts(call)
    blocks = call.m // 128
    groups = (torch.arange(blocks, device="cuda") * 7) % call.num_groups
    indices = groups.repeat_interleave(128).to(torch.int32)
    out = torch.empty((call.m, call.n), device="cuda", dtype=torch.bfloat16)
    wrapper.grouped_gemm_nt_f8f8bf16_contig(lhs, weight.pair, out, indices)
    worst = 0.0
    for block in range(0, blocks, max(1, blocks // 8)):
        rows = slice(block * 128, block * 128 + 128)
        x = q.dequantise_tokens(lhs[0][rows], lhs[1][rows]).double()
        group = int(groups[block])
        w = q.dequantise_blocks(weight.data[group], weight.scales[group]).double()
        worst = max(worst, _error(out[rows], x @ w.mT))
    return worst


def _masked(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper import quantise as q

    groups, rows = call.num_groups, 256
    lhs = q.quantise_tokens(_random(groups, rows, call.k))
    weight = _random_experts(call)
    masked_m = torch.randint(0, rows, (groups,), device="cuda", dtype=torch.int32)
    masked_m[0] = rows
    out = torch.empty((groups, rows, call.n), device="cuda", dtype=torch.bfloat16)
    wrapper.grouped_gemm_nt_f8f8bf16_masked(lhs, weight.pair, out, masked_m, call.m)
    worst = 0.0
    for group in range(0, groups, max(1, groups // 8)):
        used = int(masked_m[group])
        if used == 0:
            continue
        x = q.dequantise_tokens(lhs[0][group, :used], lhs[1][group, :used]).double()
        w = q.dequantise_blocks(weight.data[group], weight.scales[group]).double()
        worst = max(worst, _error(out[group, :used], x @ w.mT))
    return worst


def _bf16(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    lhs, rhs = _random(call.m, call.k), _random(call.n, call.k)
    wide = call.type is T.GEMM_NT_BF16BF16F32
    dtype = torch.float32 if wide else torch.bfloat16
    out = torch.empty((call.m, call.n), device="cuda", dtype=dtype)
    wrapper.library.bf16_gemm_nt(lhs, rhs, out)
    return _error(out, lhs.double() @ rhs.double().mT)


def _contiguous_bf16(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    lhs, rhs = _random(call.m, call.k), _random(call.num_groups, call.n, call.k)
    groups = (torch.arange(call.m // 128, device="cuda") * 7) % call.num_groups
    indices = groups.repeat_interleave(128).to(torch.int32)
    out = torch.empty((call.m, call.n), device="cuda", dtype=torch.bfloat16)
    wrapper.library.m_grouped_bf16_gemm_nt_contiguous(lhs, rhs, out, indices)
    blocks = lhs.double().view(-1, 128, call.k)
    return _error(out, (blocks @ rhs.double()[groups].mT).view(call.m, call.n))


def _masked_bf16(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    rows = 256
    lhs = _random(call.num_groups, rows, call.k)
    rhs = _random(call.num_groups, call.n, call.k)
    used = torch.randint(1, rows + 1, (call.num_groups,), device="cuda", dtype=torch.int32)
    out = torch.zeros((call.num_groups, rows, call.n), device="cuda", dtype=torch.bfloat16)
    wrapper.library.m_grouped_bf16_gemm_nt_masked(lhs, rhs, out, used, call.m)
    valid = torch.arange(rows, device="cuda") < used.unsqueeze(1)
    return _error(out[valid], (lhs.double() @ rhs.double().mT)[valid])


def _hc(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    x = _random(call.m, call.k)
    fn = torch.randn((call.n, call.k), device="cuda") * 0.02
    splits = call.num_groups
    out = torch.empty((splits, call.m, call.n), device="cuda")
    squares = torch.empty((splits, call.m), device="cuda")
    wrapper.tf32_hc_prenorm_gemm(x, fn, out, squares, splits)
    norm = _error(squares.sum(0), x.double().square().sum(-1))
    return max(norm, _error(out.sum(0), x.double() @ fn.double().mT))


def _einsum(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper import quantise as q

    lhs = q.quantise_tokens(_random(call.m, call.num_groups, call.k))
    values, scales = q.quantise_blocks(_random(call.num_groups, call.n, call.k))
    scales = scales.reshape(call.num_groups, call.n // 128, call.k // 128)
    out = torch.empty((call.m, call.num_groups, call.n), device="cuda", dtype=torch.bfloat16)
    data = values.reshape(call.num_groups, call.n, call.k)
    wrapper.fp8_einsum_bhr_hdr_bhd(lhs, (data, scales), out)
    x, w = q.dequantise_tokens(*lhs).double(), q.dequantise_blocks(data, scales).double()
    return _error(out, torch.einsum("bhr,hdr->bhd", x, w))


def _index_inputs(call: KernelCall):  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper import quantise as q

    values, _ = q.quantise_tokens(_random(call.m, call.n, call.k))
    weights = torch.randn((call.m, call.n), device="cuda")
    entries = 256
    k_values, k_scales = q.quantise_tokens(_random(entries, call.k))
    return values, weights, k_values, k_scales.squeeze(-1).contiguous(), entries


def _scores(values, weights, k_values, k_scales):  # type: ignore[no-untyped-def]
    keys = k_values.double() * k_scales.double().unsqueeze(-1)
    dots = torch.einsum("rhd,ed->rhe", values.double(), keys).relu()
    return torch.einsum("rh,rhe->re", weights.double(), dots)


def _metadata(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    lens = torch.ones((call.m, 1), device="cuda", dtype=torch.int32)
    made = wrapper.get_paged_mqa_logits_metadata(lens, 64, 132)
    assert made.shape == (133, 2)
    return 0.0


def _paged(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    from runner.deep_gemm_wrapper.quantise import PAGE, pack_pages

    values, weights, k_values, k_scales, entries = _index_inputs(call)
    lens = torch.randint(1, entries + 1, (call.m, 1), device="cuda", dtype=torch.int32)
    table = torch.arange(entries // PAGE, device="cuda", dtype=torch.int32).repeat(call.m, 1)
    pages = pack_pages(k_values, k_scales)
    metadata = wrapper.get_paged_mqa_logits_metadata(lens, PAGE, 132)
    out = wrapper.fp8_paged_mqa_logits(
        values.unsqueeze(1), pages, weights, lens, table.contiguous(), metadata, entries
    )
    valid = torch.arange(entries, device="cuda") < lens
    expected = _scores(values, weights, k_values, k_scales)
    return _error(out[:, :entries][valid], expected[valid])


def _unpaged(wrapper, call: KernelCall) -> float:  # type: ignore[no-untyped-def]
    values, weights, k_values, k_scales, entries = _index_inputs(call)
    zeros = torch.zeros(call.m, device="cuda", dtype=torch.int32)
    lens = torch.randint(1, entries + 1, (call.m,), device="cuda", dtype=torch.int32)
    out = wrapper.fp8_mqa_logits(values, (k_values, k_scales), weights, zeros, lens, entries)
    valid = torch.arange(entries, device="cuda") < lens.unsqueeze(1)
    expected = _scores(values, weights, k_values, k_scales)
    return _error(out[:, :entries][valid], expected[valid])


_EXERCISES = {
    T.GEMM_NT_F8F8BF16: _dense,
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: _contiguous,
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: _masked,
    T.GEMM_NT_BF16BF16F32: _bf16,
    T.GEMM_NT_BF16BF16BF16: _bf16,
    T.GROUPED_GEMM_NT_BF16_CONTIG: _contiguous_bf16,
    T.GROUPED_GEMM_NT_BF16_MASKED: _masked_bf16,
    T.TF32_HC_PRENORM_GEMM: _hc,
    T.FP8_EINSUM_BHR_HDR_BHD: _einsum,
    T.PAGED_MQA_LOGITS_METADATA: _metadata,
    T.FP8_PAGED_MQA_LOGITS: _paged,
    T.FP8_MQA_LOGITS: _unpaged,
}
