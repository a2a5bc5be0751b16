"""The nvcc shim, which records every compile in a log directory."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.kernels.describe import name_of_source
from runner.watch.shim import read_records, read_unfinished, write_shim

SOURCE = "// Includes' hash value: 00\n\nauto p = (&gemm_impl<\n    1\n>);\n\nint last;\n"


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    return tmp_path / "a log" / "of 'compiles'"


@pytest.fixture
def shim(tmp_path: Path, fake_nvcc: Path, log_dir: Path) -> Path:
    return write_shim(tmp_path / "nvcc", nvcc=fake_nvcc, log_dir=log_dir)


def run(shim: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run(
        [shim, *arguments], capture_output=True, text=True, check=False, env={**kept, **environment}
    )


def compile_with(
    shim: Path, directory: Path, source: str = SOURCE, **environment: str
) -> subprocess.CompletedProcess[str]:
    directory.mkdir(exist_ok=True)
    (directory / "kernel.cu").write_text(source)
    return run(
        shim,
        directory / "kernel.cu",
        "-cubin",
        "-o",
        directory / "kernel.cubin",
        "-O3",
        **environment,
    )


def test_version_query_is_passed_on_and_not_recorded(shim: Path, log_dir: Path) -> None:
    done = run(shim, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Cuda compilation tools, release 13.0, V13.0.88\n"
    assert list(log_dir.iterdir()) == []
    assert read_records(log_dir) == []


def test_shim_records_a_compile(shim: Path, log_dir: Path, tmp_path: Path) -> None:
    before = time.time()
    done = compile_with(shim, tmp_path / "k", RANK="5")
    after = time.time()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "k" / "kernel.cubin").read_text() == SOURCE
    (record,) = read_records(log_dir)
    assert (record.rank, record.pid, record.exit_code) == (5, os.getpid(), 0)
    assert record.source == SOURCE
    assert record.kernel_name == "gemm"
    assert before <= record.start <= record.end <= after


def test_rank_is_minus_1_if_not_set(shim: Path, log_dir: Path, tmp_path: Path) -> None:
    compile_with(shim, tmp_path / "k")
    assert [record.rank for record in read_records(log_dir)] == [-1]


def test_failed_compile_is_passed_on_and_recorded(
    shim: Path, log_dir: Path, tmp_path: Path
) -> None:
    done = compile_with(shim, tmp_path / "k", source="broken\n")
    assert (done.returncode, done.stderr) == (3, "error: it is broken\n")
    assert not (tmp_path / "k" / "kernel.cubin").exists()
    assert [(r.exit_code, r.source) for r in read_records(log_dir)] == [(3, "broken\n")]


def test_parallel_compiles_have_separate_records(shim: Path, log_dir: Path, tmp_path: Path) -> None:
    sources = [f"{SOURCE}// {rank}\n" * 200 for rank in range(20)]
    with ThreadPoolExecutor(20) as pool:
        codes = list(
            pool.map(
                lambda rank: (
                    compile_with(
                        shim, tmp_path / f"k{rank}", sources[rank], RANK=str(rank)
                    ).returncode
                ),
                range(20),
            )
        )
    assert codes == [0] * 20
    records = read_records(log_dir)
    assert sorted(record.rank for record in records) == list(range(20))
    assert all(record.source == sources[record.rank] for record in records)
    assert [record.start for record in records] == sorted(record.start for record in records)
    assert len(list(log_dir.iterdir())) == 20


def test_partly_written_records_are_ignored(shim: Path, log_dir: Path) -> None:
    (log_dir / "1.5-77.tmp").write_text("start 1.5\n")
    assert read_records(log_dir) == []


def test_compile_that_ends_while_being_read_is_not_unfinished(
    log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_dir.mkdir(parents=True)
    for name in ("1.5-77", "2.5-78"):
        (log_dir / f"{name}.running").write_text(
            f"start {name[:3]}\nend 0\nrank 1\npid 7\nexit -1\ncommand x\n\n"
        )
    read_text = Path.read_text

    def read(path: Path, **arguments: str) -> str:
        if path.stem == "1.5-77":
            path.unlink()
        return read_text(path, **arguments)

    monkeypatch.setattr(Path, "read_text", read)
    assert [record.start for record in read_unfinished(log_dir)] == [2.5]


def test_missing_log_directory_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "nowhere") == []


def test_compile_succeeds_if_log_directory_was_deleted(
    shim: Path, log_dir: Path, tmp_path: Path
) -> None:
    log_dir.rmdir()
    assert compile_with(shim, tmp_path / "k").returncode == 0
    assert (tmp_path / "k" / "kernel.cubin").is_file()


GROUPED = "&{}<\n 1, GemmType::{}\n>)"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("", "unknown"),
        ("int x = a<b>(c);", "unknown"),
        ("&transpose_fp32<\n    512, 64, 8\n    >);", "transpose_fp32"),
        ("&sched::sm90_paged_mqa_logits_metadata<1>)", "sm90_paged_mqa_logits_metadata"),
        (GROUPED.format("sm90_fp8_gemm_1d2d_impl", "Normal"), "sm90_fp8_gemm_1d2d"),
        (GROUPED.format("sm90_fp8_gemm_1d2d_impl", "Batched"), "sm90_fp8_gemm_1d2d"),
        (
            GROUPED.format("sm90_fp8_gemm_1d2d_impl", "MGroupedContiguous"),
            "sm90_m_grouped_fp8_gemm_contiguous_1d2d",
        ),
        (
            GROUPED.format("sm90_fp8_gemm_1d2d_impl", "MGroupedMasked"),
            "sm90_fp8_m_grouped_gemm_masked_1d2d",
        ),
        (
            GROUPED.format("sm90_bf16_gemm_impl", "MGroupedContiguous"),
            "sm90_m_grouped_bf16_gemm_contiguous",
        ),
        (
            GROUPED.format("sm90_bf16_gemm_impl", "MGroupedMasked"),
            "sm90_bf16_m_grouped_gemm_masked",
        ),
    ],
)
def test_name_of_source_is_the_librarys_kernel_name(source: str, name: str) -> None:
    assert name_of_source(source) == name
