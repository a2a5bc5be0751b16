"""Recorded calls as templates over M."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.kernels.call_template import (
    NotGeneralError,
    Template,
    generalise,
    in_words,
    size_at,
)


def tensor(dtype: str, *shape: int, stride: list[int] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
    return found if stride is None else {**found, "stride": stride}


def dense(m: int, n: int = 1536, k: int = 4096) -> list[Any]:
    padded = (m + 3) // 4 * 4
    return [
        [tensor("float8_e4m3fn", m, k), tensor("float32", m, k // 128, stride=[1, padded])],
        [tensor("float8_e4m3fn", n, k), tensor("float32", n // 128, k // 128)],
        tensor("bfloat16", m, n),
    ]


def words(template: Template) -> str:
    return in_words(template.function, template.args, template.kwargs)


def test_rows_and_strides_of_a_dense_gemm_follow_m() -> None:
    template, m = generalise("fp8_gemm_nt", dense(300), {"recipe": [1, 128, 128]})
    assert m == 300
    assert words(template) == (
        "fp8_gemm_nt((float8_e4m3fn[M,4096], float32[M,32]/[1,align(M,4)]), "
        "(float8_e4m3fn[1536,4096], float32[12,32]), bfloat16[M,1536], recipe=(1, 128, 128))"
    )


@pytest.mark.parametrize("m", [128, 1536, 4096])
def test_weights_stay_fixed_where_their_sizes_equal_m(m: int) -> None:
    template, _ = generalise("fp8_gemm_nt", dense(m), {})
    assert template == generalise("fp8_gemm_nt", dense(2 * m), {})[0]


@given(st.integers(2, 20000), st.integers(1, 20000))
def test_template_gives_the_call_at_any_other_m(seen: int, other: int) -> None:
    template, m = generalise("fp8_gemm_nt", dense(seen), {})
    assert m == seen
    assert template.at(seen) == (dense(seen), {})
    assert template.at(other) == (dense(other), {})


def test_transposed_activations_of_an_einsum_follow_m() -> None:
    def call(m: int) -> list[Any]:
        padded = (m + 3) // 4 * 4
        return [
            "bhr,hdr->bhd",
            [
                tensor("float8_e4m3fn", m, 8, 4096, stride=[4096, m * 4096, 1]),
                tensor("float32", m, 8, 32, stride=[1, 32 * padded, padded]),
            ],
            [tensor("float8_e4m3fn", 8, 1024, 4096), tensor("float32", 8, 8, 32)],
            tensor("bfloat16", m, 8, 1024),
        ]

    for seen in (2, 20, 301, 4096):
        template, m = generalise("fp8_einsum", call(seen), {"recipe": [1, 128, 128]})
        assert m == seen
        assert template.at(777) == (call(777), {"recipe": [1, 128, 128]})


def test_one_row_of_padded_scales_follows_m() -> None:
    def call(m: int) -> list[Any]:
        padded = (m + 3) // 4 * 4
        scales = tensor("int32", m, 8, 8, stride=[1, 8 * padded, padded])
        weight = [tensor("float8_e4m3fn", 8, 1024, 4096), tensor("int32", 8, 1024, 8)]
        values = tensor("float8_e4m3fn", m, 8, 4096)
        return ["bhr,hdr->bhd", [values, scales], weight, tensor("bfloat16", m, 8, 1024)]

    template, m = generalise("fp8_einsum", call(1), {})
    assert (m, template.at(100)) == (1, (call(100), {}))


def test_rows_of_hyper_connections_are_not_the_first_dimension() -> None:
    args = [
        tensor("bfloat16", 300, 16384),
        tensor("float32", 24, 16384),
        tensor("float32", 26, 300, 24),
        tensor("float32", 26, 300),
    ]
    template, m = generalise("tf32_hc_prenorm_gemm", args, {"num_splits": 26})
    assert m == 300
    assert words(template) == (
        "tf32_hc_prenorm_gemm(bfloat16[M,16384], float32[24,16384], float32[26,M,24], "
        "float32[26,M], num_splits=26)"
    )


def test_m_of_a_masked_gemm_is_a_number() -> None:
    masked = [tensor("bfloat16", 8, 512, 256)] * 3 + [tensor("int32", 8), 77]
    template, m = generalise("m_grouped_bf16_gemm_nt_masked", masked, {})
    assert (m, template.at(5)[0][4]) == (77, 5)
    by_name = {"expected_m": 77}
    template, m = generalise("m_grouped_bf16_gemm_nt_masked", masked[:4], by_name)
    assert (m, template.at(5)[1]) == (77, {"expected_m": 5})


def test_layout_of_groups_has_no_rows_with_prefix_sums() -> None:
    def call(layout: int) -> list[Any]:
        return [*dense(256), tensor("int32", layout)]

    rows, _ = generalise("m_grouped_fp8_gemm_nt_contiguous", call(256), {})
    sums, _ = generalise("m_grouped_fp8_gemm_nt_contiguous", call(8), {"use_psum_layout": True})
    assert rows.at(512)[0][3] == tensor("int32", 512)
    assert sums.at(512)[0][3] == tensor("int32", 8)


def test_next_tokens_multiply_the_rows() -> None:
    args = [tensor("float8_e4m3fn", 6, 2, 64, 128), tensor("uint8", 9, 64, 1, 132)]
    weights = tensor("float32", 12, 64)
    template, m = generalise("fp8_paged_mqa_logits", [*args, weights], {})
    assert (m, template.at(50)[0][2]["shape"]) == (6, [100, 64])  # type: ignore[index]


def test_layout_of_weights_has_no_m() -> None:
    args = [tensor("float32", 1, 12, 32), 1536, 4096]
    assert generalise("transform_sf_into_required_layout", args, {"is_sfa": False}) == (
        Template("transform_sf_into_required_layout", args, {"is_sfa": False}),
        None,
    )


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        ("new_function", [tensor("bfloat16", 3, 4)], "which sizes of new_function follow"),
        ("fp8_gemm_nt", [1, 2], "without a tensor that has rows"),
        ("fp8_gemm_nt", [*dense(300)[:2], tensor("bfloat16", 7, 9)], "7 rows where M is 300"),
        ("m_grouped_bf16_gemm_nt_masked", [1, 2], "without expected_m"),
    ],
)
def test_other_calls_are_refused_with_a_reason(function: str, args: list[Any], reason: str) -> None:
    with pytest.raises(NotGeneralError, match=reason):
        generalise(function, args, {})


@pytest.mark.parametrize(
    ("size", "at_5"), [(7, 7), ("M", 5), ("3*M", 15), ("align(M,4)", 8), ("2*align(M,4)", 16)]
)
def test_sizes_of_templates(size: int | str, at_5: int) -> None:
    assert size_at(size, 5) == at_5


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="'M\\+1' is not a size"):
        size_at("M+1", 5)
