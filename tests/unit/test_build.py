"""The builder: its pool, units, PTX, cut, stages, and all of it with a toolchain of scripts."""

import fcntl
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Barrier, Event
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.environ import Environ
from runner.gemm_spec import gemm_demands
from runner.jit.builder import costs
from runner.jit.builder.build import Builder, Built, Way
from runner.jit.builder.cut import (
    cut_units,
    expected_schedule,
    makespan,
    to_end_seconds,
    unit_seconds,
)
from runner.jit.builder.pool import Pool
from runner.jit.builder.ptx import split_ptx
from runner.jit.builder.scratch import scratch_folder
from runner.jit.builder.stages import StageError, Stages, UnusualError, ask_stages
from runner.jit.builder.unit import Job, entry_signature, match_entries, signature, unit_text
from runner.jit.compiler import NvccCompiler
from runner.jit.cubin import kernels_in
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel, kernels_of, transpose_fp32
from runner.jit.keys import CacheKeys
from runner.jit.library import Library
from runner.jit.plan import make_plan
from runner.sharing import share_out

REPOSITORY = Path(__file__).parents[2]


def nothing() -> None:
    pass


# The pool.


def run_order(priorities: Sequence[float]) -> list[int]:
    pool, order = Pool(1), []
    for number, to_end in enumerate(priorities):
        pool.add(to_end, lambda number=number: order.append(number), own=1)
    pool.drain()
    return order


@given(st.lists(st.integers(0, 5), max_size=20))
def test_the_longest_way_to_the_end_goes_first(priorities: list[int]) -> None:
    expected = sorted(range(len(priorities)), key=lambda number: -priorities[number])
    assert run_order(priorities) == expected


def test_tasks_add_tasks() -> None:
    pool, order = Pool(1), []

    def task(name: str, *more: tuple[float, str]) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            for to_end, child in more:
                pool.add(to_end, task(child), own=1)

        return run

    pool.add(9, task("first", (1, "late"), (5, "soon")), own=1)
    pool.add(3, task("second"), own=1)
    pool.drain()
    assert order == ["first", "soon", "second", "late"]


def test_a_waiting_thread_takes_what_another_adds() -> None:
    pool, both = Pool(2), Barrier(2, timeout=30)
    pool.add(1, lambda: [pool.add(1, lambda: both.wait() and None, own=1) for _ in "12"], own=1)
    pool.drain()
    assert not both.broken and both.n_waiting == 0


def test_as_many_tasks_at_once_as_workers() -> None:
    pool, all_three = Pool(3), Barrier(3, timeout=30)
    for _ in range(3):
        pool.add(1, lambda: all_three.wait() and None, own=1)
    pool.drain()
    assert not all_three.broken


def test_an_error_stops_the_pool_and_is_raised() -> None:
    pool, order = Pool(1), []

    def fail() -> None:
        order.append("fails")
        raise OSError("disk full")

    pool.add(3, lambda: order.append("before"), own=1)
    pool.add(2, fail, own=1)
    pool.add(1, lambda: order.append("after"), own=1)
    with pytest.raises(OSError, match=r"^disk full$"):
        pool.drain()
    assert order == ["before", "fails"]


def test_what_runs_beside_an_error_ends_before_it_is_raised() -> None:
    pool, failing, order = Pool(2), Event(), []

    def slow() -> None:
        assert failing.wait(30)
        order.append("slow")

    def fail() -> None:
        failing.set()
        raise OSError("first")

    pool.add(2, slow, own=1)
    pool.add(1, fail, own=1)
    with pytest.raises(OSError, match=r"^first$"):
        pool.drain()
    assert order == ["slow"]


def test_steps_are_counted() -> None:
    steps: list[tuple[float, float]] = []
    pool = Pool(1, lambda done, expected: steps.append((done, expected)))
    pool.expect(2)
    pool.expect(5)

    def more() -> None:
        pool.expect(1)
        pool.add(1, nothing, own=1)

    pool.add(9, more, own=2)
    pool.add(5, nothing, own=5)
    pool.drain()
    assert steps == [(2, 8), (7, 8), (8, 8)]


def test_no_tasks() -> None:
    Pool(2).drain()


def test_an_error_of_on_step_is_raised() -> None:
    ran: list[int] = []

    def complain(done: float, expected: float) -> None:
        raise BrokenPipeError

    pool = Pool(1, complain)
    for number in range(3):
        pool.add(1, lambda number=number: ran.append(number), own=1)
    with pytest.raises(BrokenPipeError):
        pool.drain()


# Units.


def gemm(*arguments: str, entry: str = "gemm_impl", header: str = "deep_gemm/a.cuh") -> Kernel:
    return Kernel("gemm", header, entry, arguments)


def job_of(kernel: Kernel, keys: CacheKeys | None = None) -> Job:
    if keys is None:
        return Job(kernel.identity, kernel, f"// hash\n{kernel.body}")
    return Job(keys.cache_key(kernel), kernel, keys.source(kernel))


def test_the_text_of_a_unit() -> None:
    first, second = gemm("1, 2", "true"), gemm("3, 4", "float", entry="sched::other")
    assert unit_text([job_of(first), job_of(second)]) == (
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
    ("old", "new"),
    [
        ("deep_gemm/a.cuh", "deep_gemm/b.cuh"),
        ("// hash\n", "#define A\n"),
        ("using", "#pragma once\nusing"),
        ("};\n", "};\nstatic void __instantiate_kernel() {}\n"),
        ("__instantiate_kernel", "other"),
    ],
)
def test_a_source_of_another_form_has_no_unit(old: str, new: str) -> None:
    kernel = gemm("1")
    text = f"// hash\n{kernel.body}"
    assert old in text
    with pytest.raises(UnusualError, match=r"^not a source of one include and one instantiation$"):
        unit_text([Job("key", kernel, text.replace(old, new))])


def test_signatures_hold_the_literals_that_were_written() -> None:
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
def test_signatures_of_mangled_names(mangled: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert entry_signature(mangled) == expected


@pytest.mark.parametrize("mangled", ["main", "_Z4initv", "_ZN9deep_gemm4initEv", "_Z", ""])
def test_entries_that_are_no_templates(mangled: str) -> None:
    with pytest.raises(UnusualError) as caught:
        entry_signature(mangled)
    assert str(caught.value) == f"entry {mangled} is no instance of a template"


def mangle(names: Sequence[str], literals: Sequence[int]) -> str:
    inner = "".join(f"{len(name)}{name}" for name in names)
    arguments = "I" + "".join(f"Lj{literal}E" for literal in literals) + "E"
    return f"_ZN{inner}{arguments}Evv" if len(names) > 1 else f"_Z{inner}{arguments}vv"


@given(
    names=st.lists(st.from_regex(r"[A-Za-z_]\w{0,12}", fullmatch=True).filter(str.isascii),
                   min_size=1, max_size=4),
    literals=st.lists(st.integers(0, 2**32 - 1), max_size=6),
)  # fmt: skip
def test_a_name_survives_mangling(names: list[str], literals: list[int]) -> None:
    assert entry_signature(mangle(names, literals)) == (names[-1], tuple(literals))


def test_entries_find_their_kernels_whatever_their_defaults() -> None:
    jobs = [job_of(gemm("1, 2")), job_of(gemm("1, 3")), job_of(gemm("1, 2", entry="other"))]
    entries = [
        mangle(["dg", "other"], [1, 2]),
        mangle(["dg", "gemm_impl"], [1, 3, 0, 7]),
        mangle(["dg", "gemm_impl"], [1, 2, 3]),
    ]
    assert match_entries(jobs, entries) == dict(
        zip(entries, [jobs[2], jobs[1], jobs[0]], strict=True)
    )


@pytest.mark.parametrize(
    ("wanted", "entries", "message"),
    [
        (["1, 2"], [[1, 2, 3], [1, 2, 4]], "cannot be told apart"),
        (["1, 2", "1, 2, float"], [[1, 2]], "cannot be told apart"),
        (["1", "1, 2"], [[1], [1, 2]], "cannot be told apart"),
        (["1, 2"], [[1, 3]], "cannot be told apart"),
        (["1, 2"], [], "cannot be told apart"),
        (["1, 2"], [[1, 2], [7]], "has entries that are not its kernels"),
    ],
)
def test_entries_that_are_not_one_for_each_kernel(
    wanted: list[str], entries: list[list[int]], message: str
) -> None:
    jobs = [job_of(gemm(arguments)) for arguments in wanted]
    with pytest.raises(UnusualError, match=message):
        match_entries(jobs, [mangle(["dg", "gemm_impl"], literals) for literals in entries])


# PTX.

PTX_HEAD = "//\n// Generated\n//\n\n.version 9.0\n.target sm_90a\n.address_size 64\n"


def entry_text(name: str, *body: str) -> str:
    lines = "".join(f"\t{line}\n" for line in body)
    return f".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n{{\n{lines}\tret;\n\n}}\n"


def test_ptx_is_split_by_entry() -> None:
    shared = ".extern .shared .align 1024 .b8 smem[];\n"
    first, second = entry_text("one", "mov %r, smem;"), entry_text("two", "mov %r, own;")
    text = (
        f"{PTX_HEAD}{shared}.shared .align 8 .b8 own[16];\n.global .align 1 .b8 unused[4];\n\n"
        f"{first}\n{second.replace('.visible', '.weak')}"
    )
    assert split_ptx(text) == {
        "one": (f"{PTX_HEAD}{shared}.global .align 1 .b8 unused[4];\n\n\n{first}\n"),
        "two": (
            f"{PTX_HEAD}.shared .align 8 .b8 own[16];\n.global .align 1 .b8 unused[4];\n"
            f"\n\n{second.replace('.visible', '.weak')}"
        ),
    }


def test_a_single_entry_is_the_whole_text() -> None:
    text = (
        f"{PTX_HEAD}.extern .shared .align 16 .b8 smem[];\n\n{entry_text('one', 'mov %r, smem;')}"
    )
    (module,) = split_ptx(text).values()
    assert module.split() == text.split()


def test_a_declaration_whose_name_begins_anothers() -> None:
    head = f"{PTX_HEAD}.shared .b8 s[4];\n.shared .b8 s2[4];\n"
    modules = split_ptx(
        f"{head}{entry_text('one', 'mov %r, s;')}{entry_text('two', 'mov %r, s2;')}"
    )
    assert ".b8 s[4]" not in modules["two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PTX_HEAD, "PTX without an entry"),
        (f"{PTX_HEAD}.func f()\n{{\n\tret;\n}}\n", "PTX without an entry"),
        (
            f"{PTX_HEAD}{entry_text('one')}.func f()\n{{\n\tret;\n}}\n",
            "PTX with more than entries",
        ),
        (
            f"{PTX_HEAD}{entry_text('one')}.visible .func f()\n{{\n\tret;\n}}\n{entry_text('two')}",
            "PTX with more than entries",
        ),
        (f"{PTX_HEAD}{entry_text('one', 'call f;')}", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one', '.loc 1 2 3')}", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}.file 1 \"k.cu\"\n", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}.section .debug\n{{\n}}\n", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}// the end\n", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')[:-3]}", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}{entry_text('one')}", "PTX with two entries of one name"),
        (
            f"{PTX_HEAD}.global .align 1 .b8 str[3] = {{72, 105, 0}};\n{entry_text('one')}",
            "PTX with '.global .align 1 .b8 str[3] = {72, 105, 0};' before its first entry",
        ),
        (
            f"{PTX_HEAD}.const .b8 c[3];\n{entry_text('one')}",
            "PTX with '.const .b8 c[3];' before its first entry",
        ),
        (
            f"{PTX_HEAD}.extern .func vprintf\n{entry_text('one')}",
            "PTX with '.extern .func vprintf' before its first entry",
        ),
    ],
)  # fmt: skip
def test_ptx_with_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UnusualError) as caught:
        split_ptx(text)
    assert str(caught.value) == message


# Costs, the cut and the schedule.


@cache
def planned_kernels() -> tuple[Kernel, ...]:
    """Some 60 kernels of seven headers, some of them with the signature of another."""
    specs = [
        "gemm_nt_f8f8bf16:4096:1024", "gemm_nt_bf16bf16f32:256:4096",
        "gemm_nt_bf16bf16bf16:256:4096", "tf32_hc_prenorm_gemm:24:16384",
        "paged_mqa_logits_metadata:1:1", "fp8_mqa_logits:64:128", "fp8_paged_mqa_logits:64:128",
        "grouped_gemm_nt_f8f8bf16_masked:1024:4096:8",
    ]  # fmt: skip
    demands = [demand for spec in specs for demand in gemm_demands(spec, max_m=512, num_sms=132)]
    kernels = [item.kernel for item in make_plan(demands).kernels]
    return (*kernels, *(alike_of(item) for item in kernels if item.name == "sm90_bf16_gemm"))


def kernel_lists(**sizes: int) -> st.SearchStrategy[list[Kernel]]:
    return st.deferred(lambda: st.lists(st.sampled_from(planned_kernels()), unique=True, **sizes))


def fp8_of_tile(m: int, n: int, k: int = 128) -> Kernel:
    (found,) = kernels_of(KernelCall(T.GEMM_NT_F8F8BF16, 64, 4096, 1024, 1, 132))[1:]
    return replace(found, arguments=(*found.arguments[:3], f"{m}, {n}, {k}", *found.arguments[4:]))


def test_bigger_tiles_cost_more() -> None:
    ascending = [fp8_of_tile(64, 16), fp8_of_tile(64, 64), fp8_of_tile(64, 128),
                 fp8_of_tile(256, 128)]  # fmt: skip
    for cost in (costs.front_end_seconds, costs.expected_assemble_seconds, costs.plain_seconds):
        seconds = [cost(kernel) for kernel in ascending]
        assert seconds == sorted(set(seconds))


def test_a_tile_that_repeats_its_main_loop_costs_more() -> None:
    once, copied = fp8_of_tile(128, 128), fp8_of_tile(128, 96)
    assert costs.front_end_seconds(copied) > costs.front_end_seconds(once)


def test_the_plain_way_costs_all_that_the_fast_one_shares() -> None:
    for kernel in planned_kernels():
        alone = unit_seconds([job_of(kernel)]) + costs.expected_assemble_seconds(kernel)
        assert costs.plain_seconds(kernel) == pytest.approx(alone + costs.PLAIN_OVERHEAD_SECONDS)


@given(few=st.floats(0, 1e7), more=st.floats(0, 1e7))
def test_more_ptx_is_never_cheaper(few: float, more: float) -> None:
    few, more = sorted((few, more))
    assert 0 < costs.assemble_seconds(few) <= costs.assemble_seconds(more)


@settings(max_examples=60, deadline=None)
@given(kernels=kernel_lists(), workers=st.integers(1, 9))
def test_every_job_is_in_one_unit_of_its_header(kernels: list[Kernel], workers: int) -> None:
    jobs = [job_of(kernel) for kernel in kernels]
    units = cut_units(jobs, workers)
    assert Counter(job for unit in units for job in unit) == Counter(jobs)
    for unit in units:
        assert len({job.kernel.header for job in unit}) == 1
        assert len({signature(job.kernel) for job in unit}) == len(unit)


def test_the_planned_kernels_hold_some_that_look_alike() -> None:
    signatures = Counter(map(signature, planned_kernels()))
    assert len(planned_kernels()) > 40 and max(signatures.values()) > 1
    assert len({kernel.header for kernel in planned_kernels()}) == 7


@settings(max_examples=60, deadline=None)
@given(kernels=kernel_lists(min_size=1), workers=st.integers(1, 9))
def test_the_expected_schedule(kernels: list[Kernel], workers: int) -> None:
    units = cut_units([job_of(kernel) for kernel in kernels], workers)
    steps = expected_schedule(units, workers)
    assert Counter(step.kernel for step in steps) == Counter([*kernels, *[None] * len(units)])
    for step in steps:
        assert sum(other.start <= step.start < other.end for other in steps) <= workers
    front_end = {job.kernel: unit_seconds(unit) for unit in units for job in unit}
    for step in steps:
        if step.kernel is not None:
            assert step.start >= front_end[step.kernel]
            own = costs.expected_assemble_seconds(step.kernel)
            assert step.end - step.start == pytest.approx(own)
    total = sum(map(unit_seconds, units)) + sum(map(costs.expected_assemble_seconds, kernels))
    chain, end = max(map(to_end_seconds, units)), makespan(units, workers)
    assert end == max(step.end for step in steps)
    assert max(total / workers, chain) - 1e-9 <= end <= total / workers + chain + 1e-9


def alike_of(kernel: Kernel) -> Kernel:
    return replace(kernel, arguments=(*kernel.arguments[:-1], "other_t"))


def test_kernels_that_look_alike_share_no_unit_even_where_that_would_be_even() -> None:
    big, small = fp8_of_tile(256, 128), fp8_of_tile(64, 16)
    units = cut_units([job_of(kernel) for kernel in (big, small, alike_of(small))], 1)
    assert [[job.kernel for job in unit] for unit in units] == [
        [big, alike_of(small)],
        [small],
    ]


def test_the_schedule_begins_with_the_longest_way_to_the_end() -> None:
    short, long = [job_of(transpose_fp32(1024))], [job_of(fp8_of_tile(256, 128))]
    steps = expected_schedule([short, long], 1)
    assert [step.kernel for step in steps] == [None, long[0].kernel, None, short[0].kernel]
    assert steps[0].end == unit_seconds(long)


def test_nothing_to_build_takes_no_time() -> None:
    assert cut_units([], 2) == []
    assert makespan([], 2) == 0


def test_more_workers_get_more_units() -> None:
    jobs = [job_of(kernel) for kernel in planned_kernels()]
    one, many = cut_units(jobs, 1), cut_units(jobs, 16)
    assert len(one) < len(many)
    assert makespan(many, 16) < makespan(one, 16)


def test_the_dearest_kernel_is_shared_out_first() -> None:
    small, other, big = transpose_fp32(1024), transpose_fp32(2048), fp8_of_tile(256, 128)
    assert share_out([small, other, big], 2) == [(big,), (small, other)]
    assert share_out([small], 3) == [(small,), (), ()]


@given(kernels=kernel_lists(), nodes=st.integers(1, 9))
def test_shares_are_even(kernels: list[Kernel], nodes: int) -> None:
    def cost(kernel: Kernel) -> float:
        return costs.front_end_seconds(kernel) + costs.expected_assemble_seconds(kernel)

    shares = share_out(kernels, nodes)
    assert len(shares) == nodes
    assert Counter(kernel for share in shares for kernel in share) == Counter(kernels)
    assert share_out(list(kernels), nodes) == shares
    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(cost, kernels), default=0) + 1e-9


# What nvcc is asked.

FLAGS = ("-std=c++20", "-Iwhere")


def dry_nvcc(tmp_path: Path, to_ptx: str, to_cubin: str) -> Path:
    """A script that tells these dry runs, with $T for its folder of temporary files."""
    path = tmp_path / "dry-nvcc"
    path.write_text(
        f'#!/bin/sh\necho "$*" >>"{tmp_path}/asked"\nT=$TMPDIR O=$4\n'
        f'if [ "$2" = -ptx ]; then cat >&2 <<END\n{to_ptx}\nEND\nelse cat >&2 <<END\n{to_cubin}\n'
        "END\nfi\n"
    )
    path.chmod(0o755)
    return path


PREPROCESS = '#\\$ gcc -E -DA="a b" "kernel.cu" -o "$T/t-7.ii"'
FRONT_END = '#\\$ "\\$TOP/cicc" --c++20 "$T/t-7.ii" -o "$O"'
ASSEMBLE = '#\\$ ptxas -arch=sm_90a "$T/t-6.ptx" -o "$O"'
TO_PTX = f"nvcc says hello\n#\\$ _SPACE_= \n#\\$ TOP=/opt/cuda/bin\n{PREPROCESS}\n{FRONT_END}"
TO_CUBIN = f"#\\$ TOP=/elsewhere\n{PREPROCESS}\n{ASSEMBLE}"


def test_the_stages_are_what_nvcc_tells(tmp_path: Path) -> None:
    nvcc = dry_nvcc(tmp_path, TO_PTX, TO_CUBIN)
    stages = ask_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin", "A": "1"})
    folder = str(tmp_path / "scratch" / "stages")
    assert stages == Stages(
        folder=folder,
        preprocess=("gcc", "-E", "-DA=a b", "kernel.cu", "-o", f"{folder}/t-7.ii"),
        front_end=(
            "/opt/cuda/bin/cicc", "--c++20", f"{folder}/t-7.ii", "-o", f"{folder}/kernel.ptx",
        ),
        assemble=(
            "ptxas", "-arch=sm_90a", f"{folder}/kernel.ptx", "-o", f"{folder}/kernel.cubin",
        ),
        preprocessed="t-7.ii",
        environment={"PATH": "/bin:/usr/bin", "A": "1", "_SPACE_": " ", "TOP": "/opt/cuda/bin"},
    )  # fmt: skip
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"{folder}/kernel.cu -{kind} -o {folder}/kernel.{kind} -std=c++20 -Iwhere --dryrun"
        for kind in ("ptx", "cubin")
    ]


@pytest.mark.parametrize("flag", ["-lineinfo", "-G", "-g"])
def test_line_numbers_go_the_plain_way(tmp_path: Path, flag: str) -> None:
    nvcc = dry_nvcc(tmp_path, TO_PTX, TO_CUBIN)
    with pytest.raises(UnusualError, match=r"^the flags keep line numbers$"):
        ask_stages(nvcc, ("-std=c++20", flag), tmp_path / "scratch", {})
    assert not (tmp_path / "asked").exists()


NO_COMMAND = "nvcc has 0 commands where one was expected"
OTHER_FRONT_END = "cicc does not read what was preprocessed, or writes elsewhere"
OTHER_ASSEMBLER = "ptxas does not read PTX, or writes elsewhere"


@pytest.mark.parametrize(
    ("to_ptx", "to_cubin", "message"),
    [
        ("", "", NO_COMMAND),
        (TO_PTX.replace("#", "%"), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace(FRONT_END, ""), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace("cicc", "clang"), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace("-E", "-c"), TO_CUBIN, NO_COMMAND),
        (TO_PTX, TO_CUBIN.replace("ptxas", "as"), NO_COMMAND),
        (f"{TO_PTX}\n{FRONT_END}", TO_CUBIN, "nvcc has 2 commands where one was expected"),
        (TO_PTX.replace('-7.ii" -o "$O', '-8.ii" -o "$O'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX.replace('-o "$O"', '-o "$T/else.ptx"'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX.replace('-o "$O"', '-o "$O" -v'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX, TO_CUBIN.replace(".ptx", ".ltoir"), OTHER_ASSEMBLER),
        (TO_PTX, TO_CUBIN.replace('-o "$O"', "-o a.cubin"), OTHER_ASSEMBLER),
    ],
)
def test_an_nvcc_that_works_in_another_way(
    tmp_path: Path, to_ptx: str, to_cubin: str, message: str
) -> None:
    nvcc = dry_nvcc(tmp_path, to_ptx, to_cubin)
    with pytest.raises(UnusualError) as caught:
        ask_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin"})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "to_ptx",
    [TO_PTX.replace('-o "$T/t-7.ii"', ""), TO_PTX.replace('"$T/t-7.ii" -o', '"$T/t-7.ii -o')],
    ids=["no output", "a quote that does not end"],
)
def test_an_nvcc_whose_commands_cannot_be_read(tmp_path: Path, to_ptx: str) -> None:
    nvcc = dry_nvcc(tmp_path, to_ptx, TO_CUBIN)
    with pytest.raises(UnusualError, match=r"^nvcc --dryrun cannot be read: "):
        ask_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin"})


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'unknown option --dryrun' >&2; exit 1", "unknown option --dryrun"),
        ("exit 4", "exit 4"),
    ],
)
def test_an_nvcc_without_dry_runs(tmp_path: Path, script: str, words: str) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    with pytest.raises(UnusualError, match=rf"^nvcc --dryrun: {words}$"):
        ask_stages(nvcc, FLAGS, tmp_path / "scratch", {})


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo out; echo err >&2; exit 3", "tool: err"),
        ("echo out; exit 3", "tool: out"),
        ("exit 3", "tool: exit 3"),
    ],
)
def test_a_stage_runs_in_its_folder_and_tells_its_words(
    tmp_path: Path, script: str, words: str
) -> None:
    tool, here = tmp_path / "tool", tmp_path / "here"
    here.mkdir()
    tool.write_text(
        f'#!/bin/sh\npwd -P >"$1"; echo "$WHO" >>"$1"\n[ "$2" = ok ] && exit 0\n{script}\n'
    )
    tool.chmod(0o755)
    command = (str(tool), "/made/for/out", "ok")
    stages = Stages("/made/for", command, (), (), "", {"WHO": "me"})
    stages.run(command, here)
    assert (here / "out").read_text() == f"{here.resolve()}\nme\n"
    with pytest.raises(StageError) as caught:
        stages.run(command[:2], here)
    assert str(caught.value) == words


# The builder.

TOOLCHAIN = r"""#!PYTHON -SE
import os, re, sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, "REPOSITORY")
from tests.unit.elf import tiny_cubin


def cicc(text):
    if "broken" in text:
        sys.exit("error: it is broken")
    names = [
        f"_Z{len(name)}{name}I" + "".join(f"Lj{word}E" for word in re.findall(r"\d+", words))
        for name, words in re.findall(r"&(\w+)<(.*?)>\)", text, re.DOTALL)
    ]
    functions = ".func f()\n{\n}\n" if "calling" in text else ""
    return ".version 9.0\n" + functions + "".join(
        f"\n.visible .entry {name}EEvv(\n)\n{{\n\tret;\n}}\n" for name in names
    )


def ptxas(text):
    (name,) = re.findall(r"\.entry (\w+)", text)
    return tiny_cubin(sha256(name.encode()).digest(), name)


def dry_run(kind, output, folder):
    here = Path(sys.argv[0]).parent
    if kind == "-ptx":
        print(f"#$ {here}/cpp -E kernel.cu -o {folder}/t.ii", file=sys.stderr)
        print(f"#$ {here}/cicc {folder}/t.ii -o {output}", file=sys.stderr)
    else:
        print(f"#$ {here}/ptxas {folder}/t.ptx -o {output}", file=sys.stderr)


def run(role, source, target):
    with Path(sys.argv[0]).with_name("log").open("a") as file:
        file.write(f"{role}\n")
    text = Path(source).read_text()
    if {"cpp": "unreadable", "ptxas": "refused"}.get(role, "\0") in text:
        sys.exit("fatal: not this one")
    if role == "ptxas" and "renamed" in text:
        text = text.replace("renamed", "another")
    made = {"cpp": str, "cicc": cicc, "ptxas": ptxas, "nvcc": lambda text: ptxas(cicc(text))}
    data = made[role](text)
    Path(target).write_bytes(data if isinstance(data, bytes) else data.encode())


words = sys.argv[1:]
if words == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif words[-1] == "--dryrun":
    dry_run(words[1], words[3], os.environ["TMPDIR"])
elif Path(sys.argv[0]).name == "nvcc":
    run("nvcc", words[0], words[3])
else:
    run(Path(sys.argv[0]).name, words[-3], words[-1])
"""


@pytest.fixture
def toolchain(tmp_path: Path) -> Path:
    """Scripts that play nvcc and its stages; they write their names into ``log``."""
    folder = tmp_path / "toolchain"
    folder.mkdir()
    script = TOOLCHAIN.replace("PYTHON", sys.executable).replace("REPOSITORY", str(REPOSITORY))
    (folder / "nvcc").write_text(script)
    (folder / "nvcc").chmod(0o755)
    for name in ("cpp", "cicc", "ptxas"):
        (folder / name).symlink_to("nvcc")
    return folder


def calls(toolchain: Path) -> dict[str, int]:
    return Counter((toolchain / "log").read_text().split())


Shared = list[tuple[str, float, float]]


def build(
    compiler: NvccCompiler,
    scratch: Path,
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    fast: bool = True,
    shared: Shared | None = None,
    on_step: Callable[[float, float], None] = lambda done, total: None,
) -> dict[Kernel, Built]:
    scratch.mkdir()
    found: list[Built] = []
    told: Shared = [] if shared is None else shared
    environment: Mapping[str, str] = dict(os.environ)
    Builder(
        compiler,
        scratch,
        workers,
        environment,
        found.append,
        fast,
        on_step,
        lambda *step: told.append(step),
    ).build(jobs)
    assert Counter(built.job for built in found) == Counter(jobs)
    return {built.job.kernel: built for built in found}


def code_of(built: Built) -> bytes:
    assert built.cubin is not None
    (code,) = kernels_in(built.cubin).values()
    return code


FIVE = [gemm("1, 2"), gemm("3, 4"), gemm("3, 5"), gemm("1", entry="metadata"),
        gemm("1, 2", "float", header="deep_gemm/c.cuh")]  # fmt: skip


def test_the_fast_way(tmp_path: Path, toolchain: Path, fake_library: Library) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    jobs = [job_of(kernel, compiler.keys) for kernel in FIVE]
    shared: Shared = []
    fast = build(compiler, tmp_path / "fast", jobs, shared=shared)
    units = len(cut_units(jobs, 2))
    assert calls(toolchain) == {"cpp": 2, "cicc": units, "ptxas": 5}
    assert {(built.way, built.words) for built in fast.values()} == {(Way.FAST, "")}
    assert Counter(name.partition(" of ")[0] for name, _, _ in shared) == {
        "preprocess deep_gemm/a.cuh": 1, "preprocess deep_gemm/c.cuh": 1, "front end": units,
    }  # fmt: skip
    assert all(start <= end for _, start, end in shared)
    plain = build(compiler, tmp_path / "plain", jobs, fast=False)
    assert calls(toolchain) == {"cpp": 2, "cicc": units, "ptxas": 5, "nvcc": 5}
    assert {(built.way, built.words) for built in plain.values()} == {(Way.PLAIN, "as asked")}
    assert {k: code_of(built) for k, built in fast.items()} == {
        k: code_of(built) for k, built in plain.items()
    }
    assert len(set(map(code_of, fast.values()))) == 4  # two differ in a type alone


@pytest.mark.parametrize("fast", [True, False])
def test_steps_end_at_what_was_expected(
    tmp_path: Path, toolchain: Path, fake_library: Library, fast: bool
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    jobs, steps = [job_of(kernel) for kernel in FIVE], []
    build(compiler, tmp_path / "scratch", jobs, workers=1, fast=fast,
          on_step=lambda *step: steps.append(step))  # fmt: skip
    done = [step[0] for step in steps]
    assert done == sorted(set(done)) and done[0] > 0
    assert steps[-1][0] == pytest.approx(steps[-1][1])
    if fast:
        assert len({expected for _, expected in steps}) == 1


def test_nothing_to_build(tmp_path: Path, toolchain: Path, fake_library: Library) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    for fast in (True, False):
        assert build(compiler, tmp_path / f"scratch{fast}", [], fast=fast) == {}
    assert not (toolchain / "log").exists()


def test_one_wrong_kernel_fails_alone(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    wrong = gemm("9", "broken")
    jobs = [job_of(kernel) for kernel in [*FIVE[:2], wrong, *FIVE[2:4]]]
    assert len(cut_units(jobs, 1)) == 1
    built = build(compiler, tmp_path / "scratch", jobs, workers=1)
    failed = built.pop(wrong)
    assert (failed.cubin, failed.way, failed.words) == (None, Way.PLAIN, "error: it is broken")
    assert {item.way for item in built.values()} == {Way.FAST}
    assert calls(toolchain)["nvcc"] == 1
    assert calls(toolchain)["ptxas"] == 4


@pytest.mark.parametrize(
    ("odd", "plain", "reason"),
    [
        (gemm("9", "calling"), 3, "PTX with '.func f()' before its first entry"),
        (gemm("9, 9", entry="refused"), 1, "ptxas: fatal: not this one"),
        (gemm("9, 9", entry="renamed"), 1, "a cubin of other kernels than its own"),
        (gemm("1", "2"), 3, "a unit's entries cannot be told apart"),
    ],
    ids=["a function", "refused by ptxas", "another entry", "alike"],
)
def test_what_is_unusual_goes_the_plain_way(
    tmp_path: Path, toolchain: Path, fake_library: Library, odd: Kernel, plain: int, reason: str
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    jobs = [job_of(kernel) for kernel in (gemm("1, 2, 3"), gemm("4"), odd)]
    assert len(cut_units(jobs, 1)) == 1
    built = build(compiler, tmp_path / "scratch", jobs, workers=1)
    assert Counter((item.way, item.words) for item in built.values()) == Counter(
        {(Way.FAST, ""): 3 - plain, (Way.PLAIN, reason): plain} if plain < 3 else
        {(Way.PLAIN, reason): plain}
    )  # fmt: skip
    assert built[odd].way is Way.PLAIN
    assert None not in map(code_of, built.values())
    assert calls(toolchain)["nvcc"] == plain


def test_a_header_that_cannot_be_preprocessed(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    odd = gemm("1", header="deep_gemm/unreadable.cuh")
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1")), job_of(odd)])
    assert (built[odd].way, built[odd].words) == (Way.PLAIN, "cpp: fatal: not this one")
    assert built[gemm("1")].way is Way.FAST


def test_an_nvcc_that_tells_no_stages(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(fake_nvcc, fake_library, Environ())
    wrong = gemm("9", "broken")
    jobs = [job_of(kernel) for kernel in (*FIVE, wrong)]
    built = build(compiler, tmp_path / "scratch", jobs)
    failed = built.pop(wrong)
    assert (failed.cubin, failed.words) == (None, "error: it is broken")
    assert {item.words for item in built.values()} == {NO_COMMAND}
    assert {item.way for item in (failed, *built.values())} == {Way.PLAIN}
    assert {item.job.kernel: item.cubin for item in built.values()} == {
        job.kernel: job.source.encode() for job in jobs[:-1]
    }


def test_what_on_built_raises_ends_the_build(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    taken: list[Built] = []

    def full(built: Built) -> None:
        if taken:
            raise OSError("disk full")
        taken.append(built)

    builder = Builder(compiler, tmp_path, 1, dict(os.environ), full)
    with pytest.raises(OSError, match=r"^disk full$"):
        builder.build([job_of(kernel) for kernel in FIVE])
    assert len(taken) == 1
    assert calls(toolchain)["ptxas"] == 2


def test_an_nvcc_by_a_relative_path(
    tmp_path: Path, toolchain: Path, fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compiler = NvccCompiler(Path("toolchain/nvcc"), fake_library, Environ())
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1"))])
    assert built[gemm("1")].way is Way.FAST


def test_a_stage_that_cannot_be_run_goes_the_plain_way(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, Environ())
    (toolchain / "cicc").unlink()
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1"))])[gemm("1")]
    assert (built.way, built.words) == (Way.PLAIN, "cicc: No such file or directory")
    assert code_of(built)


def test_an_nvcc_that_writes_no_cubin_fails_that_kernel(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    copy = 'cp "$1" "$4"'
    script = fake_nvcc.read_text()
    assert copy in script
    fake_nvcc.write_text(script.replace(copy, f'grep -q silent "$1" || {copy}'))
    compiler = NvccCompiler(fake_nvcc, fake_library, Environ())
    silent = gemm("9", "silent")
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1")), job_of(silent)])
    failed = built.pop(silent)
    assert (failed.cubin, failed.way, failed.words) == (None, Way.PLAIN, "nvcc wrote no cubin")
    assert [item.words for item in built.values()] == [NO_COMMAND]


# Scratch folders.


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's temporary directory of our own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_is_empty_and_goes(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert folder.name == "work" and list(folder.iterdir()) == []
        assert folder.parent.parent == temporary.resolve()
        assert folder.parent.name.startswith("deepgemm-build-")
        (folder / "kernel.cu").write_text("")
    assert list(temporary.iterdir()) == []


def test_only_abandoned_scratch_goes_with_the_next_build(temporary: Path) -> None:
    abandoned, starting, other = (
        temporary / name for name in ("deepgemm-build-old", "deepgemm-build-new", "else")
    )
    for folder in (abandoned, starting, other):
        (folder / "work").mkdir(parents=True)
    for folder in (abandoned, other):
        (folder / ".lock").touch()
    with scratch_folder() as held:
        assert not abandoned.exists()
        (held / "kernel.cu").touch()
        with scratch_folder() as second:
            assert second != held
            assert (held / "kernel.cu").exists()
    assert sorted(temporary.iterdir()) == [starting, other]


def test_scratch_of_two_builds_that_begin_at_once(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, began = fcntl.flock, []

    def flock(file: IO[str], operation: int) -> None:
        if not began:
            began.append(True)
            with scratch_folder():
                pass
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder() as folder:
        assert folder.is_dir()


# With a real nvcc.


def real_kernels() -> list[Kernel]:
    def last(kind: T, n: int, k: int, m: int) -> Kernel:
        return kernels_of(KernelCall(kind, m, n, k, 1, 132))[-1]

    return [
        transpose_fp32(1024),
        transpose_fp32(4096),
        last(T.PAGED_MQA_LOGITS_METADATA, 1, 1, 1),
        last(T.PAGED_MQA_LOGITS_METADATA, 1, 1, 64),
        last(T.GEMM_NT_BF16BF16F32, 256, 4096, 1),
        last(T.GEMM_NT_F8F8BF16, 4096, 1024, 1),
    ]


@pytest.mark.nvcc
def test_both_ways_make_the_same_machine_code(tmp_path: Path, nvcc_compiler: NvccCompiler) -> None:
    jobs = [job_of(kernel, nvcc_compiler.keys) for kernel in real_kernels()]
    wrong = replace(transpose_fp32(1024), arguments=("512, 64, 24", "nonsense"))
    (unit,) = [unit for unit in cut_units([*jobs, job_of(wrong)], 2) if job_of(wrong) in unit]
    assert len(unit) == 3
    fast = build(nvcc_compiler, tmp_path / "fast", [*jobs, job_of(wrong, nvcc_compiler.keys)])
    failed = fast.pop(wrong)
    assert (failed.cubin, failed.way) == (None, Way.PLAIN)
    assert 'identifier "nonsense" is undefined' in failed.words
    assert {(built.way, built.words) for built in fast.values()} == {(Way.FAST, "")}
    plain = build(nvcc_compiler, tmp_path / "plain", jobs, fast=False)
    assert {built.way for built in plain.values()} == {Way.PLAIN}
    for kernel in real_kernels():
        assert fast[kernel].cubin is not None and plain[kernel].cubin is not None
        (name,) = kernels_in(fast[kernel].cubin)
        assert entry_signature(name)[0] == signature(kernel)[0]
        assert kernels_in(fast[kernel].cubin) == kernels_in(plain[kernel].cubin)
        assert len(code_of(fast[kernel])) > 100
