"""Compile units: grouping kernels, estimated cost, source text, and matching entries to kernels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.build import estimates
from runner.build.estimates import expected_schedule, makespan, seconds_to_end, unit_seconds
from runner.build.partition import share_out
from runner.build.stages import UnusualError
from runner.build.units import (
    entry_signature,
    match_entries,
    signature,
    split_into_units,
    unit_text,
)
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of, transpose_fp32
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import make_plan
from tests.unit.builder_jobs import gemm


@cache
def planned_kernels() -> tuple[Kernel, ...]:
    """About 60 kernels of seven headers; some share a signature."""
    specs = [
        "gemm_nt_f8f8bf16:4096:1024",
        "gemm_nt_bf16bf16f32:256:4096",
        "gemm_nt_bf16bf16bf16:256:4096",
        "tf32_hc_prenorm_gemm:24:16384",
        "paged_mqa_logits_metadata:1:1",
        "fp8_mqa_logits:64:128",
        "fp8_paged_mqa_logits:64:128",
        "grouped_gemm_nt_f8f8bf16_masked:1024:4096:8",
    ]
    demands = [demand for spec in specs for demand in gemm_demands(spec, max_m=512, num_sms=132)]
    kernels = [item.kernel for item in make_plan(demands, RULES).kernels]
    return (
        *kernels,
        *(same_signature_as(item) for item in kernels if item.name == "sm90_bf16_gemm"),
    )


def kernel_lists(**sizes: int) -> st.SearchStrategy[list[Kernel]]:
    return st.deferred(lambda: st.lists(st.sampled_from(planned_kernels()), unique=True, **sizes))


def fp8_of_tile(m: int, n: int, k: int = 128) -> Kernel:
    (found,) = kernels_of(KernelCall(T.GEMM_NT_F8F8BF16, 64, 4096, 1024, 1, 132))[1:]
    return replace(found, arguments=(*found.arguments[:3], f"{m}, {n}, {k}", *found.arguments[4:]))


def test_estimated_cost_grows_with_tile_size() -> None:
    ascending = [
        fp8_of_tile(64, 16),
        fp8_of_tile(64, 64),
        fp8_of_tile(64, 128),
        fp8_of_tile(256, 128),
    ]
    for cost in (
        estimates.front_end_seconds,
        estimates.expected_assemble_seconds,
        estimates.plain_seconds,
    ):
        seconds = [cost(kernel) for kernel in ascending]
        assert seconds == sorted(set(seconds))


def test_estimated_cost_grows_if_tile_duplicates_the_main_loop() -> None:
    once, copied = fp8_of_tile(128, 128), fp8_of_tile(128, 96)
    assert estimates.front_end_seconds(copied) > estimates.front_end_seconds(once)


def masked_of(k: int, kind: T = T.GROUPED_GEMM_NT_F8F8BF16_MASKED) -> Kernel:
    return kernels_of(KernelCall(kind, 64, 2048, k, 256, 132))[-1]


def test_main_loop_is_unrolled_at_most_eight_k_blocks() -> None:
    blocks = [estimates.unrolled_k_blocks(masked_of(128 * many)) for many in range(1, 12)]
    assert blocks == [*range(1, 9), 8, 8, 8]
    # A K-block of bf16 is 64 long.
    bf16 = [masked_of(k, T.GROUPED_GEMM_NT_BF16_MASKED) for k in (64, 256, 448, 512, 1024)]
    assert list(map(estimates.unrolled_k_blocks, bf16)) == [1, 4, 7, 8, 8]
    dense = [
        kernels_of(KernelCall(kind, 64, 1536, 512, 1, 132))[-1]
        for kind in (T.GEMM_NT_F8F8BF16, T.GEMM_NT_BF16BF16F32)
    ]
    assert list(map(estimates.unrolled_k_blocks, dense)) == [8, 8]


def test_compile_time_constant_short_k_lowers_estimated_cost() -> None:
    short, whole, longer = map(masked_of, (512, 1024, 4096))
    assert (
        estimates.plain_seconds(short)
        < estimates.plain_seconds(whole)
        == estimates.plain_seconds(longer)
    )
    # A tile of 64 x 128: 0.05 megabytes, and 0.1088 more for eight K-blocks.
    for kernel, megabytes in ((short, 0.05 + 0.0544), (whole, 0.05 + 0.1088)):
        assert estimates.front_end_seconds(kernel) == pytest.approx(2.35 * megabytes)
        assembled = estimates.assemble_seconds(1e6 * megabytes)
        assert estimates.expected_assemble_seconds(kernel) == pytest.approx(assembled)


def test_plain_compile_estimate_is_unit_plus_assemble_plus_nvcc_start() -> None:
    for kernel in planned_kernels():
        alone = unit_seconds([kernel]) + estimates.expected_assemble_seconds(kernel)
        assert estimates.plain_seconds(kernel) == pytest.approx(alone + estimates.NVCC_SECONDS)


@given(few=st.floats(0, 1e7), more=st.floats(0, 1e7))
def test_assemble_estimate_does_not_decrease_with_ptx_size(few: float, more: float) -> None:
    few, more = sorted((few, more))
    assert 0 < estimates.assemble_seconds(few) <= estimates.assemble_seconds(more)


@settings(max_examples=60, deadline=None)
@given(kernels=kernel_lists(), workers=st.integers(1, 9))
def test_each_kernel_is_in_exactly_one_unit_of_its_header(
    kernels: list[Kernel], workers: int
) -> None:
    units = split_into_units(kernels, workers)
    assert Counter(kernel for unit in units for kernel in unit) == Counter(kernels)
    for unit in units:
        assert len({kernel.header for kernel in unit}) == 1
        assert len(set(map(signature, unit))) == len(unit)


@settings(max_examples=60, deadline=None)
@given(kernels=kernel_lists(min_size=1), workers=st.integers(1, 9))
def test_expected_schedule_respects_workers_dependencies_and_bounds(
    kernels: list[Kernel], workers: int
) -> None:
    units = split_into_units(kernels, workers)
    steps = expected_schedule(units, workers)
    assert Counter(step.kernel for step in steps) == Counter([*kernels, *[None] * len(units)])
    for step in steps:
        assert sum(other.start <= step.start < other.end for other in steps) <= workers
    front_end = {kernel: unit_seconds(unit) for unit in units for kernel in unit}
    for step in steps:
        if step.kernel is not None:
            assert step.start >= front_end[step.kernel]
            own = estimates.expected_assemble_seconds(step.kernel)
            assert step.end - step.start == pytest.approx(own)
    total = sum(map(unit_seconds, units)) + sum(map(estimates.expected_assemble_seconds, kernels))
    chain, end = max(map(seconds_to_end, units)), makespan(units, workers)
    assert end == max(step.end for step in steps)
    assert max(total / workers, chain) - 1e-9 <= end <= total / workers + chain + 1e-9


def same_signature_as(kernel: Kernel) -> Kernel:
    return replace(kernel, arguments=(*kernel.arguments[:-1], "other_t"))


def test_kernels_with_equal_signatures_are_in_different_units() -> None:
    big, small = fp8_of_tile(256, 128), fp8_of_tile(64, 16)
    units = split_into_units([big, small, same_signature_as(small)], 1)
    assert units == [[big, same_signature_as(small)], [small]]


def test_expected_schedule_starts_with_the_longest_chain() -> None:
    short, long = [transpose_fp32(1024)], [fp8_of_tile(256, 128)]
    steps = expected_schedule([short, long], 1)
    assert [step.kernel for step in steps] == [None, long[0], None, short[0]]
    assert steps[0].end == unit_seconds(long)


def test_no_kernels_give_no_units_and_zero_makespan() -> None:
    assert split_into_units([], 2) == []
    assert makespan([], 2) == 0


def test_more_workers_give_more_units_and_shorter_makespan() -> None:
    one, many = (split_into_units(planned_kernels(), workers) for workers in (1, 16))
    assert len(one) < len(many)
    assert makespan(many, 16) < makespan(one, 16)


def test_share_out_assigns_the_most_expensive_kernel_first() -> None:
    small, other, big = transpose_fp32(1024), transpose_fp32(2048), fp8_of_tile(256, 128)
    assert share_out([small, other, big], 2) == [(big,), (small, other)]
    assert share_out([small], 3) == [(small,), (), ()]


@given(kernels=kernel_lists(), nodes=st.integers(1, 9))
def test_share_out_is_balanced_to_within_one_kernel(kernels: list[Kernel], nodes: int) -> None:
    def cost(kernel: Kernel) -> float:
        return estimates.front_end_seconds(kernel) + estimates.expected_assemble_seconds(kernel)

    shares = share_out(kernels, nodes)
    assert len(shares) == nodes
    assert Counter(kernel for share in shares for kernel in share) == Counter(kernels)
    assert share_out(list(kernels), nodes) == shares
    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(cost, kernels), default=0) + 1e-9


# Source text, and entries matched to kernels


def test_unit_text_numbers_its_instantiations() -> None:
    first, second = gemm("1, 2", "true"), gemm("3, 4", "float", entry="sched::other")
    assert unit_text([first, second]) == (
        "\n\nusing namespace deep_gemm;\n\n"
        "static void __instantiate_kernel_0() {\n"
        "    auto ptr = reinterpret_cast<void*>(&gemm_impl<\n"
        "        1, 2,\n        true\n    >);\n};\n\n"
        "\n\nusing namespace deep_gemm;\n\n"
        "static void __instantiate_kernel_1() {\n"
        "    auto ptr = reinterpret_cast<void*>(&sched::other<\n"
        "        3, 4,\n        float\n    >);\n};\n\n"
    )


@pytest.mark.parametrize(
    "prelude", ["#define A\n", "#pragma once\n", "static void __instantiate_kernel() {}\n"]
)
def test_unit_text_refuses_source_with_a_prelude(prelude: str) -> None:
    kernel = replace(gemm("1"), prelude=prelude)
    with pytest.raises(UnusualError, match=r"^not a source of one include and one instantiation$"):
        unit_text([kernel])


def test_signature_holds_function_name_and_integer_literals() -> None:
    kernel = gemm("cute::UMMA::Major::K", "0, 64", "true,false", "GemmType::Normal", "128")
    assert signature(kernel) == ("gemm_impl", (0, 64, 1, 0, 128))
    assert signature(gemm("float", entry="sched::inner::metadata")) == ("metadata", ())
    assert signature(transpose_fp32(1024)) == ("transpose_fp32", (512, 64, 8))


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (
            "_ZN9deep_gemm14transpose_fp32ILj512ELj64ELj8ELj9EEEvPKfPfj",
            ("transpose_fp32", (512, 64, 8, 9)),
        ),
        (
            "_ZN9deep_gemm5sched30sm90_paged_mqa_logits_metadataILj32ELj256ELj132ELb0EEEvjPKjPj",
            ("sm90_paged_mqa_logits_metadata", (32, 256, 132, 0)),
        ),
        (
            "_ZN9deep_gemm9gemm_implILN4cute4UMMA5MajorE0ELj16ELb1ELNS_8GemmTypeE3EN7cutlass"
            "10bfloat16_tEEEvPv",
            ("gemm_impl", (16, 1)),
        ),
        ("_Z5k12x3ILi7EEvv", ("k12x3", (7,))),
        ("_Z4pairIfdEvv", ("pair", ())),
    ],
)
def test_entry_signature_parses_mangled_names(
    mangled: str, expected: tuple[str, tuple[int, ...]]
) -> None:
    assert entry_signature(mangled) == expected


@pytest.mark.parametrize("mangled", ["main", "_Z4initv", "_ZN9deep_gemm4initEv", "_Z", ""])
def test_entry_signature_refuses_non_template_names(mangled: str) -> None:
    with pytest.raises(UnusualError) as caught:
        entry_signature(mangled)
    assert str(caught.value) == f"entry {mangled} is not an instance of a template"


def mangle(names: Sequence[str], literals: Sequence[int]) -> str:
    inner = "".join(f"{len(name)}{name}" for name in names)
    arguments = "I" + "".join(f"Lj{literal}E" for literal in literals) + "E"
    return f"_ZN{inner}{arguments}Evv" if len(names) > 1 else f"_Z{inner}{arguments}vv"


@given(
    names=st.lists(
        st.from_regex(r"[A-Za-z_]\w{0,12}", fullmatch=True).filter(str.isascii),
        min_size=1,
        max_size=4,
    ),
    literals=st.lists(st.integers(0, 2**32 - 1), max_size=6),
)
def test_entry_signature_inverts_mangling(names: list[str], literals: list[int]) -> None:
    assert entry_signature(mangle(names, literals)) == (names[-1], tuple(literals))


def test_match_entries_ignores_default_template_arguments() -> None:
    kernels = [gemm("1, 2"), gemm("1, 3"), gemm("1, 2", entry="other")]
    entries = [
        mangle(["dg", "other"], [1, 2]),
        mangle(["dg", "gemm_impl"], [1, 3, 0, 7]),
        mangle(["dg", "gemm_impl"], [1, 2, 3]),
    ]
    assert match_entries(kernels, entries) == dict(zip(entries, kernels[::-1], strict=True))


@pytest.mark.parametrize(
    ("wanted", "entries", "message"),
    [
        (["1, 2"], [[1, 2, 3], [1, 2, 4]], "cannot be told apart"),
        (["1, 2", "1, 2, float"], [[1, 2]], "cannot be told apart"),
        (["1", "1, 2"], [[1], [1, 2]], "cannot be told apart"),
        (["1, 2"], [[1, 3]], "cannot be told apart"),
        (["1, 2"], [], "cannot be told apart"),
        (["1, 2"], [[1, 2], [7]], "has entries of other kernels"),
    ],
)
def test_match_entries_refuses_ambiguous_missing_or_extra_entries(
    wanted: list[str], entries: list[list[int]], message: str
) -> None:
    kernels = [gemm(arguments) for arguments in wanted]
    with pytest.raises(UnusualError, match=message):
        match_entries(kernels, [mangle(["dg", "gemm_impl"], literals) for literals in entries])
