"""``runner compile``: what it builds, what it skips, and resuming after a stop."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import read_manifest
from runner.config.environ import Environ
from runner.kernels.entry import kernels_in
from runner.kernels.installed import Library
from runner.kernels.keys import first_recipe
from runner.report.progress import progress
from tests.unit.build_machine import (
    GEMM,
    REPOSITORY,
    SPEC,
    BuildMachine,
    assert_manifest_names_all,
    assert_tidy,
    assert_whole,
    error_line,
    keys_of,
    output,
    plan,
    summary,
)
from tests.unit.elf import tiny_cubin

REASON = "nvcc --dryrun: no dry runs here"


def test_compile_builds_each_planned_kernel_once(machine: BuildMachine) -> None:
    lines = output(machine.run(*GEMM))
    assert lines[:4] == [
        "sgl-deep-gemm 0.1.4.post1 (JIT 1), h200 (132 SMs, sm_90a), by our rules",
        "compiler: Cuda compilation tools, release 13.0, V13.0.88",
        f"{SPEC}: M up to 128, 132 SMs",
        f"4 kernels -> {machine.cache.root}",
    ]
    assert summary(lines) == "4 built, 0 already there"
    assert lines[-1] == f"4 built the plain way: {REASON}"
    names = [entry.name for entry in machine.cache.entries()]
    assert sorted(machine.compiled()) == names
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    before = machine.stats()
    lines = output(machine.run(*GEMM, "--jobs", "64"))
    assert summary(lines) == "0 built, 4 already there"
    assert len(lines) == 5
    assert machine.stats() == before
    assert sorted(machine.compiled()) == names


def test_compile_with_second_plan_builds_only_new_kernels(machine: BuildMachine) -> None:
    output(machine.run("--gemm", SPEC, "--max-m", "64", "--plain"))
    lines = output(machine.run(*GEMM, "--plain"))
    assert summary(lines) == "2 built, 2 already there"
    assert len(lines) == 5  # no reason is printed, because --plain was given
    assert len(machine.compiled()) == 4
    assert_manifest_names_all(machine)
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert manifest.plans == [f"{SPEC}: M up to {m}, 132 SMs" for m in (64, 128)]


def test_cache_dir_option_overrides_environment(machine: BuildMachine) -> None:
    chosen = machine.root / "chosen"
    lines = output(machine.run(*GEMM, "--cache-dir", str(chosen)))
    assert lines[3] == f"4 kernels -> {chosen}"
    assert len(KernelCache(chosen).entries()) == 4
    assert not machine.cache.root.exists()


def test_target_options_determine_keys_and_manifest(machine: BuildMachine) -> None:
    output(machine.run(*GEMM, "--target-root", "/opt/dg", "--cuda-version", "13.0"))
    library = Library(machine.root / "deep_gemm")
    there = NvccCompiler(Path("nvcc"), Library(Path("/opt/dg")), first_recipe(Environ())).arguments
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert (manifest.flags, manifest.signature) == (" ".join(there), "NVCC13.0")
    assert manifest.built_with == "NVCC13.0"
    assert (manifest.generation, manifest.extra_signature) == (1, "")
    assert (manifest.gpu, manifest.num_sms) == ("h200", 132)
    here = NvccCompiler(machine.root / "nvcc" / "nvcc", library, first_recipe(Environ())).keys
    ours = {here.cache_key(item.kernel) for item in plan().kernels}
    assert ours.isdisjoint(entry.name for entry in machine.cache.entries())


@contextmanager
def blocked(machine: BuildMachine, rows: int) -> Iterator[subprocess.Popen[str]]:
    """A build that is blocked in nvcc at the kernel for this many rows."""
    machine.tell_nvcc("block", f"^        {rows}, ")
    job = machine.start(*GEMM, "--jobs", "1")
    try:
        machine.wait_for_nvcc()
        (machine.root / "nvcc" / "block").unlink()
        yield job
    finally:
        job.kill()
        job.communicate()
        machine.leave_no_nvcc()


@pytest.mark.timeout(120)
def test_compile_resumes_after_a_killed_build(machine: BuildMachine) -> None:
    with blocked(machine, 96) as job:
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        machine.let_nvcc_go()  # its parent is dead
    assert_whole(machine, 2)
    assert read_manifest(machine.cache.root) is None
    before, half = machine.stats(), machine.cache.root / "tmp" / "build-4711-half"
    half.mkdir()
    (half / "kernel.cu").write_text("left by a builder that was killed")
    assert summary(output(machine.run(*GEMM))) == "2 built, 2 already there"
    assert_whole(machine, 4)
    assert machine.stats() | before == machine.stats()
    assert Counter(machine.compiled()) == Counter(
        [entry.name for entry in machine.cache.entries()] + keys_of(machine, 96)
    )
    assert_tidy(machine)  # the killed build's scratch is gone too
    assert_manifest_names_all(machine)


@pytest.mark.timeout(120)
def test_interrupted_build_keeps_finished_kernels(machine: BuildMachine) -> None:
    with blocked(machine, 96) as job:
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
        machine.let_nvcc_go()
    assert (job.returncode, err.strip()) == (130, "error: interrupted")
    assert len(out.splitlines()) == 4
    assert_whole(machine, 2)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    assert summary(output(machine.run(*GEMM))) == "2 built, 2 already there"


@pytest.mark.timeout(120)
def test_second_builder_waits_and_builds_nothing_twice(machine: BuildMachine) -> None:
    with blocked(machine, 64) as first:
        second = machine.start(*GEMM)
        assert second.stderr is not None
        assert second.stderr.readline() == (
            f"another builder is at work in {machine.cache.root}: waiting for it\n"
        )
        machine.let_nvcc_go()
        outputs = [job.communicate(timeout=60)[0].splitlines() for job in (first, second)]
    assert [job.returncode for job in (first, second)] == [0, 0]
    assert list(map(summary, outputs)) == ["4 built, 0 already there", "0 built, 4 already there"]
    assert sorted(machine.compiled()) == [entry.name for entry in machine.cache.entries()]
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)


@pytest.mark.timeout(120)
def test_waiting_builder_takes_over_when_the_first_is_killed(machine: BuildMachine) -> None:
    with blocked(machine, 64) as first:
        second = machine.start(*GEMM)
        assert second.stderr is not None
        assert second.stderr.readline().startswith("another builder is at work")
        first.send_signal(signal.SIGKILL)
        out, _ = second.communicate(timeout=60)
        machine.let_nvcc_go()
    assert second.returncode == 0
    assert summary(out.splitlines()) == "3 built, 1 already there"
    assert_whole(machine, 4)


def test_unwritable_cache_directory_is_a_one_line_error(machine: BuildMachine) -> None:
    (machine.root / "file").write_text("")
    below = machine.root / "file" / "dg"
    assert error_line(machine.run(*GEMM, "--cache-dir", str(below)), 2) == (
        f"cache directory {below} cannot be written (Not a directory): "
        "choose another with --cache-dir or DG_JIT_CACHE_DIR"
    )
    assert "cannot be written (Not a directory)" in error_line(
        machine.run(*GEMM, "--cache-dir", str(below.parent)), 2
    )
    assert machine.compiled() == []


def test_empty_cache_directory_is_refused(machine: BuildMachine) -> None:
    assert error_line(machine.run(*GEMM, "--cache-dir", ""), 2) == (
        "Invalid value for '--cache-dir': '' is not a path: it must not be empty"
    )
    assert machine.compiled() == []


def damage(entry: Path, how: str) -> None:
    cubin = entry / "kernel.cubin"
    if how == "a file instead":
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
        entry.write_text("")
    elif how in ("kernel.cu", "kernel.cubin"):
        (entry / how).unlink()
    elif how == "garbled":
        garbled = bytearray(cubin.read_bytes())
        garbled[0x3E] = 99  # the section of names
        cubin.write_bytes(garbled)
    elif how == "two kernels":
        two = tiny_cubin(b"code").replace(b".shstrtab", b".text.two")
        assert len(kernels_in(two)) == 2
        cubin.write_bytes(two)
    else:
        cut = {"cut": len(tiny_cubin(b"code")) // 2, "cut by one byte": -1, "emptied": 0}[how]
        cubin.write_bytes(cubin.read_bytes()[:cut])


DAMAGE = (
    "cut, cut by one byte, emptied, garbled, two kernels, kernel.cubin, kernel.cu, a file instead"
)


@pytest.mark.parametrize("how", DAMAGE.split(", "))
def test_compile_replaces_a_broken_entry(machine: BuildMachine, how: str) -> None:
    output(machine.run(*GEMM))
    (key, other) = keys_of(machine, 64, 32)
    damage(machine.cache.entry(key), how)
    kept = machine.cache.entry(other).stat()
    lines = output(machine.run(*GEMM))
    assert summary(lines) == "1 built, 1 of them in place of broken ones, 3 already there"
    assert machine.compiled()[4:] == [key]
    assert machine.cache.entry(other).stat().st_mtime_ns == kept.st_mtime_ns
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)


def test_compile_reports_failed_kernel_and_keeps_the_others(machine: BuildMachine) -> None:
    machine.tell_nvcc("broken", "^        64, ")
    done = machine.run(*GEMM)
    assert error_line(done, 1) == "1 of 4 kernels do not compile"
    lines = done.stdout.splitlines()
    assert summary(lines) == "3 built, 0 already there"
    assert lines[-1] == "failed: sm90_paged_mqa_logits_metadata: error: it is broken"
    assert_whole(machine, 3)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    (machine.root / "nvcc" / "broken").unlink()
    assert summary(output(machine.run(*GEMM))) == "1 built, 3 already there"


def test_check_compares_machine_code_with_plain_nvcc(machine: BuildMachine) -> None:
    lines = output(machine.run(*GEMM, "--check"))
    assert "building everything the plain way, to compare:" in lines
    assert lines[-1] == "all 4 kernels have the same machine code"
    assert Counter(Counter(machine.compiled()).values()) == {2: 4}
    (key,) = keys_of(machine, 64)
    (machine.cache.entry(key) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    (machine.cache.root / "manifest.json").unlink()  # which records the original digest
    done = machine.run(*GEMM, "--check")
    assert error_line(done, 1) == "1 of 4 kernels have other machine code"
    assert done.stdout.splitlines()[-1] == f"other machine code: {key}"
    assert list(machine.tmp.iterdir()) == []


def test_progress_prints_occasional_lines_if_not_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("runner.report.progress.time.monotonic", lambda: now[0])
    with progress("build") as show:
        for seconds, done, fraction in (
            (1, 1, 0.1),
            (6, 2, 0.25),
            (7, 3, 0.3),
            (8, 10, 0.9),
            (8, 10, 1.0),
        ):
            now[0] = 100.0 + seconds
            show(done, 10, fraction)
    assert capsys.readouterr().err.splitlines() == [
        "build: 2 of 10, 0.3/s, 18 s left",
        "build: 10 of 10, 1.2/s, 1 s left",
    ]


def test_build_continues_if_stderr_pipe_is_closed(machine: BuildMachine) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            machine.command(*GEMM),
            stdout=subprocess.PIPE,
            stderr=writing,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=machine.environment,
        )
    finally:
        os.close(writing)
    assert (done.returncode, summary(done.stdout.splitlines())) == (0, "4 built, 0 already there")


@pytest.mark.parametrize("spoil", ["kernel.cubin", "kernel.cu"])
def test_compile_rebuilds_entry_changed_since_it_was_built(
    machine: BuildMachine, spoil: str
) -> None:
    output(machine.run(*GEMM))
    (key,) = keys_of(machine, 64)
    file = machine.cache.entry(key) / spoil
    before = file.read_bytes()
    file.write_bytes(tiny_cubin(b"other") if spoil == "kernel.cubin" else before + b"//")
    lines = output(machine.run(*GEMM))
    assert summary(lines) == "1 built, 1 of them in place of broken ones, 3 already there"
    assert file.read_bytes() == before


def test_max_m_below_the_smallest_m_of_a_gemm_is_refused(machine: BuildMachine) -> None:
    spec = "grouped_gemm_nt_f8f8bf16_contig:1024:4096:8"  # its M are multiples of 128
    done = machine.run("--gemm", spec, "--max-m", "100")
    assert error_line(done, 2) == (
        "--max-m 100 must be at least 128 for grouped_gemm_nt_f8f8bf16_contig"
    )
    assert machine.compiled() == []


BAD_INPUT = {
    "--jobs 0": "0 is not in the range x>=1",
    "--jobs -3": "-3 is not in the range x>=1",
    "--jobs x": "'x' is not a valid integer",
    "--target-root opt/dg": (
        "--target-root opt/dg must be an absolute path: it is part of the key"
    ),
    "--cuda-version x": "--cuda-version 'x' must be X.Y, such as 13.0",
    "--cuda-version 13": "--cuda-version '13' must be X.Y, such as 13.0",
    "--cuda-version 13.0.88": "--cuda-version '13.0.88' must be X.Y, such as 13.0",
    "--cuda-version 11.8": "--cuda-version 11.8 is too old: 12.9 or newer is needed",
    "--cuda-version 12.8": "--cuda-version 12.8 is too old: 12.9 or newer is needed",
    "--cuda-version 12.9": "nvcc here is 13.0 but the target's is 12.9: build with the "
    "target's release, or build for an older one and run runner cache relocate",
    "--max-m 0": "--max-m 0 must lie in 1..1048576",
    "--num-sms 0": "'0' must be whole numbers from 1 on",
    "--num-sms many": "'many' must be whole numbers from 1 on",
    "--gemm nonsense": "type 'nonsense' is not known: use one of gemm_nt_f8f8bf16, ",
    "--gemm fp8_mqa_logits:16:128": "heads must be one of (32, 64)",
    "--nonsense": "No such option",
    "spare": "Got unexpected extra argument",
}


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=lambda text: text.replace(" ", "_"))
def test_invalid_option_is_one_line_and_exit_code_2(machine: BuildMachine, arguments: str) -> None:
    done = machine.run(*GEMM, *arguments.split())
    assert BAD_INPUT[arguments] in error_line(done, 2)
    assert machine.compiled() == []
    assert not machine.cache.root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-tokens 0", "max-tokens 0 must lie in 1..131072"),
        ("--model no/such.json", "no/such.json"),
        ("--decode-batch-sizes 0", "'0' must be whole numbers from 1 on"),
        ("--pp 0", "pp"),
        ("--without nonsense", "Invalid value for '--without'"),
        ("--disaggregation-mode both", "Invalid value for '--disaggregation-mode'"),
    ],
)
def test_invalid_deployment_options_are_refused(
    machine: BuildMachine, arguments: str, message: str
) -> None:
    assert message in error_line(machine.run(*arguments.split()), 2)
    assert not machine.cache.root.exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DG_JIT_NVCC_COMPILER", "/no/nvcc", "DG_JIT_NVCC_COMPILER=/no/nvcc is not a file"),
        ("DG_JIT_CPP_STANDARD", "new", "DG_JIT_CPP_STANDARD='new' is not an integer"),
        ("DG_JIT_NVCC_COMPILER", sys.executable, "--version prints no release: is it nvcc?"),
    ],
)
def test_invalid_environment_variables_are_refused(
    machine: BuildMachine, variable: str, value: str, message: str
) -> None:
    assert message in error_line(machine.run(*GEMM, **{variable: value}), 2)
    assert not machine.cache.root.exists()


def test_unknown_library_version_is_run_on_stand_in_gpu(machine: BuildMachine) -> None:
    """There are no built-in rules for it. The stand-in GPU then refuses torch of CUDA 12."""
    (machine.root / "deep_gemm" / "VERSION").write_text("9.9\n")
    (machine.root / "torch").mkdir()
    (machine.root / "torch" / "__init__.py").write_text("raise RuntimeError('not imported')\n")
    (machine.root / "torch" / "version.py").write_text("cuda = '12.8'\n")
    assert error_line(machine.run(*GEMM), 2) == (
        f"torch of {sys.executable} is built for CUDA 12.8: the stand-in GPU supports only CUDA 13"
    )
    assert machine.compiled() == []
    assert not machine.cache.root.exists()


def test_library_option_with_invalid_path_is_refused(machine: BuildMachine) -> None:
    nowhere = machine.root / "nowhere"
    assert error_line(machine.run(*GEMM, "--library", str(nowhere)), 2) == (
        f"--library {nowhere} is not DeepGEMM: it has no include/deep_gemm; give one of "
        "sgl-deep-gemm, deep_gemm, vllm, or the path of a deep_gemm folder"
    )
    assert not machine.cache.root.exists()


def test_library_option_accepts_a_path_and_puts_it_in_the_keys(machine: BuildMachine) -> None:
    other = machine.root / "other" / "deep_gemm"
    shutil.copytree(machine.root / "deep_gemm", other)
    output(machine.run(*GEMM, "--library", str(other)))
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert f"-I{other}/include" in manifest.flags.split(" ")
    assert_whole(machine, 4)


def test_compile_into_cache_for_different_target_is_refused(machine: BuildMachine) -> None:
    output(machine.run(*GEMM))
    before = machine.stats()
    assert error_line(machine.run(*GEMM, "--target-root", "/opt/dg"), 2) == (
        f"{machine.cache.root} was built for another machine (sgl-deep-gemm 0.1.4.post1, sm_90a, "
        "or another compiler, flags or path): use another directory"
    )
    assert machine.stats() == before
    assert len(machine.compiled()) == 4


def test_invalid_manifest_stops_the_build_before_it_starts(machine: BuildMachine) -> None:
    machine.cache.root.mkdir()
    (machine.cache.root / "manifest.json").write_text("{}")
    assert "is not a manifest" in error_line(machine.run(*GEMM), 2)
    assert machine.compiled() == []
