"""Exported functions of CUDA libraries, and the stubs that replace them."""

from pathlib import Path

import pytest

from runner.errors import UserError
from runner.standin.build import exported_functions, names_to_stub, stub_source
from tests.unit.standin.fake_torch import LIBRARIES, needs_compiler, shared_library


@needs_compiler
def test_exported_functions_are_listed_in_order(tmp_path: Path) -> None:
    path = shared_library(tmp_path / "lib.so", ("second", "first"))
    assert exported_functions(path) == ["first", "second"]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"lib\.so is not a shared library: nm: "):
        exported_functions(path)


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF\x02\x01" + b"\xff" * 90, b"no" * 99])
@needs_compiler
def test_file_that_is_not_a_shared_library_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "lib.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"lib\.so is not a shared library: nm"):
        exported_functions(path)


def test_missing_nm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="the stand-in GPU needs nm: apt-get install binutils"):
        exported_functions(tmp_path / "lib.so")


def test_names_to_stub_are_driver_functions_and_exported_ones(packages: Path) -> None:
    folder = packages / "nvidia" / "cu13" / "lib"
    names = names_to_stub(folder / name for name in LIBRARIES)
    assert len(names) > 600 and sorted(set(names)) == names
    assert {"cuInit", "cuMemAlloc_v2", "cuLaunchKernelEx", "cuGetExportTable"} < set(names)
    assert set(names) - set(names_to_stub([])) == {
        "cudaMalloc",
        "cudaWarpDrive",
        "__cudaRegisterFatBinary",
        "cublasSgemm_v2",
        "cublasWarp",
        "cublasLtMatmul",
        "cublasLtWarp",
    }


def test_stub_source_has_one_stub_per_name() -> None:
    text = stub_source(["cudaB", "cublasA", "cuC"])
    assert "MISSING(cuC, NOT_SUPPORTED)\nMISSING(cublasA, BLAS_NOT_SUPPORTED)\n" in text
    assert '    {"cuC", missing_cuC},\n    {"cublasA", missing_cublasA},\n' in text
    assert text.endswith("const int standin_stub_count = 3;\n")
