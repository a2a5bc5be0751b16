"""Units: their text, signatures and mangled names."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.stages import UnusualError
from runner.build.unit import Job, entry_signature, match_entries, signature, unit_text
from runner.kernels.rules_sm90 import transpose_fp32
from tests.unit.builder_jobs import gemm, job_of


def test_the_text_of_a_unit() -> None:
    first, second = gemm("1, 2", "true"), gemm("3, 4", "float", entry="sched::other")
    assert unit_text([job_of(first), job_of(second)]) == (
        "\n\nusing namespace deep_gemm;\n\n"
        "static void __instantiate_kernel_0() {\n"
        "    auto ptr = reinterpret_cast<void*>(&gemm_impl<\n"
        "        1, 2,\n        true\n    >);\n};\n\n"
        "\n\nusing namespace deep_gemm;\n\n"
        "static void __instantiate_kernel_1() {\n"
        "    auto ptr = reinterpret_cast<void*>(&sched::other<\n"
        "        3, 4,\n        float\n    >);\n};\n\n"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("deep_gemm/a.cuh", "deep_gemm/b.cuh"),
        ("// hash\n", "#define A\n"),
        ("using", "#pragma once\nusing"),
        ("};\n", "};\nstatic void __instantiate_kernel() {}\n"),
        ("__instantiate_kernel", "other"),
    ],
)
def test_a_source_of_another_form_has_no_unit(old: str, new: str) -> None:
    kernel = gemm("1")
    text = f"// hash\n{kernel.body}"
    assert old in text
    with pytest.raises(UnusualError, match=r"^not a source of one include and one instantiation$"):
        unit_text([Job("key", kernel, text.replace(old, new))])


def test_signatures_hold_the_literals_that_were_written() -> None:
    kernel = gemm("cute::UMMA::Major::K", "0, 64", "true,false", "GemmType::Normal", "128")
    assert signature(kernel) == ("gemm_impl", (0, 64, 1, 0, 128))
    assert signature(gemm("float", entry="sched::inner::metadata")) == ("metadata", ())
    assert signature(transpose_fp32(1024)) == ("transpose_fp32", (512, 64, 8))


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (
            "_ZN9deep_gemm14transpose_fp32ILj512ELj64ELj8ELj9EEEvPKfPfj",
            ("transpose_fp32", (512, 64, 8, 9)),
        ),
        (
            "_ZN9deep_gemm5sched30sm90_paged_mqa_logits_metadataILj32ELj256ELj132ELb0EEEvjPKjPj",
            ("sm90_paged_mqa_logits_metadata", (32, 256, 132, 0)),
        ),
        (
            "_ZN9deep_gemm9gemm_implILN4cute4UMMA5MajorE0ELj16ELb1ELNS_8GemmTypeE3EN7cutlass"
            "10bfloat16_tEEEvPv",
            ("gemm_impl", (16, 1)),
        ),
        ("_Z5k12x3ILi7EEvv", ("k12x3", (7,))),
        ("_Z4pairIfdEvv", ("pair", ())),
    ],
)
def test_signatures_of_mangled_names(mangled: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert entry_signature(mangled) == expected


@pytest.mark.parametrize("mangled", ["main", "_Z4initv", "_ZN9deep_gemm4initEv", "_Z", ""])
def test_entries_that_are_no_templates(mangled: str) -> None:
    with pytest.raises(UnusualError) as caught:
        entry_signature(mangled)
    assert str(caught.value) == f"entry {mangled} is no instance of a template"


def mangle(names: Sequence[str], literals: Sequence[int]) -> str:
    inner = "".join(f"{len(name)}{name}" for name in names)
    arguments = "I" + "".join(f"Lj{literal}E" for literal in literals) + "E"
    return f"_ZN{inner}{arguments}Evv" if len(names) > 1 else f"_Z{inner}{arguments}vv"


@given(
    names=st.lists(
        st.from_regex(r"[A-Za-z_]\w{0,12}", fullmatch=True).filter(str.isascii),
        min_size=1,
        max_size=4,
    ),
    literals=st.lists(st.integers(0, 2**32 - 1), max_size=6),
)
def test_a_name_survives_mangling(names: list[str], literals: list[int]) -> None:
    assert entry_signature(mangle(names, literals)) == (names[-1], tuple(literals))


def test_entries_find_their_kernels_whatever_their_defaults() -> None:
    jobs = [job_of(gemm("1, 2")), job_of(gemm("1, 3")), job_of(gemm("1, 2", entry="other"))]
    entries = [
        mangle(["dg", "other"], [1, 2]),
        mangle(["dg", "gemm_impl"], [1, 3, 0, 7]),
        mangle(["dg", "gemm_impl"], [1, 2, 3]),
    ]
    assert match_entries(jobs, entries) == dict(
        zip(entries, [jobs[2], jobs[1], jobs[0]], strict=True)
    )


@pytest.mark.parametrize(
    ("wanted", "entries", "message"),
    [
        (["1, 2"], [[1, 2, 3], [1, 2, 4]], "cannot be told apart"),
        (["1, 2", "1, 2, float"], [[1, 2]], "cannot be told apart"),
        (["1", "1, 2"], [[1], [1, 2]], "cannot be told apart"),
        (["1, 2"], [[1, 3]], "cannot be told apart"),
        (["1, 2"], [], "cannot be told apart"),
        (["1, 2"], [[1, 2], [7]], "has entries that are not its kernels"),
    ],
)
def test_entries_that_are_not_one_for_each_kernel(
    wanted: list[str], entries: list[list[int]], message: str
) -> None:
    jobs = [job_of(gemm(arguments)) for arguments in wanted]
    with pytest.raises(UnusualError, match=message):
        match_entries(jobs, [mangle(["dg", "gemm_impl"], literals) for literals in entries])
