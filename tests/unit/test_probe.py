"""The probe of a machine: always one kernel, and the median of its compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.build import probe
from runner.build.compiler import CompileError, NvccCompiler
from runner.build.probe import probe_seconds
from runner.cache.describe import name_of_source
from runner.cache.keys import first_recipe
from runner.cli import cli
from runner.config.environ import Environ
from runner.errors import run_guarded
from runner.kernels.installed import Library
from sim.costs.profile import load_profile

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources of the compiles, which take 5, 1, 2, 5, 1, 2, ... seconds."""
    found: list[str] = []
    clock = 0.0

    def compile_(self: NvccCompiler, source: Path, cubin: Path, folder: Path) -> None:
        nonlocal clock
        clock += (5.0, 1.0, 2.0)[len(found) % 3]
        found.append(source.read_text())

    monkeypatch.setattr(NvccCompiler, "compile", compile_)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock)
    return found


@pytest.fixture
def compiler(fake_nvcc: Path, library: Library) -> NvccCompiler:
    return NvccCompiler(fake_nvcc, library, first_recipe(Environ()))


def test_the_median_of_one_kernels_compiles(compiler: NvccCompiler, sources: list[str]) -> None:
    assert probe_seconds(compiler) == 2.0
    assert len(sources) == 3
    assert len(set(sources)) == 1
    assert name_of_source(sources[0]) == "sm90_fp8_gemm_1d2d"
    assert probe_seconds(compiler, 1) == 5.0


def test_a_compiler_that_refuses(compiler: NvccCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("broken")

    monkeypatch.setattr(NvccCompiler, "compile", refuse)
    with pytest.raises(CompileError, match="broken"):
        probe_seconds(compiler)


def test_the_command(
    fake_nvcc: Path,
    library: Library,
    sources: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr("runner.cli.probe.find_nvcc", lambda environ: fake_nvcc)
    assert run_guarded(cli, ["probe", "--repeats", "4"], program="runner") == 0
    known = load_profile("h200").probe.seconds
    # 5, 1, 2 and 5 s: their median is 3.5 s.
    assert capsys.readouterr().out.splitlines() == [
        f"reference kernel: 3.50 s here, {known:.2f} s for h200",
        f"--host-factor {3.5 / known:.2f}",
    ]


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("find_nvcc", "there is no nvcc: pip install 'deepgemm-coldstart[nvcc]'"),
        (
            "find_library",
            "the reference kernel needs the headers of the version that profiles were measured "
            "with: pip install --no-deps sgl-deep-gemm==0.1.4.post1",
        ),
    ],
)
def test_what_is_missing_is_one_line(
    missing: str, line: str, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.probe.find_nvcc", lambda environ: fake_nvcc)
    monkeypatch.setattr(f"runner.cli.probe.{missing}", lambda *_: None)
    assert run_guarded(cli, ["probe"], program="runner") == 2
    assert capsys.readouterr().err == f"error: {line}\n"
