"""Names of cache entries, and what makes one whole."""

import pytest

from runner.cache.entry import FORMATS, format_of, kernel_name

HEX = "0123456789abcdef" * 2
FIRST, SECOND = FORMATS


def test_the_forms() -> None:
    assert [(form.generation, form.files) for form in FORMATS] == [
        (1, ("kernel.cu", "kernel.cubin")),
        (2, ("kernel.cu", "kernel.cubin", "meta.json", ".committed")),
    ]
    assert (FIRST.on_damage, SECOND.on_damage) == (
        "the library aborts on this entry",
        "the library compiles it again, or fails on it",
    )


@pytest.mark.parametrize(
    ("key", "generation", "name"),
    [
        (f"kernel.sm90_fp8_gemm_1d2d.{HEX}", 1, "sm90_fp8_gemm_1d2d"),
        (f"sm90_fp8_gemm_1d2d.{HEX}", 2, "sm90_fp8_gemm_1d2d"),
        (f"kernel.{HEX}", 2, "kernel"),
        (f"kernel.kernel.{HEX}", 1, "kernel"),
        (f"{HEX}.{HEX}", 2, HEX),
    ],
)
def test_an_entrys_name(key: str, generation: int, name: str) -> None:
    form = format_of(key)
    assert form is not None and form.generation == generation
    assert kernel_name(key) == name


@pytest.mark.parametrize(
    "key",
    [
        "",
        "kernel",
        "notes.txt",
        f"kernel..{HEX}",
        f".{HEX}",
        f"kernel.gemm.{HEX[:-1]}",
        f"kernel.gemm.{HEX}0",
        f"gemm.{HEX.upper()}",
        f"a.gemm.{HEX}",
        f"kernel.a-b.{HEX}",
        f"kernel.gemm.{HEX}\n",
        f"cache/gemm.{HEX}",
        f"kernel.gemm.x.{HEX}",
    ],
)
def test_what_is_no_entrys_name(key: str) -> None:
    assert format_of(key) is None
    assert kernel_name(key) == key
