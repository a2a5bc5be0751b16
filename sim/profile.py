"""Hardware profiles: measured constants as data, and the cost model that reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.jit.builder.cut import cut_units, expected_schedule
from runner.jit.builder.unit import Job
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel
from runner.schedule import Collective, Compute

_FP8_TYPES = frozenset(
    {
        T.GEMM_NT_F8F8BF16,
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        T.FP8_EINSUM_BHR_HDR_BHD,
        T.FP8_MQA_LOGITS,
        T.FP8_PAGED_MQA_LOGITS,
    }
)


_NUMBERS = (
    "num_sms", "cores_per_node", "compile_default", "build_scale", "build_start", "verify",
    "load", "call", "fp8_flops", "bf16_flops", "memory_bandwidth",
)  # fmt: skip


_DIVISORS = ("num_sms", "cores_per_node", "fp8_flops", "bf16_flops", "memory_bandwidth")


@dataclass(frozen=True)
class Link:
    """A link between ranks.

    Attributes:
        latency: seconds before the first byte.
        bandwidth: bytes per second of reductions and transfers.
        gather_bandwidth: bytes per second of gathers, which some backends do more slowly; None
            means the same.
    """

    latency: float
    bandwidth: float
    gather_bandwidth: float | None = None

    def seconds(self, nbytes: float) -> float:
        """Time to move ``nbytes``."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Profile:
    """One machine type.

    Attributes:
        name: as ``--hardware`` takes it.
        num_sms: SMs of the GPU.
        cores_per_node: CPU cores of a node.
        compile_by_tile: seconds of a compile by :func:`tile_key`.
        compile_by_name: mean seconds by template, where the tile is not listed.
        compile_default: mean seconds over everything measured, where the template is not listed.
        build_scale: this machine's builder against the expectation of
            :mod:`runner.jit.builder.costs`, all cores at work.
        build_start: seconds of a build before the first front end.
        verify: seconds to find one compiled kernel whole on disk.
        load: seconds to load one compiled kernel.
        call: seconds of one operation that has nothing to do, as the driver's host code costs it.
        fp8_flops: sustained operations per second of FP8 GEMMs.
        bf16_flops: sustained operations per second of everything else.
        memory_bandwidth: sustained bytes per second of device memory.
        links: link by name.
        provenance: where the numbers come from.
    """

    name: str
    num_sms: int
    cores_per_node: int
    compile_by_tile: dict[str, float]
    compile_by_name: dict[str, float]
    compile_default: float
    build_scale: float
    build_start: float
    verify: float
    load: float
    call: float
    fp8_flops: float
    bf16_flops: float
    memory_bandwidth: float
    links: dict[str, Link]
    provenance: list[str]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Build a profile from its JSON form.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: not that form.
        """
        links = {name: Link(**values) for name, values in data["links"].items()}
        numbers = [data[name] for name in _NUMBERS]
        numbers += [*data["compile_by_tile"].values(), *data["compile_by_name"].values()]
        numbers += [value for link in links.values() for value in (link.latency, link.bandwidth)]
        wrong = [value for value in numbers if not isinstance(value, int | float) or value < 0]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a number of at least 0")
        divisors = [data[name] for name in _DIVISORS] + [link.bandwidth for link in links.values()]
        if min(divisors) <= 0:
            raise ValueError(f"{', '.join(_DIVISORS)} and bandwidths must be above 0")
        return cls(**{**data, "links": links})


def shipped_profiles() -> list[str]:
    """Names that :func:`load_profile` knows."""
    folder = resources.files("sim") / "profiles"
    return sorted(
        item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")
    )


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile, or one read from a JSON file.

    Raises:
        UserError: neither a shipped name nor a readable profile.
    """
    path: Path | Traversable = Path(name_or_path)
    if name_or_path in shipped_profiles():
        path = resources.files("sim") / "profiles" / f"{name_or_path}.json"
    elif not path.is_file():
        known = ", ".join(shipped_profiles())
        raise UserError(
            f"hardware {name_or_path!r} is not known: use one of {known}, or a profile file"
        )
    try:
        return Profile.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read {name_or_path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name_or_path} is not a hardware profile: {error!r}") from None


@dataclass(frozen=True)
class ProfileCosts:
    """Cost model of a profile: tables for compiles, roofline for kernels, alpha-beta for links.

    Attributes:
        link: the link that collectives and transfers use.
        ranks_per_gpu: ranks that share one GPU; its time is divided among them.
    """

    profile: Profile
    link: Link
    ranks_per_gpu: int = 1

    @cached_property
    def _compile_memo(self) -> dict[Kernel, float]:
        return {}

    def compile_seconds(self, kernel: Kernel) -> float:
        """By tile, else by kernel name, else the mean."""
        memo = self._compile_memo
        if kernel not in memo:
            profile = self.profile
            key = tile_key(kernel)
            template = profile.compile_by_name.get(key.split()[0], profile.compile_default)
            memo[kernel] = profile.compile_by_tile.get(key, template)
        return memo[kernel]

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        """The builder's own expectation, scaled to this machine."""
        if not kernels:
            return []
        profile = self.profile
        units = cut_units([Job("", kernel, "") for kernel in kernels], cores)
        return [
            (item.kernel, profile.build_start + profile.build_scale * item.start,
             profile.build_start + profile.build_scale * item.end)
            for item in expected_schedule(units, cores)
        ]  # fmt: skip

    def verify_seconds(self, kernel: Kernel) -> float:
        """One constant for all kernels."""
        return self.profile.verify

    def load_seconds(self, kernel: Kernel) -> float:
        """One constant for all kernels."""
        return self.profile.load

    def kernel_seconds(self, call: KernelCall) -> float:
        """Roofline over the shape, plus the host's cost of a call."""
        profile = self.profile
        flops, nbytes = _gemm_work(call)
        peak = profile.fp8_flops if call.type in _FP8_TYPES else profile.bf16_flops
        return self._device(max(flops / peak, nbytes / profile.memory_bandwidth))

    def compute_seconds(self, op: Compute) -> float:
        """Roofline over the announced work, plus the host's cost of a call."""
        profile = self.profile
        return self._device(max(op.flops / profile.bf16_flops, op.bytes / profile.memory_bandwidth))

    def _device(self, seconds: float) -> float:
        return self.profile.call + seconds * self.ranks_per_gpu

    def collective_seconds(self, op: Collective) -> float:
        """Ring: an all-reduce moves twice (n - 1) / n of the data, a gather n - 1 times it."""
        n = len(op.group)
        if op.name.startswith("all_reduce"):
            return self.link.seconds(2 * (n - 1) / n * op.bytes)
        bandwidth = self.link.gather_bandwidth or self.link.bandwidth
        return self.link.latency + (n - 1) * op.bytes / bandwidth

    def transfer_seconds(self, nbytes: int) -> float:
        """Latency and bandwidth of the link."""
        return self.link.seconds(nbytes)


def tile_key(kernel: Kernel) -> str:
    """What compile times are tabulated by: template and tile, or the template where it has none.

    Dense, contiguous and masked GEMMs instantiate one template; their tile decides the time.
    """
    template = kernel.entry.rsplit("::", 1)[-1].removesuffix("_impl")
    if template not in ("sm90_fp8_gemm_1d2d", "sm90_bf16_gemm"):
        return template
    block_m, block_n, _ = kernel.arguments[3].split(", ")
    return f"{template} {block_m}x{block_n}"


def _gemm_work(call: KernelCall) -> tuple[float, float]:
    """(operations, bytes moved) of a call."""
    m, n, k, groups = call.m, call.n, call.k, call.num_groups
    if call.type is T.GROUPED_GEMM_NT_F8F8BF16_MASKED:
        return 2.0 * groups * m * n * k, groups * (m * k + n * k + 2.0 * m * n)
    if call.type is T.GROUPED_GEMM_NT_F8F8BF16_CONTIG:
        used = min(groups, m // 128)
        return 2.0 * m * n * k, m * k + used * n * k + 2.0 * m * n
    if call.type is T.FP8_EINSUM_BHR_HDR_BHD:
        return 2.0 * groups * m * n * k, groups * (m * k + n * k + 2.0 * m * n)
    if call.type is T.TF32_HC_PRENORM_GEMM:
        return 2.0 * m * n * k, 2.0 * m * k + 4.0 * n * k + 4.0 * max(1, groups) * m * n
    width = 1 if call.type in _FP8_TYPES else 2
    return 2.0 * m * n * k, width * (m * k + n * k) + 4.0 * m * n
