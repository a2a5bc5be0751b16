"""Digests and generation 2 cache keys, checked against independent implementations."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.compiler import NvccCompiler
from runner.errors import UserError
from runner.kernels.digest import DeepJitDigest, Digest, hex_digest
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.keys import CacheKeys, Recipe
from runner.kernels.nvcc import keys_for, signature_of

KERNEL = Kernel("gemm", "deep_gemm/a.cuh", "gemm_impl", ("1, 2",))
NVCC = "nvcc: NVIDIA (R) Cuda compiler driver\nBuilt on Wed\nrelease 13.0, V13.0.88\n"
RECIPE = Recipe(
    2,
    ("-std=c++20", "--include-path", "{include}", "--gpu-architecture=sm_100f", "-O3"),
    "extra",
    '{"arch": "100f"}',
)
FLAGS = "-std=c++20 --gpu-architecture=sm_100f -O3"


def digest(*texts: str) -> str:
    return deep_jit(*(text.encode() for text in texts))


def tree(text: str, headers: Path) -> str:
    """Digest of a text followed by the digests of the library headers it includes, in order."""
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


def test_generation_2_key_matches_independent_implementation(newer: Library) -> None:
    keys = CacheKeys(newer, RECIPE, NVCC, Path())
    assert keys.cache_key(KERNEL) == key(newer)
    assert re.fullmatch(r"gemm\.[0-9a-f]{32}", keys.cache_key(KERNEL))
    assert keys.source(KERNEL) == KERNEL.body


def test_generation_2_key_has_a_known_value() -> None:
    keys = CacheKeys(Library(Path("nowhere")), RECIPE, NVCC, Path())
    assert keys.key_of("gemm", "int x;\n") == "gemm.ce4ce55f05c92bd1c5e55a3c3b0b8943"


def test_generation_2_key_depends_on_nvcc_extra_signature_and_flags(newer: Library) -> None:
    plain = CacheKeys(newer, RECIPE, NVCC, Path())
    for changed, expected in (
        (replace(plain, signature=NVCC + " "), key(newer, nvcc=NVCC + " ")),
        (replace(plain, recipe=replace(RECIPE, extra_signature="x")), key(newer, extra="x")),
        (replace(plain, recipe=replace(RECIPE, flags=("-O2",))), key(newer, flags="-O2")),
    ):
        assert changed.cache_key(KERNEL) == expected != plain.cache_key(KERNEL)
    same = replace(plain, recipe=replace(RECIPE, options="{}"))
    assert same.cache_key(KERNEL) == plain.cache_key(KERNEL), (
        "recorded options are not part of a key"
    )


def test_generation_2_key_depends_on_header_text_but_not_path(
    newer: Library, tmp_path: Path
) -> None:
    before = CacheKeys(newer, RECIPE, NVCC, Path()).cache_key(KERNEL)
    moved = newer.root.rename(tmp_path / "moved")
    assert CacheKeys(Library(moved), RECIPE, NVCC, Path()).cache_key(KERNEL) == before
    (moved / "include" / "deep_gemm" / "c.cuh").write_text("int unrelated;\n")
    assert CacheKeys(Library(moved), RECIPE, NVCC, Path()).cache_key(KERNEL) == before
    (moved / "include" / "deep_gemm" / "b.cuh").write_text("int changed;\n")
    changed = Library(moved)
    assert CacheKeys(changed, RECIPE, NVCC, Path()).cache_key(KERNEL) == key(changed) != before


def test_key_flags_omit_the_include_path(newer: Library) -> None:
    assert CacheKeys(newer, RECIPE, NVCC, Path()).flags == FLAGS
    compiler = NvccCompiler(Path("nvcc"), newer, RECIPE)
    assert compiler.arguments == [
        "-std=c++20",
        "--include-path",
        str(newer.include_path),
        "--gpu-architecture=sm_100f",
        "-O3",
    ]
    assert RECIPE.arch == "sm_100f"


def test_generation_2_entries_have_extra_files(newer: Library) -> None:
    extra = CacheKeys(newer, RECIPE, NVCC, Path()).extra_files
    assert list(extra) == ["meta.json", ".committed"]
    assert extra[".committed"] == b""
    assert json.loads(extra["meta.json"]) == {
        "command": f"nvcc kernel.cu --cubin --output-file kernel.cubin {FLAGS}",
        "config": {"extra_signature": "extra"},
        "compiler_info": {"version": NVCC},
        "compiler_options": {"arch": "100f"},
    }
    bare = CacheKeys(newer, replace(RECIPE, options=""), NVCC, Path()).extra_files
    assert json.loads(bare["meta.json"])["compiler_options"] == {}
    assert CacheKeys(newer, replace(RECIPE, generation=1), "NVCC13.0", Path("/x")).extra_files == {}


def test_keys_for_picks_generation_from_recipe_and_checks_library(newer: Library) -> None:
    assert keys_for(newer, RECIPE, NVCC, Path("/there")) == CacheKeys(
        newer, RECIPE, NVCC, Path("/there/include")
    )
    first = replace(RECIPE, generation=1)
    older = Library(newer.root / "older")
    assert keys_for(older, first, NVCC, Path("/there")) == CacheKeys(
        older, first, "NVCC13.0", Path("/there/include")
    )
    with pytest.raises(UserError, match=r"its compiled module \(_C\*\.so\) is missing or of"):
        keys_for(newer, first, NVCC, Path("/there"))
    with pytest.raises(UserError, match="does not look like"):
        keys_for(older, RECIPE, NVCC, Path("/there"))
    assert [signature_of(NVCC, generation) for generation in (1, 2)] == ["NVCC13.0", NVCC]


# Digests

SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)


def fnv1a_64(data: bytes, offset_basis: int) -> int:
    """FNV-1a with the prime 2**40 + 2**8 + 0xb3 written as shifts."""
    state = offset_basis
    for byte in data:
        state ^= byte
        state = (state << 40) + (state << 8) + state * 0xB3
        state %= 1 << 64
    return state


def split_mix_64(state: int) -> int:
    """The output function of the SplitMix64 generator."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % (1 << 64)
    return state ^ state >> 31


def independent_hex_digest(data: bytes) -> str:
    return "".join(f"{split_mix_64(fnv1a_64(data, seed)):016x}" for seed in SEEDS)


@given(st.binary(max_size=200))
def test_hex_digest_matches_independent_implementation(data: bytes) -> None:
    assert hex_digest(data) == independent_hex_digest(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ddd805b8cbc69b1ee220a8397b1dcdaf"),
        ("a", "40eeb2539253514ed582412f6e474b8f"),
        ("kernel.sm90_fp8_gemm_1d2d", "b0782928da0215dc8773da38f7e95e9a"),
        ("é\n", "926ef062edb430ad145bba3584a46c00"),
    ],
)
def test_hex_digest_known_values(text: str, expected: str) -> None:
    assert hex_digest(text) == expected


# DeepJIT's digest


def deep_jit(*texts: bytes) -> str:
    """Hash each text after its 8-byte length; the second half multiplies by the golden ratio."""
    data = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    golden = 0xFF51AFD7ED558CCD
    for byte in data:
        golden = (golden ^ byte) * 0x9E3779B97F4A7C15 % (1 << 64)
    return f"{split_mix_64(fnv1a_64(data, SEEDS[0])):016x}{split_mix_64(golden):016x}"


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_deep_jit_digest_matches_independent_implementation(texts: list[bytes]) -> None:
    digest = DeepJitDigest()
    for text in texts:
        digest = digest.update(text)
    assert digest.hex == deep_jit(*texts)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "ddd805b8cbc69b1eab0665cdad96ab45"),
        ([""], "601991819c51b6b40cce57df1139bba4"),
        (["ab"], "ee8e35d8cc4dc26e5e463c7c75faa457"),
        (["a", "b"], "47f0455dd7b38256f2732cb8bc2d7390"),
    ],
)
def test_deep_jit_digest_known_values(texts: list[str], expected: str) -> None:
    digest = DeepJitDigest()
    for text in texts:
        digest = digest.update(text)
    assert digest.hex == expected


def test_deep_jit_digest_depends_on_text_boundaries() -> None:
    assert Digest().update("a").update("b") == Digest().update("ab")
    assert DeepJitDigest().update("a").update("b") != DeepJitDigest().update("ab")
    assert Digest().update("ab").hex == hex_digest("ab")
