"""``Scenario``: the one value that says what to plan, simulate or run.

Each field describes its command-line option, and its type decides its JSON form, so a new field is
added in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial

from runner.config.environ import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.config.fields import (
    OptionDetails,
    check_tuples,
    field_types,
    option,
    read_count,
    read_plain,
    read_text,
    to_plain,
)
from runner.config.hf import load_model, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError
from runner.kernels.heuristics_sm90 import align
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource
from runner.kernels.types import DeepGemmKernelType
from runner.model.strategy import OverlapStrategy

MAX_TOKENS = 131072
"""Largest M that SGLang's warm-up ever walks to; a forward may not have more tokens."""

MAX_SMS = 1024
"""More than any GPU has."""

_BLOCK_M = 64


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that decides the kernels and operations of every rank, and nothing else.

    Unless ``stream`` is given, requests have the warm-up's batch sizes, so that every policy ends
    at the same point: each of these shapes served once. Sizes are in tokens.

    Attributes:
        num_sms: the GPU's SM count, which kernels are chosen for.
        reduced_num_sms: smaller SM counts to plan for as well.
        max_tokens: most tokens of an EXTEND forward (the chunked prefill size).
        decode_batch_sizes: tokens of DECODE forwards; None means any number up to ``max_tokens``.
        disaggregation: a prefill node never decodes, a decode node never extends.
        without: kernel types that the server does not use DeepGEMM for.
        overlap: two-batch overlap strategies, at most one per forward mode. A strategy that leaves
            SMs to communication runs the halves of its mode's batches with other kernels.
        bf16_fp32_algo: how bf16 x bf16 -> fp32 GEMMs are computed.
        batch_sizes: sizes of dummy runs and requests; None derives five sizes from the SM count.
        graph_batch_sizes: sizes to capture a DECODE CUDA graph for after the warm-up.
        walk_max_m: largest M of a walk; None keeps upstream's lists.
        walk_memory: bytes of GPU memory that a walk may take; None means no limit on shapes, and
            the free memory on a GPU.
        compile_lock: whether ranks of a node take turns at first using one GEMM's kernels.
        source: says which kernels a GEMM runs; not part of the plain data.
    """

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy: WarmupPolicy = WarmupPolicy.NONE
    num_sms: int = 132
    reduced_num_sms: tuple[int, ...] = ()
    overlap: tuple[OverlapStrategy, ...] = ()
    max_tokens: int = option(
        16384,
        OptionDetails(
            "Most tokens of an EXTEND forward (chunked prefill size).",
            group="deployment",
            metavar="N",
        ),
    )
    disaggregation: DisaggregationMode = option(
        DisaggregationMode.NONE,
        OptionDetails(
            "A prefill node never decodes, a decode node never extends.",
            group="deployment",
            flag="--disaggregation-mode",
        ),
    )
    decode_batch_sizes: tuple[int, ...] | None = option(
        None,
        OptionDetails(
            "Batch sizes of DECODE (captured graphs).  [default: 1 to max-tokens]", group="plan"
        ),
    )
    without: tuple[DeepGemmKernelType, ...] = option(
        (),
        OptionDetails("A kernel type that the server does not use DeepGEMM for.", group="plan"),
    )
    batch_sizes: tuple[int, ...] | None = option(
        None,
        OptionDetails(
            "Batch sizes of warm-up and requests.  [default: five derived from the SM count]",
            group="run",
        ),
    )
    prompt_len: int = option(
        1,
        OptionDetails("Tokens of each prompt in the requests.", group="run", metavar="N", least=1),
    )
    stream: tuple[int, ...] | None = option(
        None,
        OptionDetails(
            "Token counts of the requests after the first, instead of the batch sizes.", group="run"
        ),
    )
    graph_batch_sizes: tuple[int, ...] = option(
        (),
        OptionDetails(
            "Batch sizes to capture a DECODE CUDA graph for.",
            group="run",
            flag="--cuda-graphs",
        ),
    )
    walk_max_m: int | None = option(
        None,
        OptionDetails(
            "Largest M that full, fast and relax walk.",
            group="run",
            metavar="N",
            least=1,
        ),
    )
    walk_memory: float | None = option(
        None,
        OptionDetails(
            "GPU memory that a full or fast walk may take; its largest M is halved until it fits.",
            group="run",
            unit="GIB",
        ),
    )
    compile_lock: bool = option(
        False,
        OptionDetails("Ranks of a node take turns at first using one GEMM's kernels.", group="run"),
    )
    speculative: bool = option(
        False, OptionDetails("Speculative decoding: no pp-parallel warm-up.", group="run")
    )
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    source: KernelSource = RULES

    def __post_init__(self) -> None:
        check_tuples(self)
        if not self.parallel.attn_cp <= self.max_tokens <= MAX_TOKENS:
            raise UserError(
                f"max-tokens {self.max_tokens} must lie in {self.parallel.attn_cp}..{MAX_TOKENS}"
            )
        if not 1 <= self.num_sms <= MAX_SMS:
            raise UserError(f"num-sms {self.num_sms} must lie in 1..{MAX_SMS}")
        for count in self.reduced_num_sms:
            if not 1 <= count <= self.num_sms:
                raise UserError(f"reduced num-sms {count} must lie in 1..{self.num_sms}")
        self.parallel.check_fits(self.model)
        self._check_sizes()
        self._check_policy()

    def _check_sizes(self) -> None:
        lists = {
            "batch sizes": self.batch_sizes,
            "token counts": self.stream or None,
            "graph batch sizes": self.graph_batch_sizes or None,
        }
        step = self.parallel.attn_cp
        most = MAX_TOKENS // step * step  # Sizes are rounded up to a multiple.
        for name, sizes in lists.items():
            if sizes is not None and not 1 <= min(sizes, default=0) <= max(sizes) <= most:
                raise UserError(f"{name} {_listed(sizes)} must lie in 1..{most}")
        sizes = self.decode_batch_sizes
        if sizes is not None and not 1 <= min(sizes, default=0) <= max(sizes) <= MAX_TOKENS:
            raise UserError(f"decode batch sizes {_listed(sizes)} must lie in 1..{MAX_TOKENS}")
        if sizes is not None and self.disaggregation is DisaggregationMode.PREFILL:
            raise UserError("a prefill node never decodes: leave decode batch sizes out")
        for name, size in {"prompt_len": self.prompt_len, "walk_max_m": self.walk_max_m}.items():
            if size is not None and size < 1:
                raise UserError(f"{name}={size} must be at least 1")
        if self.walk_memory is not None and not self.walk_memory > 0:
            raise UserError(f"walk_memory={self.walk_memory} must be above 0")
        if any(size % step for size in self.graph_batch_sizes):
            raise UserError(
                f"graph batch sizes {_listed(self.graph_batch_sizes)} must all be multiples of "
                f"attn_cp={step}"
            )

    def _check_policy(self) -> None:
        largest = max(self.request_tokens)
        if self.policy.plans and largest > self.max_tokens:
            what = "batch size" if self.stream is None else "token count"
            raise UserError(
                f"{what} {largest} is above --max-tokens {self.max_tokens}, the limit that "
                f"{self.policy.value} prepares for: give smaller ones"
            )

    @cached_property
    def deployment(self) -> Scenario:
        """This scenario reduced to what decides its plan: no warm-up, requests or nodes."""
        run_fields = {
            item.name: item.default
            for item in fields(self)
            if "option" in item.metadata and item.metadata["option"].group == "run"
        }
        parallel = replace(self.parallel, nodes=1, replicas=1)
        same: Callable[..., Scenario] = partial(replace, self)
        return same(policy=WarmupPolicy.NONE, parallel=parallel, **run_fields)

    @cached_property
    def resolved_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of dummy runs and requests, ascending, rounded up to ``attn_cp``."""
        step = self.parallel.attn_cp
        given = (
            pp_parallel_batch_sizes(self.num_sms) if self.batch_sizes is None else self.batch_sizes
        )
        return tuple(sorted({align(size, step) for size in given}))

    @property
    def request_tokens(self) -> tuple[int, ...]:
        """Tokens of each request after the warm-up."""
        if self.stream is None:
            return self.resolved_batch_sizes
        step = self.parallel.attn_cp
        return (self.resolved_batch_sizes[0], *(align(count, step) for count in self.stream))

    def is_node_leader(self, rank: int) -> bool:
        """Whether a rank is the first of its node."""
        return rank % self.parallel.ranks_per_node == 0

    def to_json(self) -> dict[str, object]:
        """Plain data: every field, and the library and GPU of the source.

        :meth:`from_json` is the inverse, except that batch sizes are written resolved.
        """
        layout = {item.name: getattr(self.parallel, item.name) for item in fields(ParallelConfig)}
        own = {name: getattr(self, name) for name in _OWN_FIELDS}
        return {
            **{name: to_plain(value) for name, value in (layout | own).items()},
            "model": self.model.name,
            "layers": self.model.num_hidden_layers,
            "batch_sizes": list(self.resolved_batch_sizes),
            "library": self.source.origin.library,
            "gpu": self.source.origin.gpu,
        }

    def timeline_meta(self) -> dict[str, object]:
        """The scenario as a Timeline's metadata; the policy is a field of the Timeline itself."""
        parallel = self.parallel
        places = [(parallel.coordinates(rank), rank) for rank in range(parallel.world_size)]
        ranks = [
            {"pp_rank": at.pp_rank, "tp_rank": at.tp_rank, "node": parallel.node_of(rank)}
            for at, rank in places
        ]
        return {**{k: v for k, v in self.to_json().items() if k != "policy"}, "ranks": ranks}

    @classmethod
    def from_json(cls, data: Mapping[str, object], *, source: KernelSource = RULES) -> Scenario:
        """Rebuild a Scenario from :meth:`to_json`'s data; absent fields get their defaults.

        Args:
            data: the data; keys that name no field are ignored.
            source: says which kernels a GEMM runs.

        Raises:
            KeyError: a field that every version writes is absent.
            ValueError: a value is malformed.
            UserError: an unknown model, or values that contradict each other.
        """
        name, layers = read_text("model", data), read_count("layers", data)
        whole = load_model(name)
        layout: Callable[..., ParallelConfig] = ParallelConfig
        make: Callable[..., Scenario] = cls
        return make(
            model=with_layers(whole, layers),
            parallel=layout(**_read_fields(ParallelConfig, data)),
            source=source,
            **_read_fields(cls, data),
        )


_OWN_FIELDS = tuple(
    item.name for item in fields(Scenario) if item.name not in ("model", "parallel", "source")
)
"""Fields that keep their names in JSON."""

_ALWAYS_WRITTEN = frozenset(
    [
        "pp",
        "tp",
        "ep",
        "attn_cp",
        "replicas",
        "nodes",
        "stage_layers",
        "policy",
        "num_sms",
        "max_tokens",
        "disaggregation",
        "batch_sizes",
        "prompt_len",
        "stream",
        "graph_batch_sizes",
        "walk_max_m",
        "walk_memory",
        "compile_lock",
        "speculative",
        "bf16_fp32_algo",
    ]
)
"""Fields that every version has written to Timelines; the others came later."""


def _read_fields(cls: type, data: Mapping[str, object]) -> dict[str, object]:
    kinds = field_types(cls)
    names = _OWN_FIELDS if cls is Scenario else tuple(kinds)
    return {
        name: read_plain(kinds[name], name, data)
        for name in names
        if name in data or name in _ALWAYS_WRITTEN
    }


def pp_parallel_batch_sizes(num_sms: int) -> tuple[int, ...]:
    """The batch sizes of SGLang's per-PP-rank warm-up.

    1; 2 * 64; max(num_sms // 8, 2) * 64; max(num_sms // 4, 4) * 64; num_sms * 64. With 64-row
    blocks they cover every split count of the hyper-connection GEMM.
    """
    blocks = (2, max(num_sms // 8, 2), max(num_sms // 4, 4), num_sms)
    return (1, *(count * _BLOCK_M for count in blocks))


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values)) or "(none)"
