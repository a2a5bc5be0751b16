"""Describe kernels: read names and configurations from generated sources, ours or a cache's."""

from __future__ import annotations

import re

from runner.kernels.kernel import Kernel

Config = dict[str, int | str | bool]

_INSTANTIATION = re.compile(r"&(?:sched::)?(\w+)<(.*?)>\s*\)", re.DOTALL)

_TILED = (
    "compiled_m compiled_n compiled_k num_groups block_m block_n block_k swizzle_a swizzle_b "
    "swizzle_cd num_stages num_tma_threads num_math_threads cluster_size multicast_on_a num_sms "
    "gemm_type "
)
_HC = (
    "n k block_m block_n block_k num_splits swizzle_cd num_stages num_math_threads num_tma_threads"
)
_PARAMETERS: dict[tuple[str, int], list[str]] = {
    (template, len(names.split())): names.split()
    for template, names in (
        # The number of arguments differs between versions of the library.
        ("sm90_fp8_gemm_1d2d_impl", f"major_sfb {_TILED} cd_type"),
        ("sm90_fp8_gemm_1d2d_impl", f"major_sfb {_TILED} cd_type epilogue"),
        ("sm90_fp8_gemm_1d2d_impl", f"major_sfb {_TILED} cd_type epilogue scale_columns"),
        ("sm90_bf16_gemm_impl", f"major_a major_b {_TILED} with_accumulation cd_type"),
        ("sm90_tf32_hc_prenorm_gemm_impl", _HC),
        ("sm100_tf32_hc_prenorm_gemm_impl", _HC),
        (
            "sm90_fp8_mqa_logits",
            "num_heads head_dim compressed_logits block_q block_kv num_q_stages num_kv_stages "
            "num_sms num_specialized_threads num_math_threads logits_type",
        ),
        (
            "sm90_fp8_paged_mqa_logits",
            "next_n num_heads head_dim block_kv context_lens_2d varlen num_q_stages num_kv_stages "
            "split_kv num_specialized_threads num_math_threads logits_type",
        ),
        ("sm90_paged_mqa_logits_metadata", "aligned_batch_size split_kv num_sms varlen"),
        ("transpose_fp32", "num_threads block_mn sf_k"),
        ("transpose_fp32", "num_threads block_mn sf_k scale_columns"),
    )
}
"""Names of template arguments, by template and number of arguments."""

_NAMES_BY_GEMM_TYPE = {
    ("sm90_fp8_gemm_1d2d_impl", "MGroupedContiguous"): "sm90_m_grouped_fp8_gemm_contiguous_1d2d",
    ("sm90_fp8_gemm_1d2d_impl", "MGroupedMasked"): "sm90_fp8_m_grouped_gemm_masked_1d2d",
    ("sm90_bf16_gemm_impl", "MGroupedContiguous"): "sm90_m_grouped_bf16_gemm_contiguous",
    ("sm90_bf16_gemm_impl", "MGroupedMasked"): "sm90_bf16_m_grouped_gemm_masked",
}


def config_of(kernel: Kernel) -> Config:
    """Template arguments of a kernel by name; empty if the template is not known."""
    return config_of_source(kernel.body)


def config_of_source(source: str) -> Config:
    """Template arguments of a generated source by name; empty if the template is not known."""
    match = _INSTANTIATION.search(source)
    if not match:
        return {}
    values = [word.strip() for word in match[2].split(",")]
    names = _PARAMETERS.get((match[1], len(values)), [])
    return {name: _value(word) for name, word in zip(names, values, strict=False)}


def name_of_source(source: str) -> str:
    """The library's name for the kernel in a generated source; ``unknown`` if there is none."""
    match = _INSTANTIATION.search(source)
    if not match:
        return "unknown"
    gemm_type = re.search(r"GemmType::(\w+)", match[2])
    key = (match[1], gemm_type[1] if gemm_type else "")
    return _NAMES_BY_GEMM_TYPE.get(key, match[1].removesuffix("_impl"))


def in_words(config: Config) -> str:
    """One line with the part of a configuration that distinguishes kernels of the same name."""
    if "sf_k" in config:
        return f"{config['sf_k']} scales a row"
    if "aligned_batch_size" in config:
        return f"{config['aligned_batch_size']} rows, {config['num_sms']} SMs"
    if "num_splits" in config:
        return f"n {config['n']} k {config['k']}, {config['num_splits']} splits"
    if "num_heads" in config:
        return f"{config['num_heads']} heads of {config['head_dim']}"
    if "block_m" not in config:
        return ""
    words = "tile {block_m}x{block_n}x{block_k}, {num_stages} stages"
    words += ", cluster {cluster_size}" if config["cluster_size"] != 1 else ""
    words += ", {num_groups} groups" if config["num_groups"] != 1 else ""
    words += ", n {compiled_n} k {compiled_k}" if config["compiled_n"] else ""
    words += ", fp32 out" if config["cd_type"] == "float" else ""
    return (words + ", {num_sms} SMs").format_map(config)


def _value(word: str) -> int | str | bool:
    if word in ("true", "false"):
        return word == "true"
    return int(word) if word.lstrip("-").isdigit() else word.rsplit("::", 1)[-1]
