"""Warm-up policies: what a rank runs before it serves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from runner.errors import UserError
from runner.forward_batch import ForwardMode
from runner.jit.heuristics_sm90 import align, ceil_div
from runner.jit.kernels import Kernel
from runner.model_runner import ModelRunner

_BLOCK_M = 64


class DisaggregationMode(Enum):
    """Which part of a prefill/decode split the server is; NONE serves both."""

    NONE = "none"
    PREFILL = "prefill"
    DECODE = "decode"


class WarmupPolicy(Enum):
    """Policies by name. Those that walk lists of M are only planned with so far."""

    NONE = "none"
    FULL = "full"
    FAST = "fast"
    PP_PARALLEL = "pp-parallel"
    RELAX = "relax"
    PLANNED = "planned"
    PREBUILT = "prebuilt"


RUNNABLE_POLICIES = (
    WarmupPolicy.NONE,
    WarmupPolicy.PP_PARALLEL,
    WarmupPolicy.PLANNED,
    WarmupPolicy.PREBUILT,
)
"""What ``launch --warmup`` and ``runner sim --warmup`` take."""

PLANNING_POLICIES = frozenset({WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT})
"""Policies that know beforehand which kernels a deployment can need."""


@dataclass(frozen=True, kw_only=True)
class WarmupOptions:
    """What decides a warm-up besides the policy.

    ``batch_sizes`` replaces the five that follow from the number of SMs.
    """

    policy: WarmupPolicy
    batch_sizes: tuple[int, ...] | None = None
    disaggregation: DisaggregationMode = DisaggregationMode.NONE
    speculative: bool = False


def pp_parallel_batch_sizes(num_sms: int, alignment: int = 1) -> tuple[int, ...]:
    """The batch sizes of SGLang's per-PP-rank warm-up, ascending, duplicates collapsed.

    1; 2 * 64; max(num_sms // 8, 2) * 64; max(num_sms // 4, 4) * 64; num_sms * 64, each rounded up
    to ``alignment``. With 64-row blocks they cover the brackets of the split count.
    """
    sizes = (
        1,
        2 * _BLOCK_M,
        max(num_sms // 8, 2) * _BLOCK_M,
        max(num_sms // 4, 4) * _BLOCK_M,
        num_sms * _BLOCK_M,
    )
    return tuple(sorted({align(size, alignment) for size in sizes}))


def resolve_batch_sizes(
    given: tuple[int, ...] | None, num_sms: int, alignment: int
) -> tuple[int, ...]:
    """The batch sizes to run: those given, rounded up to ``alignment``, else the five."""
    if given is None:
        return pp_parallel_batch_sizes(num_sms, alignment)
    if not given or min(given) < 1:
        raise UserError(f"batch sizes {','.join(map(str, given))} must all be at least 1")
    return tuple(sorted({align(size, alignment) for size in given}))


def dummy_modes(options: WarmupOptions, *, is_generation: bool) -> tuple[ForwardMode, ...]:
    """Modes of the dummy runs: a prefill node never decodes, a decode node never extends."""
    modes = []
    if is_generation and options.disaggregation is not DisaggregationMode.PREFILL:
        modes.append(ForwardMode.DECODE)
    if options.disaggregation is not DisaggregationMode.DECODE:
        modes.append(ForwardMode.EXTEND)
    return tuple(modes)


@dataclass(frozen=True)
class KernelSet:
    """What a rank has to do with the planned kernels.

    Attributes:
        total: number of planned kernels of all ranks.
        checked: what this rank looks for in its node's cache; empty but for the first rank of each
            node, which looks for all.
        share: what this rank builds; empty but for the first rank of each node.
        own: what this rank's stage runs.
    """

    total: int = 0
    checked: tuple[Kernel, ...] = ()
    share: tuple[Kernel, ...] = ()
    own: tuple[Kernel, ...] = ()


_CUBIN_BYTES = 40960
"""Typical size of a compiled kernel, to tell what an exchange moves."""


def kernel_warmup(runner: ModelRunner, options: WarmupOptions, kernels: KernelSet) -> None:
    """Run the policy's warm-up on this rank; exceptions are not swallowed.

    ``pp-parallel`` runs only where there is more than one stage and the run is not speculative,
    as SGLang guards it. ``planned`` builds each planned kernel once on one node, hands it to the
    others and loads it; ``prebuilt`` expects them all in the cache.
    """
    if options.policy is WarmupPolicy.PP_PARALLEL:
        _dummy_runs(runner, options)
    elif options.policy is WarmupPolicy.PLANNED:
        _build_and_exchange(runner, kernels)
        runner.backend.load_kernels(kernels.own)
    elif options.policy is WarmupPolicy.PREBUILT:
        runner.backend.verify_kernels(kernels.checked)
        runner.backend.load_kernels(kernels.own)


def _build_and_exchange(runner: ModelRunner, kernels: KernelSet) -> None:
    parallel = runner.parallel
    runner.backend.build_kernels(kernels.share)
    most = ceil_div(kernels.total, parallel.nodes) if parallel.nodes > 1 else 0
    runner.backend.exchange_kernels(tuple(range(parallel.world_size)), _CUBIN_BYTES * most)


def _dummy_runs(runner: ModelRunner, options: WarmupOptions) -> None:
    if runner.parallel.pp == 1 or options.speculative:
        return
    sizes = resolve_batch_sizes(
        options.batch_sizes, runner.backend.num_sms, runner.parallel.attn_cp
    )
    for batch_size in sizes:
        for mode in dummy_modes(options, is_generation=runner.is_generation):
            runner._dummy_run(batch_size, forward_mode_override=mode)
