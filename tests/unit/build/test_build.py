"""The builder, with a toolchain of scripts and with a real nvcc."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from runner.build.build import Builder, Built, Way
from runner.build.compiler import NvccCompiler
from runner.build.cubin import kernels_in
from runner.build.cut import cut_units
from runner.build.unit import Job, entry_signature, signature
from runner.cache.keys import first_recipe
from runner.config.environ import Environ
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.rules_sm90 import kernels_of, transpose_fp32
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


FIVE = [
    gemm("1, 2"),
    gemm("3, 4"),
    gemm("3, 5"),
    gemm("1", entry="metadata"),
    gemm("1, 2", "float", header="deep_gemm/c.cuh"),
]


def test_the_fast_way(tmp_path: Path, toolchain: Path, fake_library: Library) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
    jobs = [job_of(kernel, compiler.keys) for kernel in FIVE]
    shared: Shared = []
    fast = build(compiler, tmp_path / "fast", jobs, shared=shared)
    units = len(cut_units(jobs, 2))
    assert calls(toolchain) == {"cpp": 2, "cicc": units, "ptxas": 5}
    assert {(built.way, built.words) for built in fast.values()} == {(Way.FAST, "")}
    assert Counter(name.partition(" of ")[0] for name, _, _ in shared) == {
        "preprocess deep_gemm/a.cuh": 1,
        "preprocess deep_gemm/c.cuh": 1,
        "front end": units,
    }
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
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
    jobs, steps = [job_of(kernel) for kernel in FIVE], []
    build(
        compiler,
        tmp_path / "scratch",
        jobs,
        workers=1,
        fast=fast,
        on_step=lambda *step: steps.append(step),
    )
    done = [step[0] for step in steps]
    assert done == sorted(set(done)) and done[0] > 0
    assert steps[-1][0] == pytest.approx(steps[-1][1])
    if fast:
        assert len({expected for _, expected in steps}) == 1


def test_nothing_to_build(tmp_path: Path, toolchain: Path, fake_library: Library) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
    for fast in (True, False):
        assert build(compiler, tmp_path / f"scratch{fast}", [], fast=fast) == {}
    assert not (toolchain / "log").exists()


def test_one_wrong_kernel_fails_alone(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
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
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
    jobs = [job_of(kernel) for kernel in (gemm("1, 2, 3"), gemm("4"), odd)]
    assert len(cut_units(jobs, 1)) == 1
    built = build(compiler, tmp_path / "scratch", jobs, workers=1)
    assert Counter((item.way, item.words) for item in built.values()) == Counter(
        {(Way.FAST, ""): 3 - plain, (Way.PLAIN, reason): plain}
        if plain < 3
        else {(Way.PLAIN, reason): plain}
    )
    assert built[odd].way is Way.PLAIN
    assert None not in map(code_of, built.values())
    assert calls(toolchain)["nvcc"] == plain


def test_a_header_that_cannot_be_preprocessed(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
    odd = gemm("1", header="deep_gemm/unreadable.cuh")
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1")), job_of(odd)])
    assert (built[odd].way, built[odd].words) == (Way.PLAIN, "cpp: fatal: not this one")
    assert built[gemm("1")].way is Way.FAST


def test_an_nvcc_that_tells_no_stages(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
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
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
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
    compiler = NvccCompiler(Path("toolchain/nvcc"), fake_library, first_recipe(Environ()))
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1"))])
    assert built[gemm("1")].way is Way.FAST


def test_a_stage_that_cannot_be_run_goes_the_plain_way(
    tmp_path: Path, toolchain: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(toolchain / "nvcc", fake_library, first_recipe(Environ()))
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
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    silent = gemm("9", "silent")
    built = build(compiler, tmp_path / "scratch", [job_of(gemm("1")), job_of(silent)])
    failed = built.pop(silent)
    assert (failed.cubin, failed.way, failed.words) == (None, Way.PLAIN, "nvcc wrote no cubin")
    assert [item.words for item in built.values()] == [NO_COMMAND]


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
