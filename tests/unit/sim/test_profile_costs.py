"""The cost model of a profile, with figures that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runner.build.estimates import makespan
from runner.build.units import split_into_units
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape, KernelCall
from runner.schedule import Capture, Collective, Compute
from sim.costs.profile import Builder, Cache, Gpu, Host, Link, Profile
from sim.costs.profile_costs import ProfileCosts, Seconds, compile_seconds, gemm_work, slowdown
from tests.unit.tiny_runs import h200

GEMM = KernelCall(T.GEMM_NT_F8F8BF16, 100, 1000, 500, 1, 132)


def profile(**changes: Any) -> Profile:
    """1 s per call, 0.125 s per call in a walk, 4 s per walk, 16 s per first forward; 1 GB/s, 1 and
    0.1 Tflop/s for FP8 and BF16."""
    return replace(
        h200(),
        builder=Builder(1.0, 2.0),
        cache=Cache(0.25, 0.5, 0.75),
        host=Host(call=1.0, shared_call=2.0, first_forward=16.0, walk=4.0, walk_call=0.125),
        gpu=Gpu(1e12, kernel=0.0, memory_bandwidth=1e9, fp8_flops=1e12, bf16_flops=1e11),
        start_up=replace(h200().start_up, capture=3.0, capture_operation=0.5),
        **changes,
    )


def costs(ranks_per_gpu: int = 1, link: Link | None = None, **changes: Any) -> ProfileCosts:
    return ProfileCosts(profile(**changes), link or Link(1.0, 100.0), 4, ranks_per_gpu)


def test_compile_time_and_slowdown_come_from_the_profile() -> None:
    kernel = kernels_of(GEMM)[1]
    assert costs().compile_seconds(kernel) == compile_seconds(h200().compile, kernel)
    times = replace(h200().compile, contention=0.5)
    crowded = costs(compile=times)
    assert [crowded.slowdown(n) for n in (1, 4, 8)] == [slowdown(times, n, 4) for n in (1, 4, 8)]
    assert crowded.slowdown(8) == 3.0


def test_first_forward_and_call_times_come_from_the_profile() -> None:
    assert costs().first_forward == costs(ranks_per_gpu=2).first_forward == 16.0
    assert (costs().host_call, costs(ranks_per_gpu=2).host_call) == (1.0, 2.0)


def test_verify_and_load_times_come_from_the_profile() -> None:
    assert costs().verify_seconds() == 0.25
    assert costs().load_seconds(bulk=True) == 0.5
    assert costs().load_seconds(bulk=False) == 0.75


def test_compute_time_is_a_roofline_times_ranks_per_gpu() -> None:
    assert costs().compute_seconds(Compute("x", int(4e11), 0)) == Seconds(1.0, 4.0)
    assert costs().compute_seconds(Compute("x", 0, int(2e9))) == Seconds(1.0, 2.0)
    assert costs().compute_seconds(Compute("x", int(4e11), int(2e9))) == Seconds(1.0, 4.0)
    crowded = costs(ranks_per_gpu=8)
    assert crowded.compute_seconds(Compute("x", 0, int(2e9))) == Seconds(2.0, 16.0)


def test_kernel_call_time_is_host_call_and_gpu_roofline() -> None:
    # 1e8 operations are 1e-4 s of FP8; 1.45e6 bytes take 1.45e-3 s.
    flops, nbytes = gemm_work(GEMM)
    assert (flops, nbytes) == (1e8, 50e3 + 500e3 + 400e3)
    assert costs().kernel_seconds(GEMM) == Seconds(1.0, pytest.approx(nbytes / 1e9))
    assert costs(ranks_per_gpu=4).kernel_seconds(GEMM).device == pytest.approx(4 * nbytes / 1e9)
    large = replace(GEMM, m=100_000)
    assert costs().kernel_seconds(large).device == pytest.approx(
        max(2e5 * 1000 * 500 / 1e12, gemm_work(large)[1] / 1e9)
    )


def test_fp8_and_bf16_gemms_have_different_rates() -> None:
    gpu = replace(profile().gpu, memory_bandwidth=1e30)
    fast = costs()
    fast = replace(fast, profile=replace(fast.profile, gpu=gpu))
    assert fast.kernel_seconds(GEMM).device == pytest.approx(1e-4)
    bf16 = replace(GEMM, type=T.GEMM_NT_BF16BF16F32)
    assert fast.kernel_seconds(bf16).device == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("kind", "m", "groups", "flops", "nbytes"),
    [
        (T.GEMM_NT_F8F8BF16, 256, 1, 2 * 256, 256 * 4 + 3 * 4 + 4 * 256 * 3),
        (T.GEMM_NT_BF16BF16F32, 256, 1, 2 * 256, 2 * (256 * 4 + 3 * 4) + 4 * 256 * 3),
        # Two blocks of 128 rows read the weights of two experts, not of all eight.
        (T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 256, 8, 2 * 256, 256 * 4 + 2 * 3 * 4 + 2 * 256 * 3),
        (T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 4096, 8, 2 * 4096, 4096 * 4 + 8 * 3 * 4 + 2 * 4096 * 3),
        (T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 16, 8, 8 * 2 * 16, 8 * (16 * 4 + 3 * 4 + 2 * 16 * 3)),
        (T.FP8_EINSUM_BHR_HDR_BHD, 16, 8, 8 * 2 * 16, 8 * (16 * 4 + 3 * 4 + 2 * 16 * 3)),
        (T.TF32_HC_PRENORM_GEMM, 16, 0, 2 * 16, 2 * 16 * 4 + 4 * 3 * 4 + 4 * 16 * 3),
        (T.TF32_HC_PRENORM_GEMM, 16, 5, 2 * 16, 2 * 16 * 4 + 4 * 3 * 4 + 4 * 5 * 16 * 3),
    ],
)
def test_gemm_work_counts_operations_and_bytes(
    kind: T, m: int, groups: int, flops: int, nbytes: int
) -> None:
    """N is 3 and K is 4; ``flops`` leaves out that factor of 12."""
    assert gemm_work(KernelCall(kind, m, 3, 4, groups, 132)) == (12 * flops, nbytes)


# -- walks and graphs -----------------------------------------------------------------------------


def test_walk_time_and_the_time_of_its_calls() -> None:
    assert costs().walk_seconds() == 4.0
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 1000, 500, 1, 132)
    made = costs().walk_call_seconds(shape, 99.6, 16384)
    assert made == Seconds(0.125, costs().kernel_seconds(GEMM).device)


def test_masked_gemm_in_a_walk_has_no_rows_but_transposes_all_scales() -> None:
    shape = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 1000, 512, 8, 132)
    # 8 groups of 1000 rows of 512 / 128 scales, 4 bytes each read and written.
    made = costs().walk_call_seconds(shape, 7.0, 1000)
    assert made == Seconds(0.125, 8 * 8 * 1000 * 4 / 1e9)


def test_capture_time_grows_with_the_number_of_operations() -> None:
    assert costs().capture_seconds(Capture("graph DECODE 1", 6)) == 6.0


# -- links ----------------------------------------------------------------------------------------


def test_collective_time_is_that_of_a_ring() -> None:
    four = (0, 1, 2, 3)
    assert costs().collective_seconds(Collective("all_reduce x", four, 100)) == 2.5
    assert costs().collective_seconds(Collective("all_gather x", four, 100)) == 4.0
    assert costs().collective_seconds(Collective("all_reduce x", (0,), 100)) == 1.0
    assert costs().transfer_seconds(300) == 4.0


def test_gather_bandwidth_applies_to_gathers_only() -> None:
    slow = costs(link=Link(1.0, 100.0, gather_bandwidth=10.0))
    four = (0, 1, 2, 3)
    assert slow.collective_seconds(Collective("all_reduce x", four, 100)) == 2.5
    assert slow.collective_seconds(Collective("all_gather x", four, 100)) == 31.0
    assert slow.transfer_seconds(300) == 4.0


def test_ranks_sharing_a_gpu_wait_for_a_time_slice_at_each_nccl_step() -> None:
    """A ring of four has three steps, six for all_reduce; two other ranks share each GPU."""
    nccl = Link(1.0, 100.0, queues=True)
    shared = costs(link=nccl, ranks_per_gpu=3)
    profile = replace(shared.profile, gpu=replace(shared.profile.gpu, time_slice=0.5))
    shared, four = replace(shared, profile=profile), (0, 1, 2, 3)
    for kind, steps in (
        ("all_reduce", 6),
        ("all_gather", 3),
        ("reduce_scatter", 3),
        ("all_to_all", 1),
    ):
        op = Collective(f"{kind} x", four, 100)
        alone = replace(shared, ranks_per_gpu=1).collective_seconds(op)
        assert shared.collective_seconds(op) == alone + steps * 2 * 0.5
    assert shared.transfer_seconds(100) == 2.0 + 2 * 0.5
    # gloo runs on the hosts, so there are no GPU time slices.
    over_gloo = replace(shared, link=Link(1.0, 100.0))
    assert over_gloo.transfer_seconds(100) == 2.0


# -- builds ---------------------------------------------------------------------------------------


def test_build_spans_follow_the_builders_expected_schedule() -> None:
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
    kernels = list(RULES.kernel_ranges(shape, range(1, 2049)))
    spans = costs().build_spans(kernels, 4)
    units = split_into_units(kernels, 4)
    assert sorted(k.identity for k, _, _ in spans if k) == sorted(k.identity for k in kernels)
    assert sum(kernel is None for kernel, _, _ in spans) == len(units)
    assert min(start for _, start, _ in spans) == 1.0
    assert max(end for _, _, end in spans) == pytest.approx(1.0 + 2.0 * makespan(units, 4))
    assert costs().build_spans([], 4) == []
