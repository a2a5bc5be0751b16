"""nvcc: its flags, cache keys of JIT generation 1, single compiles, and where nvcc is found."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.loaders import OwnJit
from runner.build import compiler as compiler_module
from runner.build.compiler import CompileError, NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.cli import cli
from runner.config.environ import Environ
from runner.errors import UserError, run_guarded
from runner.kernels.describe import name_of_source
from runner.kernels.digest import hex_digest
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.keys import first_recipe
from runner.kernels.nvcc import find_nvcc
from runner.kernels.rules import RULES, transpose_fp32
from runner.watch.shim import read_records, write_shim
from sim.costs.profile import load_profile

BEFORE_INCLUDE = (
    "-std=c++20 --diag-suppress=39,161,174,177,186,940 --ptxas-options=--register-usage-level=10"
)
AFTER_INCLUDE = (
    "--gpu-architecture=sm_90a "
    "--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi "
    "-O3 --expt-relaxed-constexpr --expt-extended-lambda"
)
VERBOSE = "--ptxas-options=--verbose,--warn-on-local-memory-usage"
KERNEL = Kernel("gemm", "deep_gemm/a.cuh", "gemm_impl", ("1, 2",))


def flags(**values: Any) -> str:
    library = Library(Path("/opt/dg"))
    compiler = NvccCompiler(Path("nvcc"), library, first_recipe(Environ(**values)))
    return " ".join(compiler.arguments)


def write_nvcc(path: Path, answer: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def test_default_nvcc_flags() -> None:
    assert flags() == f"{BEFORE_INCLUDE} -I/opt/dg/include {AFTER_INCLUDE}"


def test_environment_variables_change_nvcc_flags() -> None:
    plain = f"-I/opt/dg/include {AFTER_INCLUDE}"
    assert flags(dg_jit_cpp_standard=17).startswith("-std=c++17 ")
    for name in ("dg_jit_debug", "dg_jit_ptxas_verbose", "dg_jit_ptxas_check"):
        assert flags(**{name: 1}) == f"{BEFORE_INCLUDE} {VERBOSE} {plain}"
    assert flags(dg_jit_with_lineinfo=1) == (
        f"{BEFORE_INCLUDE} -Xcompiler -rdynamic -lineinfo {plain}"
    )
    assert flags(dg_jit_debug=1, dg_jit_ptxas_check=1, dg_jit_with_lineinfo=1) == (
        f"{BEFORE_INCLUDE} {VERBOSE} -Xcompiler -rdynamic -lineinfo {plain}"
    )


def test_source_starts_with_the_hash_of_its_headers(fake_nvcc: Path, fake_library: Library) -> None:
    def of_file(name: str, children: str) -> str:
        text = (fake_library.include_path / "deep_gemm" / name).read_text()
        return hex_digest(f"{children}#{hex_digest(text)}")

    headers = hex_digest(of_file("a.cuh", of_file("b.cuh", "") + "$") + "$")
    source = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ())).keys.source(KERNEL)
    assert source == (
        f"// Includes' hash value: {headers}\n"
        "\n#include <deep_gemm/a.cuh>\n"
        "\nusing namespace deep_gemm;\n"
        "\nstatic void __instantiate_kernel() {\n"
        "    auto ptr = reinterpret_cast<void*>(&gemm_impl<\n"
        "        1, 2\n"
        "    >);\n"
        "};\n"
    )


def test_cache_key_is_the_digest_of_name_signature_flags_and_source(
    fake_nvcc: Path, fake_library: Library
) -> None:
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    assert compiler.keys.flags == " ".join(compiler.arguments)
    text = f"gemm$$NVCC13.0$${compiler.keys.flags}$${compiler.keys.source(KERNEL)}"
    assert compiler.keys.cache_key(KERNEL) == f"kernel.gemm.{hex_digest(text)}"


def test_cache_key_changes_with_the_include_path(fake_nvcc: Path, fake_library: Library) -> None:
    copy = fake_library.root.with_name("elsewhere")
    shutil.copytree(fake_library.root, copy)
    here = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    there, again = (
        NvccCompiler(fake_nvcc, Library(copy), first_recipe(Environ())) for _ in range(2)
    )
    assert here.keys.source(KERNEL) == there.keys.source(KERNEL)
    assert here.keys.cache_key(KERNEL) != there.keys.cache_key(KERNEL)
    assert again.keys.cache_key(KERNEL) == there.keys.cache_key(KERNEL)


def key_with(nvcc: Path, library: Library, kernel: Kernel = KERNEL, **environ: Any) -> str:
    return NvccCompiler(
        nvcc, Library(library.root), first_recipe(Environ(**environ))
    ).keys.cache_key(kernel)


def test_cache_key_depends_on_flags_nvcc_release_arguments_and_included_headers(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    plain = key_with(fake_nvcc, fake_library)
    assert key_with(fake_nvcc, fake_library, dg_jit_cpp_standard=17) != plain
    newer = write_nvcc(tmp_path / "newer", "release 13.1, V13.1.1")
    assert key_with(newer, fake_library) != plain
    other = Kernel("gemm", "deep_gemm/a.cuh", "gemm_impl", ("1, 3",))
    assert key_with(fake_nvcc, fake_library, other) != plain
    headers = fake_library.include_path / "deep_gemm"
    (headers / "c.cuh").write_text("int unrelated;\n")
    assert key_with(fake_nvcc, fake_library) == plain
    (headers / "b.cuh").write_text("int changed;\n")
    assert key_with(fake_nvcc, fake_library) != plain


def test_cache_key_does_not_depend_on_nvcc_path(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    other = write_nvcc(tmp_path / "other" / "nvcc", "release 13.0, V13.0.1")
    assert key_with(other, fake_library) == key_with(fake_nvcc, fake_library)


def test_program_other_than_nvcc_12_9_or_newer_is_refused(
    tmp_path: Path, fake_library: Library
) -> None:
    def message(nvcc: Path) -> str:
        with pytest.raises(UserError) as caught:
            assert NvccCompiler(nvcc, fake_library, first_recipe(Environ())).signature
        return str(caught.value)

    other = write_nvcc(tmp_path / "gcc", "gcc (GCC) 14.2.0")
    assert message(other) == f"{other} --version prints no release: is it nvcc?"
    old = write_nvcc(tmp_path / "old", "release 12.8, V12.8.61")
    assert message(old) == f"{old} is release 12.8: 12.9 or newer is needed"
    oldest_known = write_nvcc(tmp_path / "known", "release 12.9, V12.9.41")
    assert NvccCompiler(oldest_known, fake_library, first_recipe(Environ())).signature == "NVCC12.9"


def scripted(tmp_path: Path, library: Library, script: str) -> NvccCompiler:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return NvccCompiler(nvcc, library, first_recipe(Environ()))


def test_compile_runs_nvcc_in_the_given_folder_with_all_flags(
    tmp_path: Path, fake_library: Library
) -> None:
    log, folder = tmp_path / "log", tmp_path / "work"
    folder.mkdir()
    script = f'{{ pwd -P; printf "%s\\n" "$@"; }} >"{log}"; cp "$1" "$4"'
    compiler = scripted(tmp_path, fake_library, script)
    assert compiler.compile("int a;\r\n", folder) == b"int a;\r\n"
    assert log.read_text().splitlines() == [
        str(folder.resolve()),
        str(folder / "kernel.cu"),
        "-cubin",
        "-o",
        str(folder / "kernel.cubin"),
        *compiler.arguments,
    ]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo to-stdout; echo to-stderr >&2; exit 2", "to-stderr"),
        ("echo to-stdout; exit 2", "to-stdout"),
        ("exit 2", "exit 2"),
        ("exit 0", "nvcc wrote no cubin"),
    ],
)
def test_failed_compile_raises_the_compiler_output(
    tmp_path: Path, fake_library: Library, script: str, message: str
) -> None:
    with pytest.raises(CompileError) as caught:
        scripted(tmp_path, fake_library, script).compile("int a;\n", tmp_path)
    assert str(caught.value) == message


def test_find_nvcc_tries_variables_then_path_then_pip_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = write_nvcc(tmp_path / "my-nvcc", "")
    homes = {name: tmp_path / name for name in ("home", "path")}
    in_home, in_path = (write_nvcc(root / "bin" / "nvcc", "") for root in homes.values())
    on_path = write_nvcc(tmp_path / "dir" / "nvcc", "")
    from_pip = write_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", "")
    monkeypatch.setattr("sysconfig.get_path", lambda scheme: str(tmp_path / "site"))
    values = {
        "dg_jit_nvcc_compiler": str(chosen),
        "cuda_home": str(homes["home"]),
        "cuda_path": str(homes["path"]),
        "search_path": str(on_path.parent),
    }
    for found, dropped in zip((chosen, in_home, in_path, on_path), list(values), strict=True):
        assert find_nvcc(Environ(**values)) == found
        values[dropped] = str(tmp_path / "empty") if dropped != "dg_jit_nvcc_compiler" else ""
    assert find_nvcc(Environ(**values)) == from_pip
    from_pip.unlink()
    assert find_nvcc(Environ(**values)) is None


def test_nvcc_variable_that_names_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_nvcc(Environ(dg_jit_nvcc_compiler=str(tmp_path)))
    assert str(caught.value) == f"DG_JIT_NVCC_COMPILER={tmp_path} is not a file: it must be nvcc"


BROKEN = Kernel("gemm", "deep_gemm/a.cuh", "broken_impl", ("1, 2",))


def test_jit_loads_from_memory_then_disk_then_compiles(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    shim = write_shim(tmp_path / "shim", nvcc=fake_nvcc, log_dir=tmp_path / "log")
    compiler = NvccCompiler(shim, fake_library, first_recipe(Environ()))
    cache = KernelCache(tmp_path / "dg")
    first, second = OwnJit(RULES, compiler, cache), OwnJit(RULES, compiler, cache)
    assert not first.loaded
    for jit in (first, first, second):
        jit.load([KERNEL])
        assert jit.loaded == {KERNEL}
    assert len(read_records(tmp_path / "log")) == 1
    entry = cache.entry(compiler.keys.cache_key(KERNEL))
    assert (entry / "kernel.cu").read_text() == compiler.keys.source(KERNEL)
    assert (entry / "kernel.cubin").read_text() == compiler.keys.source(KERNEL)
    (entry / "kernel.cubin").unlink()
    with pytest.raises(UserError, match=r"^corrupted cache entry "):
        OwnJit(RULES, compiler, cache).load([KERNEL])


def test_jit_does_not_cache_a_kernel_that_fails_to_compile(
    tmp_path: Path, fake_nvcc: Path, fake_library: Library
) -> None:
    cache = KernelCache(tmp_path / "dg")
    compiler = NvccCompiler(fake_nvcc, fake_library, first_recipe(Environ()))
    jit = OwnJit(RULES, compiler, cache)
    for _ in range(2):
        with pytest.raises(CompileError, match=r"^error: it is broken$"):
            jit.load([BROKEN])
    assert not jit.loaded
    assert cache.entries() == [] and list((cache.root / "tmp").iterdir()) == []


def test_relative_nvcc_shim_and_cache_paths_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_nvcc: Path, fake_library: Library
) -> None:
    """nvcc runs in the cache directory, so every path passed to it must be absolute."""
    monkeypatch.chdir(tmp_path)
    compiler = NvccCompiler(Path("./nvcc"), fake_library, first_recipe(Environ()))
    write_shim(Path("nvcc"), nvcc=Path(fake_nvcc.name), log_dir=Path("log"))
    OwnJit(RULES, compiler, KernelCache(Path("here"))).load([KERNEL])
    assert KernelCache(tmp_path / "here").has(compiler.keys.cache_key(KERNEL))
    assert len(read_records(tmp_path / "log")) == 1


@pytest.mark.nvcc
def test_real_nvcc_compiles_a_kernel_through_shim_and_cache(
    tmp_path: Path, nvcc_compiler: NvccCompiler
) -> None:
    shim = write_shim(tmp_path / "nvcc", nvcc=nvcc_compiler.nvcc, log_dir=tmp_path / "log")
    compiler = NvccCompiler(shim, nvcc_compiler.library, first_recipe(Environ()))
    assert re.fullmatch(r"NVCC\d+\.\d+", compiler.signature)
    assert compiler.signature == nvcc_compiler.signature
    kernel = transpose_fp32(1024)
    key = nvcc_compiler.keys.cache_key(kernel)
    assert compiler.keys.cache_key(kernel) == key
    cache = KernelCache(tmp_path / "cache")
    OwnJit(RULES, compiler, cache).load([kernel])
    assert cache.holds(key, nvcc_compiler.keys.source(kernel))
    assert b"transpose_fp32" in (cache.entry(key) / "kernel.cubin").read_bytes()
    (record,) = read_records(tmp_path / "log")
    assert (record.kernel_name, record.exit_code) == ("transpose_fp32", 0)
    assert record.source == nvcc_compiler.keys.source(kernel)
    assert 0 < record.end - record.start < 60


# The reference kernel, and runner probe


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects each compiled source; compiles take 5, 1, 2, 5, 1, 2, ... seconds."""
    found: list[str] = []
    clock = 0.0

    def compile_(self: NvccCompiler, source: str, folder: Path) -> bytes:
        nonlocal clock
        clock += (5.0, 1.0, 2.0)[len(found) % 3]
        found.append(source)
        return b""

    monkeypatch.setattr(NvccCompiler, "compile", compile_)
    monkeypatch.setattr(compiler_module.time, "perf_counter", lambda: clock)
    return found


def test_reference_seconds_is_the_median_of_repeated_compiles(
    fake_nvcc: Path, library: Library, sources: list[str]
) -> None:
    compiler = NvccCompiler(fake_nvcc, library, first_recipe(Environ()))
    assert compiler.reference_seconds() == 2.0
    assert len(sources) == 3
    assert len(set(sources)) == 1
    assert name_of_source(sources[0]) == "sm90_fp8_gemm_1d2d"
    assert compiler.reference_seconds(1) == 5.0


def test_probe_prints_host_factor(
    fake_nvcc: Path,
    library: Library,
    sources: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("runner.kernels.nvcc.find_nvcc", lambda environ: fake_nvcc)
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
        (
            "runner.kernels.nvcc.find_nvcc",
            "there is no nvcc: pip install 'deepgemm-coldstart[nvcc]'",
        ),
        (
            "runner.cli.probe.find_library",
            "the reference kernel needs the headers of the version that profiles were measured "
            "with: pip install --no-deps sgl-deep-gemm==0.1.4.post1",
        ),
    ],
)
def test_probe_without_nvcc_or_headers_is_a_one_line_error(
    missing: str,
    line: str,
    fake_nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("runner.kernels.nvcc.find_nvcc", lambda environ: fake_nvcc)
    monkeypatch.setattr(missing, lambda *_: None)
    assert run_guarded(cli, ["probe"], program="runner") == 2
    assert capsys.readouterr().err == f"error: {line}\n"
