"""The environment variables of SGLang and DeepGEMM that change a run, read once at the entry.

Their names, defaults and meanings are upstream's (docs/environment.md, which also lists the few
others). An :class:`Environ` value is passed down, so that nothing below reads ``os.environ``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from math import ceil
from pathlib import Path
from typing import Any

from runner.errors import UserError

_TRUE = frozenset({"true", "1", "yes", "y", "t", "on"})
_FALSE = frozenset({"false", "0", "no", "n", "f", "off"})


class Bf16Fp32Algo(Enum):
    """Ways to multiply bf16 by bf16 into fp32: values of ``SGLANG_OPT_BF16_FP32_GEMM_ALGO``.

    SGLang's fourth value, ``hpc``, needs a library that is not supported here.
    """

    CUBLAS = "cublas"
    """cuBLAS reads bf16 and writes fp32; without a GPU, an fp32 product of widened operands."""

    DEEP_GEMM = "deep_gemm"
    """DeepGEMM's ``GEMM_NT_BF16BF16F32``: the only one of the three with kernels to compile."""

    TORCH = "torch"
    """torch's ``linear`` on operands widened to fp32."""


DEFAULT_BF16_FP32_ALGO = Bf16Fp32Algo.DEEP_GEMM
"""The default. SGLang 0.5.23 defaults to cuBLAS; this choice has more kernels to compile."""


def _variable(name: str, default: object) -> Any:
    return field(default=default, metadata={"variable": name})


@dataclass(frozen=True, kw_only=True)
class Environ:
    """One immutable reading of the environment.

    Booleans accept true/1/yes/y/t/on and false/0/no/n/f/off in any case. The old name
    ``SGL_<rest>`` of a variable ``SGLANG_<rest>`` is understood, with a warning.
    """

    enable_jit_deepgemm: bool = _variable("SGLANG_ENABLE_JIT_DEEPGEMM", True)
    precompile: bool | None = _variable("SGLANG_JIT_DEEPGEMM_PRECOMPILE", None)
    fast_warmup: bool | None = _variable("SGLANG_JIT_DEEPGEMM_FAST_WARMUP", None)
    pp_parallel_warmup: bool | None = _variable("SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP", None)
    in_precompile_stage: bool = _variable("SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE", False)
    is_first_rank_on_node: bool = _variable("SGLANG_IS_FIRST_RANK_ON_NODE", True)
    sanity_check: bool = _variable("SGLANG_DEEPGEMM_SANITY_CHECK", False)
    pdl: bool = _variable("SGLANG_DEEPGEMM_PDL", True)
    use_deepgemm_bmm: bool = _variable("SGLANG_USE_DEEPGEMM_BMM", False)
    pp_layer_partition: str = _variable("SGLANG_PP_LAYER_PARTITION", "")
    bf16_fp32_algo: Bf16Fp32Algo = _variable(
        "SGLANG_OPT_BF16_FP32_GEMM_ALGO", DEFAULT_BF16_FP32_ALGO
    )
    use_nvrtc: bool = _variable("SGLANG_DG_USE_NVRTC", False)
    sglang_dg_cache_dir: str = _variable("SGLANG_DG_CACHE_DIR", "")
    dg_jit_cache_dir: str = _variable("DG_JIT_CACHE_DIR", "")
    dg_jit_use_nvrtc: int = _variable("DG_JIT_USE_NVRTC", 0)
    dg_jit_nvcc_compiler: str = _variable("DG_JIT_NVCC_COMPILER", "")
    dg_jit_cpp_standard: int = _variable("DG_JIT_CPP_STANDARD", 20)
    dg_jit_debug: int = _variable("DG_JIT_DEBUG", 0)
    dg_jit_ptxas_verbose: int = _variable("DG_JIT_PTXAS_VERBOSE", 0)
    dg_jit_ptxas_check: int = _variable("DG_JIT_PTXAS_CHECK", 0)
    dg_jit_with_lineinfo: int = _variable("DG_JIT_WITH_LINEINFO", 0)
    dg_jit_check_no_spills: int = _variable("DG_JIT_CHECK_NO_SPILLS", 0)
    dg_jit_check_no_local_memory: int = _variable("DG_JIT_CHECK_NO_LOCAL_MEMORY", 0)
    cuda_home: str = _variable("CUDA_HOME", "")
    cuda_path: str = _variable("CUDA_PATH", "")
    home: str = _variable("HOME", "")
    search_path: str = _variable("PATH", "")
    world_size: int = _variable("WORLD_SIZE", 1)
    rank: int = _variable("RANK", 0)
    local_rank: int = _variable("LOCAL_RANK", 0)
    local_world_size: int | None = _variable("LOCAL_WORLD_SIZE", None)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Environ:
        """Parse ``environment`` (normally ``os.environ``).

        Raises:
            UserError: a value that does not parse; the message names the variable.
        """
        found = _with_renamed(environment, [item.metadata["variable"] for item in fields(cls)])
        values: dict[str, Any] = {}
        for item in fields(cls):
            variable = item.metadata["variable"]
            if variable in found:
                values[item.name] = _parse(variable, found[variable], item.type)
        return cls(**values)

    @property
    def ranks_on_host(self) -> int:
        """Ranks on this machine; all of them without torchrun."""
        return self.local_world_size or self.world_size

    @property
    def hosts(self) -> int:
        """Machines that torchrun uses; 1 without it."""
        return self.world_size // max(1, self.ranks_on_host)

    @property
    def stage_layers(self) -> tuple[int, ...] | None:
        """Layers of each pipeline stage, from SGLANG_PP_LAYER_PARTITION; None if it is unset.

        Raises:
            UserError: not a list of integers.
        """
        if not self.pp_layer_partition:
            return None
        try:
            return tuple(int(word) for word in self.pp_layer_partition.split(","))
        except ValueError:
            raise UserError(
                f"SGLANG_PP_LAYER_PARTITION={self.pp_layer_partition!r} is not a list of integers "
                "such as 10,11,11,11"
            ) from None

    @property
    def jit_cache_dirs(self) -> str:
        """Where kernels are cached: SGLANG_DG_CACHE_DIR, DG_JIT_CACHE_DIR, else ~/.deep_gemm.

        ``WRITABLE:READONLY:...``, as the second JIT generation reads it.
        """
        chosen = self.sglang_dg_cache_dir or self.dg_jit_cache_dir
        return chosen or str(Path(self.home or "~").expanduser() / ".deep_gemm")


def _with_renamed(environment: Mapping[str, str], variables: list[str]) -> dict[str, str]:
    found = dict(environment)
    for new in variables:
        old = new.replace("SGLANG_", "SGL_", 1)
        if old == new or old not in found:
            continue
        if new in found:
            warnings.warn(f"{old} is ignored: {new} is set as well", stacklevel=3)
            continue
        warnings.warn(f"{old} is deprecated: use {new}", stacklevel=3)
        found[new] = found[old]
    return found


def _parse(variable: str, text: str, annotation: object) -> object:
    kind = str(annotation)
    if kind.startswith("bool"):
        return _parse_bool(variable, text)
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{variable}={text!r} is not an integer") from None
    if kind == Bf16Fp32Algo.__name__:
        return _parse_algo(variable, text)
    return text


def _parse_bool(variable: str, text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise UserError(f"{variable}={text!r} is not a boolean: use one of true, 1, false, 0")


def _parse_algo(variable: str, text: str) -> Bf16Fp32Algo:
    """The algorithm of that name; an empty name means the default."""
    if not text:
        return DEFAULT_BF16_FP32_ALGO
    try:
        return Bf16Fp32Algo(text)
    except ValueError:
        allowed = ", ".join(algo.value for algo in Bf16Fp32Algo)
        raise UserError(
            f"{variable}={text!r} is not known: use one of {allowed}, or leave it unset"
        ) from None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """This project's folder for regenerable files, in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = environment.get("XDG_CACHE_HOME")
    home = Path(environment.get("HOME") or "~").expanduser()
    return (Path(base) if base else home / ".cache") / "deepgemm-coldstart"


_CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = _CGROUP) -> int:
    """CPU cores that this process may use: by its affinity and its container's rounded-up quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, ceil(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """CPU cores that the control group allows (v2, else v1); None without a limit."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # The files are missing, or say "max".
        return None
