"""Names that a library exports, and the stubs that are made of them."""

from pathlib import Path

import pytest
from runner.standin.symbols import exported_functions

from runner.errors import UserError
from runner.standin.stubs import driver_names, names_of, stub_source
from tests.unit.standin.fake_torch import LIBRARIES, needs_compiler, shared_library


@needs_compiler
def test_functions_for_others(tmp_path: Path) -> None:
    path = shared_library(tmp_path / "lib.so", ("second", "first"))
    assert exported_functions(path) == ("first", "second")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 90, b"no" * 99],
    ids=["empty", "short", "garbled", "text"],
)
def test_what_is_no_library(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"lib\.so is not a shared library \(ELF64\)"):
        exported_functions(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.so: No such file"):
        exported_functions(tmp_path / "none.so")


@needs_compiler
def test_a_library_that_is_cut_short(tmp_path: Path) -> None:
    path = shared_library(tmp_path / "lib.so", ("first",))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is not a shared library"):
        exported_functions(path)


def test_driver_names() -> None:
    names = driver_names()
    assert len(names) > 600 and sorted(set(names)) == list(names)
    assert {"cuInit", "cuMemAlloc_v2", "cuLaunchKernelEx", "cuGetExportTable"} < set(names)
    assert all(name.startswith("cu") and name.isidentifier() for name in names)


def test_which_names_fail(packages: Path) -> None:
    folder = packages / "nvidia" / "cu13" / "lib"
    own = set(names_of(folder / name for name in LIBRARIES)) - set(driver_names())
    assert own == {
        "cudaMalloc",
        "cudaWarpDrive",
        "__cudaRegisterFatBinary",
        "cublasSgemm_v2",
        "cublasWarp",
        "cublasLtMatmul",
        "cublasLtWarp",
    }


def test_stub_source() -> None:
    text = stub_source(["cudaB", "cublasA", "cuC"])
    assert "MISSING(cuC, NOT_SUPPORTED)\nMISSING(cublasA, BLAS_NOT_SUPPORTED)\n" in text
    assert '    {"cuC", missing_cuC},\n    {"cublasA", missing_cublasA},\n' in text
    assert text.endswith("const int standin_stub_count = 3;\n")
