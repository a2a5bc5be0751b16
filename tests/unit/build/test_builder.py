"""KernelBuilder and its worker pool, with scripts in place of nvcc and with a real nvcc."""

import fcntl
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.builder import BuildResult, Job, KernelBuilder, TaskPool, scratch_folder
from runner.build.compiler import NvccCompiler
from runner.build.units import entry_signature, signature, split_into_units
from runner.config.environ import Environ
from runner.kernels.entry import kernels_in
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.keys import first_recipe
from runner.kernels.rules import kernels_of, transpose_fp32
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from tests.unit.builder_jobs import NO_COMMAND, gemm, job_of

REPOSITORY = Path(__file__).parents[3]

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
    """Scripts that stand in for nvcc and its stages; each appends its name to ``log``."""
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


def build(
    compiler: NvccCompiler,
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    fast: bool = True,
    on_shared: Callable[[str, float, float], None] = lambda name, start, end: None,
) -> dict[Kernel, BuildResult]:
    found: list[BuildResult] = []
    environment = dict(os.environ)
    KernelBuilder(compiler, workers, environment, found.append, fast, on_shared).build(jobs)
    assert Counter(result.job for result in found) == Counter(jobs)
    return {result.job.kernel: result for result in found}


def code_of(result: BuildResult) -> bytes:
    assert result.cubin is not None
    (code,) = kernels_in(result.cubin).values()
    return code


@pytest.fixture
def compiler(toolchain: Path, fake_library: Library) -> NvccCompiler:
    return NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))


FIVE = [
    gemm("1, 2"),
    gemm("3, 4"),
    gemm("3, 5"),
    gemm("1", entry="metadata"),
    gemm("1, 2", "float", header="deep_gemm/c.cuh"),
]


def test_fast_build_runs_each_preprocess_and_front_end_once_per_unit(
    tmp_path: Path, toolchain: Path, compiler: NvccCompiler
) -> None:
    jobs = [job_of(kernel, compiler.keys) for kernel in FIVE]
    shared: list[tuple[str, float, float]] = []
    fast = build(compiler, jobs, on_shared=lambda *step: shared.append(step))
    units = len(split_into_units(FIVE, 2))
    assert calls(toolchain) == {"cpp": 2, "cicc": units, "ptxas": 5}
    assert {(result.fallback, result.error) for result in fast.values()} == {("", "")}
    assert Counter(name.partition(" of ")[0] for name, _, _ in shared) == {
        "preprocess deep_gemm/a.cuh": 1,
        "preprocess deep_gemm/c.cuh": 1,
        "front end": units,
    }
    assert all(start <= end for _, start, end in shared)
    plain = build(compiler, jobs, fast=False)
    assert calls(toolchain) == {"cpp": 2, "cicc": units, "ptxas": 5, "nvcc": 5}
    assert {(result.fallback, result.error) for result in plain.values()} == {("as asked", "")}
    assert {k: code_of(result) for k, result in fast.items()} == {
        k: code_of(result) for k, result in plain.items()
    }
    assert len(set(map(code_of, fast.values()))) == 4  # two differ in a type alone


@pytest.mark.parametrize("fast", [True, False])
def test_empty_build_starts_no_compiler(
    tmp_path: Path, toolchain: Path, compiler: NvccCompiler, fast: bool
) -> None:
    assert build(compiler, [], fast=fast) == {}
    assert not (toolchain / "log").exists()


def test_invalid_kernel_does_not_fail_others_in_its_unit(
    tmp_path: Path, toolchain: Path, compiler: NvccCompiler
) -> None:
    wrong = gemm("9", "broken")
    kernels = [*FIVE[:2], wrong, *FIVE[2:4]]
    assert len(split_into_units(kernels, 1)) == 1
    results = build(compiler, list(map(job_of, kernels)), workers=1)
    failed = results.pop(wrong)
    assert (failed.cubin, failed.error) == (None, "error: it is broken")
    assert {result.fallback for result in results.values()} == {""}
    assert calls(toolchain)["nvcc"] == 1
    assert calls(toolchain)["ptxas"] == 4


@pytest.mark.parametrize(
    ("odd", "plain", "reason"),
    [
        (gemm("9", "calling"), 3, "PTX with '.func f()' before its first entry"),
        (gemm("9, 9", entry="refused"), 1, "ptxas: fatal: not this one"),
        (gemm("9, 9", entry="renamed"), 1, "the cubin does not hold exactly this kernel"),
        (gemm("1", "2"), 3, "a unit's entries cannot be told apart"),
    ],
    ids=["a function", "refused by ptxas", "another entry", "same signature"],
)
def test_kernels_that_fast_build_cannot_handle_fall_back_to_nvcc(
    tmp_path: Path,
    toolchain: Path,
    compiler: NvccCompiler,
    odd: Kernel,
    plain: int,
    reason: str,
) -> None:
    kernels = [gemm("1, 2, 3"), gemm("4"), odd]
    assert len(split_into_units(kernels, 1)) == 1
    results = build(compiler, list(map(job_of, kernels)), workers=1)
    assert sorted(result.fallback for result in results.values()) == sorted(
        [""] * (3 - plain) + [reason] * plain
    )
    assert results[odd].fallback == reason
    assert all(map(code_of, results.values()))
    assert calls(toolchain)["nvcc"] == plain


def test_kernels_of_header_that_fails_to_preprocess_fall_back_to_nvcc(
    tmp_path: Path, compiler: NvccCompiler
) -> None:
    odd = gemm("1", header="deep_gemm/unreadable.cuh")
    results = build(compiler, [job_of(gemm("1")), job_of(odd)])
    assert results[odd].fallback == "cpp: fatal: not this one"
    assert results[gemm("1")].fallback == ""


def test_nvcc_without_dryrun_support_compiles_each_kernel_separately(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    wrong = gemm("9", "broken")
    jobs = [job_of(kernel) for kernel in (*FIVE, wrong)]
    results = build(compiler, jobs)
    failed = results.pop(wrong)
    assert (failed.cubin, failed.error) == (None, "error: it is broken")
    assert {result.fallback for result in (failed, *results.values())} == {NO_COMMAND}
    assert {kernel: result.cubin for kernel, result in results.items()} == {
        job.kernel: job.source.encode() for job in jobs[:-1]
    }


def test_exception_in_result_callback_stops_the_build(
    tmp_path: Path, toolchain: Path, compiler: NvccCompiler
) -> None:
    taken: list[BuildResult] = []

    def full(result: BuildResult) -> None:
        if taken:
            raise OSError("disk full")
        taken.append(result)

    builder = KernelBuilder(compiler, 1, dict(os.environ), full)
    with pytest.raises(OSError, match=r"^disk full$"):
        builder.build([job_of(kernel) for kernel in FIVE])
    assert len(taken) == 1
    assert calls(toolchain)["ptxas"] == 2


def test_build_accepts_relative_nvcc_path(
    tmp_path: Path, toolchain: Path, fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compiler = NvccCompiler(Path("toolchain/nvcc"), fake_library, first_recipe(Environ()))
    results = build(compiler, [job_of(gemm("1"))])
    assert results[gemm("1")].fallback == ""


def test_missing_stage_program_falls_back_to_nvcc(
    tmp_path: Path, toolchain: Path, compiler: NvccCompiler
) -> None:
    (toolchain / "cicc").unlink()
    result = build(compiler, [job_of(gemm("1"))])[gemm("1")]
    assert result.fallback == "cicc: No such file or directory"
    assert code_of(result)


def test_kernel_fails_if_nvcc_writes_no_cubin(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    copy = 'cp "$1" "$4"'
    script = fake_nvcc.read_text()
    assert copy in script
    fake_nvcc.write_text(script.replace(copy, f'grep -q silent "$1" || {copy}'))
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    silent = gemm("9", "silent")
    results = build(compiler, [job_of(gemm("1")), job_of(silent)])
    assert (results[silent].cubin, results[silent].error) == (None, "nvcc wrote no cubin")
    assert results[gemm("1")].error == ""


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
def test_fast_and_plain_builds_give_identical_machine_code(
    tmp_path: Path, nvcc_compiler: NvccCompiler
) -> None:
    keys = nvcc_compiler.keys
    wrong = replace(transpose_fp32(1024), arguments=("512, 64, 24", "nonsense"))
    kernels = [*real_kernels(), wrong]
    (unit,) = [unit for unit in split_into_units(kernels, 2) if wrong in unit]
    assert len(unit) == 3
    fast = build(nvcc_compiler, [job_of(kernel, keys) for kernel in kernels])
    failed = fast.pop(wrong)
    assert failed.cubin is None and 'identifier "nonsense" is undefined' in failed.error
    assert {(result.fallback, result.error) for result in fast.values()} == {("", "")}
    jobs = [job_of(kernel, keys) for kernel in real_kernels()]
    plain = build(nvcc_compiler, jobs, fast=False)
    for kernel in real_kernels():
        ours, theirs = fast[kernel].cubin, plain[kernel].cubin
        assert ours is not None and theirs is not None
        assert kernels_in(ours) == kernels_in(theirs)
        (name,) = kernels_in(ours)
        assert entry_signature(name)[0] == signature(kernel)[0]
        assert len(code_of(fast[kernel])) > 100


# The worker pool


@given(st.lists(st.integers(0, 5), max_size=20))
def test_task_pool_runs_highest_priority_first(priorities: list[int]) -> None:
    pool, order = TaskPool(1), []
    for number, seconds in enumerate(priorities):
        pool.add(seconds, lambda number=number: order.append(number))
    pool.run()
    assert order == sorted(range(len(priorities)), key=lambda number: -priorities[number])


def test_task_added_by_a_running_task_is_ordered_by_priority() -> None:
    pool, order = TaskPool(1), []

    def first() -> None:
        order.append("first")
        pool.add(1, lambda: order.append("late"))
        pool.add(5, lambda: order.append("soon"))

    pool.add(9, first)
    pool.add(3, lambda: order.append("second"))
    pool.run()
    assert order == ["first", "soon", "second", "late"]


def test_task_pool_uses_all_workers_at_once() -> None:
    pool, all_three = TaskPool(3), Barrier(3, timeout=30)

    def first() -> None:  # The other two workers wait for what it adds.
        pool.add(1, lambda: all_three.wait() and None)
        pool.add(1, lambda: all_three.wait() and None)
        all_three.wait()

    pool.add(1, first)
    pool.run()
    assert not all_three.broken


def test_failed_task_cancels_queued_tasks_and_waits_for_running_ones() -> None:
    pool, failing, order = TaskPool(2), Event(), []

    def slow() -> None:
        assert failing.wait(30)
        order.append("slow")

    def fail() -> None:
        failing.set()
        raise OSError("first")

    pool.add(3, slow)
    pool.add(2, fail)
    for _ in range(9):
        pool.add(1, slow)
    with pytest.raises(OSError, match=r"^first$"):
        pool.run()
    assert order.count("slow") <= 2


# Scratch folders


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that ``tempfile`` uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_scratch_folder_starts_empty_and_is_removed_on_exit(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent.parent == temporary.resolve()
        (folder / "kernel.cu").write_text("")
    assert list(temporary.iterdir()) == []


def test_new_scratch_folder_removes_only_those_of_killed_builds(temporary: Path) -> None:
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


def test_scratch_folder_survives_another_build_starting_before_it_is_locked(
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


def test_scratch_folder_is_never_removed_where_file_locks_are_unsupported(
    temporary: Path, no_locks: None
) -> None:
    with (
        pytest.warns(UserWarning, match="has no file locks"),
        scratch_folder() as held,
        scratch_folder(),
    ):
        assert held.is_dir()
