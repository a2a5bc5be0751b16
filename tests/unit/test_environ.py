"""Environment variables."""

import warnings
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from runner.config.environ import Bf16Fp32Algo, Environ, available_cores
from runner.errors import UserError

VARIABLES = {item.metadata["variable"]: item for item in fields(Environ)}
BOOLEANS = [name for name, item in VARIABLES.items() if str(item.type).startswith("bool")]
UNSET = [name for name in BOOLEANS if VARIABLES[name].default is None]
INTEGERS = [name for name, item in VARIABLES.items() if str(item.type).startswith("int")]
STRINGS = [name for name, item in VARIABLES.items() if item.type == "str"]
ALGORITHM = "SGLANG_OPT_BF16_FP32_GEMM_ALGO"


@pytest.fixture(autouse=True)
def no_stray_warnings() -> None:
    warnings.simplefilter("error")


def value_of(variable: str, text: str) -> object:
    return getattr(Environ.read({variable: text}), VARIABLES[variable].name)


def test_known_environment_variables_and_their_types() -> None:
    assert sorted([*BOOLEANS, *INTEGERS, *STRINGS, ALGORITHM]) == sorted(VARIABLES)
    assert sorted(VARIABLES) == [
        "CUDA_HOME",
        "CUDA_PATH",
        "DG_JIT_CACHE_DIR",
        "DG_JIT_CHECK_NO_LOCAL_MEMORY",
        "DG_JIT_CHECK_NO_SPILLS",
        "DG_JIT_CPP_STANDARD",
        "DG_JIT_DEBUG",
        "DG_JIT_NVCC_COMPILER",
        "DG_JIT_PTXAS_CHECK",
        "DG_JIT_PTXAS_VERBOSE",
        "DG_JIT_USE_NVRTC",
        "DG_JIT_WITH_LINEINFO",
        "HOME",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "PATH",
        "RANK",
        "SGLANG_DEEPGEMM_PDL",
        "SGLANG_DEEPGEMM_SANITY_CHECK",
        "SGLANG_DG_CACHE_DIR",
        "SGLANG_DG_USE_NVRTC",
        "SGLANG_ENABLE_JIT_DEEPGEMM",
        "SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE",
        "SGLANG_IS_FIRST_RANK_ON_NODE",
        "SGLANG_JIT_DEEPGEMM_FAST_WARMUP",
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE",
        "SGLANG_OPT_BF16_FP32_GEMM_ALGO",
        "SGLANG_PP_LAYER_PARTITION",
        "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
        "SGLANG_USE_DEEPGEMM_BMM",
        "WORLD_SIZE",
    ]


def test_unset_variables_have_defaults() -> None:
    environ = Environ.read({})
    assert environ == Environ()
    on = {name for name in BOOLEANS if getattr(environ, VARIABLES[name].name)}
    assert on == {
        "SGLANG_ENABLE_JIT_DEEPGEMM",
        "SGLANG_IS_FIRST_RANK_ON_NODE",
        "SGLANG_DEEPGEMM_PDL",
    }
    assert {getattr(environ, VARIABLES[name].name) for name in STRINGS} == {""}
    assert UNSET == [
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE",
        "SGLANG_JIT_DEEPGEMM_FAST_WARMUP",
        "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
    ]
    assert {getattr(environ, VARIABLES[name].name) for name in UNSET} == {None}
    assert environ.dg_jit_cpp_standard == 20
    assert (environ.rank, environ.local_rank, environ.world_size) == (0, 0, 1)
    assert (environ.ranks_on_host, environ.hosts) == (1, 1)


@pytest.mark.parametrize("variable", BOOLEANS)
def test_boolean_variables_accept_common_spellings(variable: str) -> None:
    for text in ("true", "1", "yes", "y", "t", "on", "TRUE", "On", " 1 "):
        assert value_of(variable, text) is True
    for text in ("false", "0", "no", "n", "f", "off", "False", "NO"):
        assert value_of(variable, text) is False


@pytest.mark.parametrize("variable", BOOLEANS)
@pytest.mark.parametrize("text", ["", "2", "maybe"])
def test_invalid_boolean_is_refused(variable: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        value_of(variable, text)
    assert str(caught.value) == (
        f"{variable}={text!r} is not a boolean: use one of true, 1, false, 0"
    )


@pytest.mark.parametrize("variable", INTEGERS)
def test_integer_variables_are_parsed_or_refused(variable: str) -> None:
    assert value_of(variable, "17") == 17
    for text in ("", "x", "1.5"):
        with pytest.raises(UserError) as caught:
            value_of(variable, text)
        assert str(caught.value) == f"{variable}={text!r} is not an integer"


@pytest.mark.parametrize("variable", STRINGS)
def test_string_variables_are_taken_unchanged(variable: str) -> None:
    assert value_of(variable, "some text") == "some text"


@pytest.mark.parametrize("algo", Bf16Fp32Algo, ids=lambda algo: algo.value)
def test_gemm_algorithm_variable_accepts_each_algorithm(algo: Bf16Fp32Algo) -> None:
    assert value_of(ALGORITHM, algo.value) is algo


def test_default_gemm_algorithm_is_deep_gemm() -> None:
    """SGLang's default is cublas; deep_gemm needs the larger set of kernels."""
    assert Environ.read({}).bf16_fp32_algo is Bf16Fp32Algo.DEEP_GEMM
    assert value_of(ALGORITHM, "") is Bf16Fp32Algo.DEEP_GEMM


@pytest.mark.parametrize("text", ["fast", "hpc", "DEEP_GEMM", " cublas"])
def test_unknown_gemm_algorithm_is_refused(text: str) -> None:
    """SGLang also knows ``hpc``, a library that is not supported here."""
    with pytest.raises(UserError) as caught:
        value_of(ALGORITHM, text)
    assert str(caught.value) == (
        f"{ALGORITHM}={text!r} is not known: use one of cublas, deep_gemm, torch, or leave it unset"
    )


OLD_NAMES = {
    name.replace("SGLANG_", "SGL_"): name for name in VARIABLES if name.startswith("SGLANG_")
}


def two_values(variable: str) -> tuple[str, str]:
    """Two valid values of a variable; the first is not its default."""
    if variable in BOOLEANS:
        return ("0", "1") if VARIABLES[variable].default is True else ("1", "0")
    return "torch", "cublas"


@pytest.mark.parametrize("old", OLD_NAMES)
def test_deprecated_names_are_used_with_a_warning(old: str) -> None:
    new = OLD_NAMES[old]
    text, _ = two_values(new)
    with pytest.warns(UserWarning) as caught:
        environ = Environ.read({old: text})
    assert [str(warning.message) for warning in caught] == [f"{old} is deprecated: use {new}"]
    assert caught[0].filename == __file__
    assert environ == Environ.read({new: text}) != Environ()


@pytest.mark.parametrize("old", OLD_NAMES)
def test_new_name_overrides_the_deprecated_one(old: str) -> None:
    new = OLD_NAMES[old]
    kept, ignored = two_values(new)
    with pytest.warns(UserWarning) as caught:
        environ = Environ.read({old: ignored, new: kept})
    assert [str(warning.message) for warning in caught] == [
        f"{old} is ignored: {new} is set as well"
    ]
    assert environ == Environ.read({new: kept})


def test_invalid_value_of_deprecated_name_is_refused() -> None:
    with pytest.warns(UserWarning), pytest.raises(UserError) as caught:
        Environ.read({"SGL_DG_USE_NVRTC": "maybe"})
    assert str(caught.value).startswith("SGLANG_DG_USE_NVRTC='maybe' is not a boolean")


def test_unknown_variables_are_ignored() -> None:
    environment = {"SGL_UNKNOWN": "1", "SGLANG_UNKNOWN": "?", "DG_JIT_UNKNOWN": "?", "USER": "me"}
    assert Environ.read(environment) == Environ()
    assert sorted(environment) == ["DG_JIT_UNKNOWN", "SGLANG_UNKNOWN", "SGL_UNKNOWN", "USER"]


def test_cache_directory_defaults_to_home_and_prefers_sglang_variable() -> None:
    def chosen(**values: str) -> str:
        return Environ(home="/home/me", **values).jit_cache_dirs

    assert chosen() == "/home/me/.deep_gemm"
    assert chosen(dg_jit_cache_dir="/dg") == "/dg"
    assert chosen(dg_jit_cache_dir="/dg", sglang_dg_cache_dir="/sgl") == "/sgl"


def test_environ_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        Environ().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_container_cpu_quota_limits_available_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores
