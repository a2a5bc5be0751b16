"""Finding the installed DeepGEMM library: its name, version, generation and header hashes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.kernels.digest import DeepJitDigest, hex_digest
from runner.kernels.installed import Library, find_library, include_hash, own_headers


def make_package(root: Path, version: str | None = None) -> Path:
    """A folder with the layout of a ``deep_gemm`` package that cannot be imported."""
    (root / "include" / "deep_gemm").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('importing needs CUDA')\n")
    if version is not None:
        (root / "VERSION").write_text(f"{version}\n")
    importlib.invalidate_caches()
    return root


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder in front of the real one, whose deep_gemm and vllm hide any others."""
    folder = tmp_path / "site-packages"
    for name in ("deep_gemm", "vllm"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('not imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def make_vllm(site: Path, release: str | None = "0.33.0") -> Path:
    if release is not None:
        (site / f"vllm-{release}.dist-info").mkdir()
    return make_package(site / "vllm" / "third_party" / "deep_gemm")


def test_find_library_is_none_if_nothing_is_installed(site: Path) -> None:
    assert find_library() is None
    for name in ("sgl-deep-gemm", "deep_gemm", "vllm", "vllm==0.33.0"):
        assert find_library(name) is None


@pytest.mark.parametrize("version", ["0.1.4.post1", "9.9"])
def test_find_library_finds_a_wheel_of_any_version(version: str, site: Path) -> None:
    root = make_package(site / "deep_gemm", version)
    found = Library(root, "sgl-deep-gemm", version)
    assert find_library() == find_library("sgl-deep-gemm") == find_library("deep_gemm") == found
    assert found.title == f"sgl-deep-gemm {version}"
    assert found.include_path == root / "include"


def test_version_of_source_build_is_read_from_init_py(site: Path) -> None:
    root = make_package(site / "deep_gemm")
    assert find_library() == Library(root, "deep_gemm", "of unknown version")
    (root / "__init__.py").write_text("import torch\n\n__version__ = '2.6.1'\n")
    assert find_library() == Library(root, "deep_gemm", "2.6.1")


def test_wheel_is_preferred_to_the_copy_in_vllm(site: Path) -> None:
    copy = Library(make_vllm(site), "vllm", "0.33.0")
    assert find_library() == find_library("vllm") == copy
    wheel = Library(make_package(site / "deep_gemm", "0.2.3"), "sgl-deep-gemm", "0.2.3")
    assert find_library() == find_library("sgl-deep-gemm==0.2.3") == wheel
    assert find_library("vllm") == find_library("vllm==0.33.0") == copy
    for name in ("sgl-deep-gemm==0.2", "sgl-deep-gemm==0.1.4.post1", "vllm==0.33"):
        assert find_library(name) is None


@pytest.mark.parametrize("release", ["0.33.0rc1", "0.33.0+cu130", "1.0.0.post1", None])
def test_copy_in_vllm_has_the_version_of_vllm(release: str | None, site: Path) -> None:
    root = make_vllm(site, release)
    unknown = Library(root, "deep_gemm", "of unknown version")
    assert find_library("vllm") == (Library(root, "vllm", release) if release else unknown)


@pytest.mark.parametrize("below", ["", "deep_gemm", "vllm/third_party/deep_gemm"])
def test_library_path_may_be_the_package_or_a_folder_that_contains_it(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_package(tmp_path / "there" / below, "0.2.3")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "there"), "there"):
        assert find_library(path) == Library(root, "sgl-deep-gemm", "0.2.3")


def test_path_without_a_library_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError) as caught:
            find_library(str(path))
        assert str(caught.value) == (
            f"--library {path} is not DeepGEMM: it has no include/deep_gemm; give one of "
            "sgl-deep-gemm, deep_gemm, vllm, or the path of a deep_gemm folder"
        )


@pytest.mark.parametrize(
    ("files", "generation"),
    [
        ({}, 1),
        ({"_C.so": b"\x7fELF kernel.cubin"}, 1),
        ({"_C.so": b"\x7fELF meta.json\0.committed\0"}, 2),
        ({"_C.abi3.so": b"", "_C_other.so": b".committed"}, 2),
        ({"other.so": b".committed", "_C.txt": b".committed"}, 1),
    ],
)
def test_generation_is_detected_from_compiled_modules(
    files: dict[str, bytes], generation: int, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert Library(tmp_path).generation == generation


def test_fingerprint_covers_code_but_not_headers_or_notes(tmp_path: Path) -> None:
    root = make_package(tmp_path / "deep_gemm")
    (root / "utils").mkdir()
    seen = [Library(root).fingerprint]
    for path, text in (("_C.so", "1"), ("_C.so", "2"), ("utils/math.py", "x"), ("a.py", "")):
        (root / path).write_text(text)
        seen.append(Library(root).fingerprint)
    assert len(set(seen)) == 5
    (root / "notes.txt").write_text("not code")
    (root / "include" / "deep_gemm" / "a.cuh").write_text("cache keys cover headers")
    assert Library(root).fingerprint == seen[-1]


def test_own_headers_lists_included_deep_gemm_headers() -> None:
    text = (
        '#include <deep_gemm/a.cuh>\n  # include "deep_gemm/b.cuh"\n#include <cuda.h>\n'
        "// #include <deep_gemm/c.cuh>\n#include <cute/d.hpp>\n#include <deep_gemm/a.cuh>\n"
    )
    assert own_headers(text) == ["deep_gemm/a.cuh", "deep_gemm/b.cuh", "deep_gemm/a.cuh"]


def test_header_hash_in_both_generations(fake_library: Library) -> None:
    folder = fake_library.include_path / "deep_gemm"
    a, b = ((folder / name).read_text() for name in ("a.cuh", "b.cuh"))
    second = hex_digest(f"#{hex_digest(b)}")
    assert fake_library.header_hash("deep_gemm/b.cuh") == second
    first = hex_digest(f"{second}$#{hex_digest(a)}")
    assert fake_library.header_hash("deep_gemm/a.cuh") == first
    assert include_hash(fake_library, "#include <deep_gemm/a.cuh>\n") == hex_digest(f"{first}$")
    assert include_hash(fake_library, "int x;\n") == hex_digest("")
    (fake_library.root / "_C.so").write_bytes(b".committed")
    newer = Library(fake_library.root)
    below = DeepJitDigest().update(b).hex
    assert newer.header_hash("deep_gemm/b.cuh") == below
    assert newer.header_hash("deep_gemm/a.cuh") == DeepJitDigest().update(a).update(below).hex
