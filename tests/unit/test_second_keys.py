"""Keys of the second JIT generation, by a second implementation of all that they digest."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler, keys_for, signature_of
from runner.cache.keys import FirstKeys, Recipe, SecondKeys
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel

KERNEL = Kernel("gemm", "deep_gemm/a.cuh", "gemm_impl", ("1, 2",))
NVCC = "nvcc: NVIDIA (R) Cuda compiler driver\nBuilt on Wed\nrelease 13.0, V13.0.88\n"
RECIPE = Recipe(
    2,
    ("-std=c++20", "--include-path", "{include}", "--gpu-architecture=sm_100f", "-O3"),
    "extra",
    '{"arch": "100f"}',
)
FLAGS = "-std=c++20 --gpu-architecture=sm_100f -O3"
MASK = (1 << 64) - 1


def digest(*texts: str) -> str:
    """deep_jit/utils/hash.hpp in a few lines: every text after its length."""
    first, second = 0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD
    for text in texts:
        data = text.encode()
        for byte in struct.pack("<Q", len(data)) + data:
            first = (first ^ byte) * 0x100000001B3 & MASK
            second = (second ^ byte) * 0x9E3779B97F4A7C15 & MASK
    return f"{mixed(first):016x}{mixed(second):016x}"


def mixed(state: int) -> int:
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def tree(text: str, headers: Path) -> str:
    """Digest of a text and, in order, of each of the library's own headers that it includes."""
    own = re.findall(r"#include <(deep_gemm/[^>]+)>", text)
    return digest(text, *(tree((headers / name).read_text(), headers) for name in own))


def key(
    library: Library,
    *,
    kernel: Kernel = KERNEL,
    extra: str = "extra",
    nvcc: str = NVCC,
    flags: str = FLAGS,
) -> str:
    source = tree(kernel.body, library.include_path)
    return f"{kernel.name}.{digest(extra, digest(nvcc), flags, '', source)}"


@pytest.fixture
def newer(fake_library: Library) -> Library:
    (fake_library.root / "_C.so").write_bytes(b"\x7fELF .committed")
    return Library(fake_library.root, version="0.2.3")


def test_the_key_of_a_kernel(newer: Library) -> None:
    keys = SecondKeys(newer, RECIPE, NVCC)
    assert keys.cache_key(KERNEL) == key(newer)
    assert re.fullmatch(r"gemm\.[0-9a-f]{32}", keys.cache_key(KERNEL))
    assert keys.source(KERNEL) == KERNEL.body


def test_a_key_written_down() -> None:
    """A source without headers: nothing of it can change unseen."""
    keys = SecondKeys(Library(Path("nowhere")), RECIPE, NVCC)
    assert keys.key_of("gemm", "int x;\n") == "gemm.ce4ce55f05c92bd1c5e55a3c3b0b8943"


def test_what_else_is_in_a_key(newer: Library) -> None:
    plain = SecondKeys(newer, RECIPE, NVCC)
    for changed, expected in (
        (replace(plain, signature=NVCC + " "), key(newer, nvcc=NVCC + " ")),
        (replace(plain, recipe=replace(RECIPE, extra_signature="x")), key(newer, extra="x")),
        (replace(plain, recipe=replace(RECIPE, flags=("-O2",))), key(newer, flags="-O2")),
    ):
        assert changed.cache_key(KERNEL) == expected != plain.cache_key(KERNEL)
    same = replace(plain, recipe=replace(RECIPE, options="{}"))
    assert same.cache_key(KERNEL) == plain.cache_key(KERNEL), "the account of flags is not"


def test_headers_are_in_a_key_and_the_path_is_not(newer: Library, tmp_path: Path) -> None:
    before = SecondKeys(newer, RECIPE, NVCC).cache_key(KERNEL)
    moved = newer.root.rename(tmp_path / "moved")
    assert SecondKeys(Library(moved), RECIPE, NVCC).cache_key(KERNEL) == before
    (moved / "include" / "deep_gemm" / "c.cuh").write_text("int unrelated;\n")
    assert SecondKeys(Library(moved), RECIPE, NVCC).cache_key(KERNEL) == before
    (moved / "include" / "deep_gemm" / "b.cuh").write_text("int changed;\n")
    changed = Library(moved)
    assert SecondKeys(changed, RECIPE, NVCC).cache_key(KERNEL) == key(changed) != before


def test_flags_are_told_without_the_include_path(newer: Library) -> None:
    assert SecondKeys(newer, RECIPE, NVCC).flags == FLAGS
    compiler = NvccCompiler(Path("nvcc"), newer, RECIPE)
    assert compiler.arguments == [
        "-std=c++20",
        "--include-path",
        str(newer.include_path),
        "--gpu-architecture=sm_100f",
        "-O3",
    ]
    assert RECIPE.arch == "sm_100f"


def test_what_an_entry_holds_besides(newer: Library) -> None:
    extra = SecondKeys(newer, RECIPE, NVCC).extra_files
    assert list(extra) == ["meta.json", ".committed"]
    assert extra[".committed"] == b""
    assert json.loads(extra["meta.json"]) == {
        "command": f"nvcc kernel.cu --cubin --output-file kernel.cubin {FLAGS}",
        "config": {"extra_signature": "extra"},
        "compiler_info": {"version": NVCC},
        "compiler_options": {"arch": "100f"},
    }
    bare = SecondKeys(newer, replace(RECIPE, options=""), NVCC).extra_files
    assert json.loads(bare["meta.json"])["compiler_options"] == {}
    assert FirstKeys(newer, RECIPE, "NVCC13.0", Path("/x")).extra_files == {}


def test_the_recipe_says_which_keys(newer: Library) -> None:
    assert keys_for(newer, RECIPE, NVCC, Path("/there")) == SecondKeys(newer, RECIPE, NVCC)
    first = replace(RECIPE, generation=1)
    older = Library(newer.root / "older")
    assert keys_for(older, first, NVCC, Path("/there")) == FirstKeys(
        older, first, "NVCC13.0", Path("/there/include")
    )
    with pytest.raises(UserError, match=r"its compiled part \(_C\*\.so\) is missing or another"):
        keys_for(newer, first, NVCC, Path("/there"))
    with pytest.raises(UserError, match="does not look like"):
        keys_for(older, RECIPE, NVCC, Path("/there"))
    assert [signature_of(NVCC, generation) for generation in (1, 2)] == ["NVCC13.0", NVCC]
