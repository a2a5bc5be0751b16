"""``runner compile``: what it builds, what it leaves, and how it goes on."""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.cli.progress import progress
from runner.environ import Environ
from runner.errors import UserError
from runner.gemm_spec import gemm_demands
from runner.jit import prebuild as prebuild_module
from runner.jit.cache import KernelCache
from runner.jit.compiler import NvccCompiler
from runner.jit.cubin import kernels_in
from runner.jit.library import Library
from runner.jit.plan import Plan, make_plan
from runner.jit.prebuild import BuildOrder, BuildStoppedError, prebuild
from runner.jit.store.manifest import Manifest, read_manifest, sha256
from tests.unit.elf import tiny_cubin

REPOSITORY = Path(__file__).parents[2]
SPEC = "paged_mqa_logits_metadata:1:1"
GEMM = ("--gemm", SPEC, "--max-m", "128")
"""Four kernels of one header, for 32, 64, 96 and 128 rows; in that order with one job."""
REASON = "nvcc --dryrun: no dry runs here"

NVCC = """#!/bin/sh
here={here}
if [ "$1" = --version ]; then
    echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0
fi
for word; do
    if [ "$word" = --dryrun ]; then echo "no dry runs here" >&2; exit 1; fi
done
key=$(basename "$(dirname "$1")")
echo "$key" >>"$here/log"
if [ -e "$here/block" ] && grep -q -f "$here/block" "$1"; then
    echo "$key" >"$here/ready"
    read -r _ <"$here/go"
fi
if [ -e "$here/broken" ] && grep -q -f "$here/broken" "$1"; then
    echo "error: it is broken" >&2; exit 3
fi
cp "$here/kernel.cubin" "$4"
"""


@dataclass(frozen=True)
class Machine:
    """A build machine: a fake nvcc in ``nvcc``, a fake library, an empty folder for scratch."""

    root: Path

    @property
    def cache(self) -> KernelCache:
        return KernelCache(self.root / "dg")

    @property
    def tmp(self) -> Path:
        return self.root / "scratch"

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "SGL", "NVCC_"))}
        return {
            **clean,
            "DG_JIT_NVCC_COMPILER": str(self.root / "nvcc" / "nvcc"),
            "DG_JIT_CACHE_DIR": str(self.cache.root),
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.tmp),
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "runner", "compile", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=120, check=False,
            cwd=REPOSITORY, env={**self.environment, **environment},
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=self.environment,
        )  # fmt: skip

    def compiled(self) -> list[str]:
        """Keys that nvcc was run for, in order."""
        path = self.root / "nvcc" / "log"
        return path.read_text().split() if path.exists() else []

    def tell_nvcc(self, word: str, pattern: str) -> None:
        """Let nvcc ``block`` at, or call ``broken``, sources that hold a pattern."""
        (self.root / "nvcc" / word).write_text(f"{pattern}\n")

    def wait_for_nvcc(self) -> str:
        """The key at which nvcc blocks."""
        return (self.root / "nvcc" / "ready").read_text().strip()

    def let_nvcc_go(self) -> None:
        (self.root / "nvcc" / "go").write_text("go\n")

    def leave_no_nvcc(self) -> None:
        """Let an nvcc go that still blocks, if there is one."""
        with suppress(OSError):  # nobody reads
            os.close(os.open(self.root / "nvcc" / "go", os.O_WRONLY | os.O_NONBLOCK))

    def stats(self) -> dict[str, tuple[int, int]]:
        """Inode and time of every file of every entry: they tell whether one was touched."""
        files = [path for entry in self.cache.entries() for path in entry.iterdir()]
        return {
            f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in files
        }


@pytest.fixture
def machine(tmp_path: Path, fake_library: Library) -> Machine:
    (fake_library.root / "VERSION").write_text("0.1.4.post1\n")
    (fake_library.root / "__init__.py").write_text("raise RuntimeError('importing needs CUDA')\n")
    headers = fake_library.include_path / "deep_gemm"
    for name in ("scheduler/sm90_paged_mqa_logits.cuh", "impls/smxx_layout.cuh",
                 "impls/sm90_fp8_gemm_1d2d.cuh"):  # fmt: skip
        (headers / name).parent.mkdir(exist_ok=True)
        (headers / name).write_text("#include <deep_gemm/b.cuh>\n")
    made = Machine(tmp_path)
    made.tmp.mkdir()
    folder = tmp_path / "nvcc"
    folder.mkdir()
    (folder / "nvcc").write_text(NVCC.format(here=folder))
    (folder / "nvcc").chmod(0o755)
    (folder / "kernel.cubin").write_bytes(tiny_cubin(b"code"))
    os.mkfifo(folder / "ready")
    os.mkfifo(folder / "go")
    return made


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on standard error that begins with ``error:``."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def output(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def summary(lines: list[str]) -> str:
    (line,) = [line for line in lines if " were there; " in line]
    return line.partition(";")[0]


def rows_of(entry: Path) -> int:
    source = (entry / "kernel.cu").read_text()
    return int(source.partition("metadata<\n")[2].partition(",")[0])


def keys_of(machine: Machine, *rows: int) -> list[str]:
    """Keys of the planned kernels with these numbers of rows."""
    found = {rows_of(entry): entry.name for entry in machine.cache.entries()}
    return [found[row] for row in rows]


def assert_whole(machine: Machine, count: int) -> None:
    entries = machine.cache.entries()
    assert len(entries) == count
    for entry in entries:
        assert sorted(path.name for path in entry.iterdir()) == ["kernel.cu", "kernel.cubin"]
        assert kernels_in((entry / "kernel.cubin").read_bytes()) == {"kernel": b"code"}
        assert "__instantiate_kernel" in (entry / "kernel.cu").read_text()


def assert_tidy(machine: Machine) -> None:
    assert list((machine.cache.root / "tmp").iterdir()) == []
    assert list(machine.tmp.iterdir()) == []


def assert_manifest_names_all(machine: Machine) -> None:
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert sorted(manifest.entries) == [entry.name for entry in machine.cache.entries()]
    for key, entry in manifest.entries.items():
        folder = machine.cache.entry(key)
        assert entry.name == "sm90_paged_mqa_logits_metadata"
        assert entry.source_sha256 == sha256((folder / "kernel.cu").read_bytes())
        assert entry.cubin_sha256 == sha256((folder / "kernel.cubin").read_bytes())
        assert entry.cubin_bytes == len((folder / "kernel.cubin").read_bytes())
        rows = rows_of(folder)
        assert [use["m_ranges"] for use in entry.uses] == [[[rows - 31, rows]]]


def test_each_planned_kernel_is_built_once(machine: Machine) -> None:
    lines = output(machine.run(*GEMM))
    assert lines[:2] == [f"{SPEC}: M up to 128, 132 SMs", f"4 kernels -> {machine.cache.root}"]
    assert summary(lines) == "4 built, 0 were there"
    assert lines[-1] == f"4 built the plain way: {REASON}"
    names = [entry.name for entry in machine.cache.entries()]
    assert sorted(machine.compiled()) == names
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    before = machine.stats()
    lines = output(machine.run(*GEMM))
    assert summary(lines) == "0 built, 4 were there"
    assert len(lines) == 3
    assert machine.stats() == before
    assert sorted(machine.compiled()) == names


def test_another_plan_adds_to_the_cache(machine: Machine) -> None:
    output(machine.run("--gemm", SPEC, "--max-m", "64", "--plain"))
    lines = output(machine.run(*GEMM, "--plain"))
    assert summary(lines) == "2 built, 2 were there"
    assert len(lines) == 3  # nothing about the plain way, which was asked for
    assert len(machine.compiled()) == 4
    assert_manifest_names_all(machine)
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert manifest.plans == [f"{SPEC}: M up to {m}, 132 SMs" for m in (64, 128)]


def test_the_cache_of_the_option_comes_before_the_environments(machine: Machine) -> None:
    chosen = machine.root / "chosen"
    lines = output(machine.run(*GEMM, "--cache-dir", str(chosen)))
    assert lines[1] == f"4 kernels -> {chosen}"
    assert KernelCache(chosen).count() == 4
    assert not machine.cache.root.exists()


def test_keys_are_the_targets(machine: Machine) -> None:
    output(machine.run(*GEMM, "--target-root", "/opt/dg", "--cuda-version", "13.0"))
    library = Library(machine.root / "deep_gemm")
    there = NvccCompiler(Path("nvcc"), Library(Path("/opt/dg")), Environ()).flags
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert (manifest.flags, manifest.signature) == (there, "NVCC13.0")
    assert manifest.built_with == "NVCC13.0"
    here = NvccCompiler(machine.root / "nvcc" / "nvcc", library, Environ()).keys
    ours = {here.cache_key(item.kernel) for item in plan().kernels}
    assert ours.isdisjoint(entry.name for entry in machine.cache.entries())


@contextmanager
def blocked(machine: Machine, rows: int) -> Iterator[subprocess.Popen[str]]:
    """A build that is at the kernel with so many rows, certainly."""
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
def test_a_killed_build_goes_on(machine: Machine) -> None:
    with blocked(machine, 96) as job:
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        machine.let_nvcc_go()  # an orphan by now
    assert_whole(machine, 2)
    assert read_manifest(machine.cache.root) is None
    before, half = machine.stats(), machine.cache.root / "tmp" / "build-4711-half"
    half.mkdir()
    (half / "kernel.cu").write_text("left by a builder that was killed")
    assert summary(output(machine.run(*GEMM))) == "2 built, 2 were there"
    assert_whole(machine, 4)
    assert machine.stats() | before == machine.stats()
    assert Counter(machine.compiled()) == Counter(
        [entry.name for entry in machine.cache.entries()] + keys_of(machine, 96)
    )
    assert list((machine.cache.root / "tmp").iterdir()) == []
    assert_manifest_names_all(machine)


@pytest.mark.timeout(120)
def test_the_scratch_of_a_killed_build_goes_with_the_next(machine: Machine) -> None:
    with blocked(machine, 96) as job:
        job.send_signal(signal.SIGKILL)
        job.wait()
        machine.let_nvcc_go()
    output(machine.run(*GEMM))
    assert list(machine.tmp.iterdir()) == []


@pytest.mark.timeout(120)
def test_an_interrupted_build_keeps_what_it_has(machine: Machine) -> None:
    with blocked(machine, 96) as job:
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
        machine.let_nvcc_go()
    assert (job.returncode, err.strip()) == (130, "error: interrupted")
    assert len(out.splitlines()) == 2
    assert_whole(machine, 2)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    assert summary(output(machine.run(*GEMM))) == "2 built, 2 were there"


@pytest.mark.timeout(120)
def test_two_builders_share_the_work(machine: Machine) -> None:
    with blocked(machine, 64) as first:
        second = machine.start(*GEMM)
        assert second.stderr is not None
        assert second.stderr.readline() == (
            f"another builder is at work in {machine.cache.root}: waiting for it\n"
        )
        machine.let_nvcc_go()
        outputs = [job.communicate(timeout=60)[0].splitlines() for job in (first, second)]
    assert [job.returncode for job in (first, second)] == [0, 0]
    assert list(map(summary, outputs)) == ["4 built, 0 were there", "0 built, 4 were there"]
    assert sorted(machine.compiled()) == [entry.name for entry in machine.cache.entries()]
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)


@pytest.mark.timeout(120)
def test_a_builder_takes_over_from_a_killed_one(machine: Machine) -> None:
    with blocked(machine, 64) as first:
        second = machine.start(*GEMM)
        assert second.stderr is not None
        assert second.stderr.readline().startswith("another builder is at work")
        first.send_signal(signal.SIGKILL)
        out, _ = second.communicate(timeout=60)
        machine.let_nvcc_go()
    assert second.returncode == 0
    assert summary(out.splitlines()) == "3 built, 1 were there"
    assert_whole(machine, 4)


def test_a_cache_that_cannot_be_made(machine: Machine) -> None:
    (machine.root / "file").write_text("")
    below = machine.root / "file" / "dg"
    assert error_line(machine.run(*GEMM, "--cache-dir", str(below)), 2) == (
        f"cache directory {below} cannot be written (Not a directory): "
        "choose another with --cache-dir or DG_JIT_CACHE_DIR"
    )
    assert "is a file" in error_line(machine.run(*GEMM, "--cache-dir", str(below.parent)), 2)
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
    else:
        cut = {"cut": len(tiny_cubin(b"code")) // 2, "cut by one byte": -1, "emptied": 0}[how]
        cubin.write_bytes(cubin.read_bytes()[:cut])


@pytest.mark.parametrize(
    "how", ["cut", "cut by one byte", "emptied", "kernel.cubin", "kernel.cu", "a file instead"]
)
def test_a_broken_entry_is_replaced(machine: Machine, how: str) -> None:
    output(machine.run(*GEMM))
    (key, other) = keys_of(machine, 64, 32)
    damage(machine.cache.entry(key), how)
    kept = machine.cache.entry(other).stat()
    lines = output(machine.run(*GEMM))
    assert summary(lines) == "1 built, 1 of them in place of broken ones, 3 were there"
    assert machine.compiled()[4:] == [key]
    assert machine.cache.entry(other).stat().st_mtime_ns == kept.st_mtime_ns
    assert_whole(machine, 4)
    assert_manifest_names_all(machine)
    assert_tidy(machine)


def test_an_entry_of_two_kernels_is_replaced(machine: Machine) -> None:
    output(machine.run(*GEMM))
    (key,) = keys_of(machine, 64)
    two = tiny_cubin(b"code").replace(b".shstrtab", b".text.two")
    assert len(kernels_in(two)) == 2
    (machine.cache.entry(key) / "kernel.cubin").write_bytes(two)
    assert summary(output(machine.run(*GEMM))).startswith("1 built")


def test_a_garbled_entry_is_replaced(machine: Machine) -> None:
    output(machine.run(*GEMM))
    (key,) = keys_of(machine, 64)
    cubin = bytearray(tiny_cubin(b"code"))
    cubin[0x3E] = 99  # the section of names
    (machine.cache.entry(key) / "kernel.cubin").write_bytes(cubin)
    assert summary(output(machine.run(*GEMM))).startswith("1 built, 1 of them in place of broken")


def test_a_kernel_that_does_not_compile(machine: Machine) -> None:
    machine.tell_nvcc("broken", "^        64, ")
    done = machine.run(*GEMM)
    assert error_line(done, 1) == "1 of 4 kernels do not compile"
    lines = done.stdout.splitlines()
    assert summary(lines) == "3 built, 0 were there"
    assert lines[-1] == "failed: sm90_paged_mqa_logits_metadata: error: it is broken"
    assert_whole(machine, 3)
    assert_manifest_names_all(machine)
    assert_tidy(machine)
    (machine.root / "nvcc" / "broken").unlink()
    assert summary(output(machine.run(*GEMM))) == "1 built, 3 were there"


def test_check_compares_with_the_plain_way(machine: Machine) -> None:
    lines = output(machine.run(*GEMM, "--check"))
    assert "the plain way, to compare:" in lines
    assert lines[-1] == "all 4 kernels have the same machine code"
    assert Counter(Counter(machine.compiled()).values()) == {2: 4}
    (key,) = keys_of(machine, 64)
    (machine.cache.entry(key) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    done = machine.run(*GEMM, "--check")
    assert error_line(done, 1) == "1 of 4 kernels have other machine code"
    assert done.stdout.splitlines()[-1] == f"other machine code: {key}"
    assert list(machine.tmp.iterdir()) == []


def test_progress_elsewhere_than_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("runner.cli.progress.time.monotonic", lambda: now[0])
    with progress("build") as show:
        for seconds, done, fraction in (
            (1, 1, 0.1), (6, 2, 0.25), (7, 3, 0.3), (8, 10, 0.9), (8, 10, 1.0),
        ):  # fmt: skip
            now[0] = 100.0 + seconds
            show(done, 10, fraction)
    assert capsys.readouterr().err.splitlines() == [
        "build: 2 of 10, 0.3/s, 18 s left",
        "build: 10 of 10, 1.2/s, 1 s left",
    ]


def test_a_build_goes_on_where_nobody_reads_its_progress(machine: Machine) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            machine.command(*GEMM), stdout=subprocess.PIPE, stderr=writing, text=True, check=False,
            cwd=REPOSITORY, env=machine.environment,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, summary(done.stdout.splitlines())) == (0, "4 built, 0 were there")


def test_progress_ends_with_all(machine: Machine) -> None:
    done = machine.run(*GEMM)
    assert [line for line in done.stderr.splitlines() if line.startswith("compile: 4 of 4, ")]


@pytest.mark.parametrize("jobs", ["1", "2", "64"])
def test_any_number_of_jobs(machine: Machine, jobs: str) -> None:
    assert summary(output(machine.run(*GEMM, "--jobs", jobs))) == "4 built, 0 were there"
    assert len(machine.compiled()) == 4


def test_no_kernels(machine: Machine) -> None:
    spec = "grouped_gemm_nt_f8f8bf16_contig:1024:4096:8"  # its M are multiples of 128
    lines = output(machine.run("--gemm", spec, "--max-m", "100"))
    assert summary(lines) == "0 built, 0 were there"
    assert machine.compiled() == []


BAD_INPUT = {
    "--jobs 0": "--jobs 0 must be at least 1",
    "--jobs -3": "--jobs -3 must be at least 1",
    "--jobs x": "'x' is not a valid integer",
    "--target-root opt/dg": ("--target-root opt/dg must be an absolute path: the key holds it"),
    "--cuda-version x": "--cuda-version 'x' must be X.Y, such as 13.0",
    "--cuda-version 13": "--cuda-version '13' must be X.Y, such as 13.0",
    "--cuda-version 13.0.88": "--cuda-version '13.0.88' must be X.Y, such as 13.0",
    "--cuda-version 11.8": "--cuda-version 11.8 is too old: 12.9 or newer is needed",
    "--cuda-version 12.8": "--cuda-version 12.8 is too old: 12.9 or newer is needed",
    "--cuda-version 12.9": "nvcc here is NVCC13.0 and the target's is NVCC12.9: build with the "
    "target's release, or with an older one and relocate (runner cache relocate --cuda-version)",
    "--max-m 0": "--max-m 0 must lie in 1..1048576",
    "--num-sms 0": "--num-sms 0 must lie in 1..1024",
    "--num-sms many": "'many' is not a list of integers",
    "--gemm nonsense": "type 'nonsense' is not known: use one of gemm_nt_f8f8bf16, ",
    "--gemm fp8_mqa_logits:16:128": "heads must be one of (32, 64)",
    "--nonsense": "No such option",
    "spare": "Got unexpected extra argument",
}


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=lambda text: text.replace(" ", "_"))
def test_bad_input_is_one_line_and_exit_code_2(machine: Machine, arguments: str) -> None:
    done = machine.run(*GEMM, *arguments.split())
    assert BAD_INPUT[arguments] in error_line(done, 2)
    assert machine.compiled() == []
    assert not machine.cache.root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-tokens 0", "max-tokens 0 must lie in 1..131072"),
        ("--model no/such.json", "no/such.json"),
        ("--decode-batch-sizes 0", "decode batch sizes 0 must lie in 1..131072"),
        ("--pp 0", "pp"),
        ("--without nonsense", "Invalid value for '--without'"),
        ("--disaggregation-mode both", "Invalid value for '--disaggregation-mode'"),
    ],
)
def test_bad_deployments(machine: Machine, arguments: str, message: str) -> None:
    assert message in error_line(machine.run(*arguments.split()), 2)
    assert not machine.cache.root.exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DG_JIT_NVCC_COMPILER", "/no/nvcc", "DG_JIT_NVCC_COMPILER=/no/nvcc is not a file"),
        ("DG_JIT_CPP_STANDARD", "new", "DG_JIT_CPP_STANDARD='new' is not an integer"),
        ("DG_JIT_NVCC_COMPILER", sys.executable, "--version names no release: is it nvcc?"),
    ],
)
def test_bad_environments(machine: Machine, variable: str, value: str, message: str) -> None:
    assert message in error_line(machine.run(*GEMM, **{variable: value}), 2)
    assert not machine.cache.root.exists()


def test_a_library_of_another_version(machine: Machine) -> None:
    (machine.root / "deep_gemm" / "VERSION").write_text("9.9\n")
    assert error_line(machine.run(*GEMM), 2).startswith("deep_gemm 9.9 on sm_90a is not known")


def test_a_cache_of_another_target_refuses(machine: Machine) -> None:
    output(machine.run(*GEMM))
    before = machine.stats()
    assert error_line(machine.run(*GEMM, "--target-root", "/opt/dg"), 2) == (
        f"{machine.cache.root} was built for another machine (NVCC13.0, "
        "sgl-deep-gemm 0.1.4.post1, other flags or path): use another directory"
    )
    assert machine.stats() | before == machine.stats()
    assert summary(output(machine.run(*GEMM))) == "0 built, 4 were there"


def test_a_cache_of_another_target_gets_none_of_its_kernels(machine: Machine) -> None:
    output(machine.run(*GEMM))
    before = machine.stats()
    error_line(machine.run(*GEMM, "--target-root", "/opt/dg"), 2)
    assert machine.stats() == before
    assert len(machine.compiled()) == 4


def test_a_file_that_is_no_manifest_stops_the_build_before_it_begins(machine: Machine) -> None:
    machine.cache.root.mkdir()
    (machine.cache.root / "manifest.json").write_text("{}")
    assert "is not a manifest" in error_line(machine.run(*GEMM), 2)
    assert machine.compiled() == []


# Within this process: what a disk can do.


def plan() -> Plan:
    return make_plan(gemm_demands(SPEC, max_m=128, num_sms=132))


def order_for(machine: Machine) -> BuildOrder:
    library = Library(machine.root / "deep_gemm")
    compiler = NvccCompiler(machine.root / "nvcc" / "nvcc", library, Environ())
    return BuildOrder(plan(), "four", compiler.keys, compiler, machine.cache, 1, dict(os.environ))


Add = Callable[..., bool]


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    add: Add = KernelCache.add
    added: list[str] = []

    def limited(self: KernelCache, key: str, *arguments: Any, **options: Any) -> bool:
        if len(added) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        added.append(key)
        return add(self, key, *arguments, **options)

    monkeypatch.setattr(KernelCache, "add", limited)


def test_a_full_disk_keeps_what_was_built(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as limited:
        fill_disk_after(limited, 2)
        with pytest.raises(BuildStoppedError) as caught:
            prebuild(order_for(machine))
    assert str(caught.value) == (
        "the build stopped after 2 of 4 kernels: No space left on device; "
        "what was built is kept, run it again to go on"
    )
    assert_whole(machine, 2)
    assert_manifest_names_all(machine)
    report = prebuild(order_for(machine))
    assert (report.planned, report.present, report.built, report.failed) == (4, 2, 2, [])
    assert_whole(machine, 4)


def test_a_disk_too_full_for_the_manifest(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill_disk_after(monkeypatch, 2)
    monkeypatch.setattr(prebuild_module, "merge_manifest", full)
    with pytest.raises(BuildStoppedError, match="No space left on device"):
        prebuild(order_for(machine))


def test_a_lock_that_cannot_be_opened(machine: Machine) -> None:
    (machine.cache.root / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/dg: Is a directory$"):
        prebuild(order_for(machine))


def test_progress_that_cannot_be_shown_does_not_end_a_build_in_silence(machine: Machine) -> None:
    def broken(done: int, total: int, fraction: float) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(BuildStoppedError, match=r" of 4 kernels: Broken pipe; "):
        prebuild(order_for(machine), progress=broken)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size; skips where mounting is not possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def build_on_small_disk(machine: Machine, disk: Path) -> Manifest | None:
    """Two of four kernels fit: what the build says, what it leaves, and its manifest."""
    (machine.root / "nvcc" / "kernel.cubin").write_bytes(tiny_cubin(bytes(100_000)))
    cache = KernelCache(disk / "dg")
    done = machine.run(*GEMM, "--cache-dir", str(cache.root), "--jobs", "1")
    for entry in cache.entries():
        assert kernels_in((entry / "kernel.cubin").read_bytes()) == {"kernel": bytes(100_000)}
    assert cache.count() == 2
    assert list((cache.root / "tmp").iterdir()) == []
    assert error_line(done, 1) == (
        "the build stopped after 2 of 4 kernels: No space left on device; "
        "what was built is kept, run it again to go on"
    )
    return read_manifest(cache.root)


def test_a_really_full_disk(machine: Machine) -> None:
    with small_disk(machine.root / "disk", "300k") as disk:
        manifest = build_on_small_disk(machine, disk)
        assert manifest is not None
        assert sorted(manifest.entries) == [
            path.name for path in KernelCache(disk / "dg").entries()
        ]


def test_a_disk_that_two_kernels_fill(machine: Machine) -> None:
    page = 4  # a kernel is a page of source and 25 of machine code
    with small_disk(machine.root / "disk", f"{2 * 26 * page}k") as disk:
        assert build_on_small_disk(machine, disk) is None
