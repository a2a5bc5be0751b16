"""Warm-up policies: what a rank runs before it serves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from runner.backend.forward_batch import ForwardMode
from runner.backend.gemm_walks import fast_m_list, full_m_list
from runner.driver.model_runner import ModelRunner
from runner.errors import UserError
from runner.kernels.heuristics_sm90 import align, ceil_div
from runner.kernels.kernel import Kernel
from runner.schedule import Walk

_BLOCK_M = 64


class DisaggregationMode(Enum):
    """Which part of a prefill/decode split the server is; NONE serves both."""

    NONE = "none"
    PREFILL = "prefill"
    DECODE = "decode"


class WarmupPolicy(Enum):
    """Policies by name; see the members' properties for what they do."""

    NONE = "none"
    FULL = "full"
    FAST = "fast"
    PP_PARALLEL = "pp-parallel"
    PP_PARALLEL_FULL = "pp-parallel+full"
    PP_PARALLEL_FAST = "pp-parallel+fast"
    RELAX = "relax"
    PLANNED = "planned"
    PREBUILT = "prebuilt"

    @property
    def walked(self) -> str:
        """The M list that the execution hook walks: ``full``, ``fast``, or empty for none."""
        last = self.value.rpartition("+")[2]
        return last if last in ("full", "fast") else ""

    @property
    def runs_dummies(self) -> bool:
        """Whether each stage runs dummy batches of its own before it serves."""
        return self.value.startswith("pp-parallel")


PLANNING_POLICIES = frozenset({WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT})
"""Policies that know beforehand which kernels a deployment can need."""


def policy_of_flags(
    *, precompile: bool | None, fast: bool | None, pp_parallel: bool | None
) -> WarmupPolicy | None:
    """The policy that SGLang's variables ask for; None where none of them is set.

    Unset ones have upstream's defaults: precompile on, fast and pp-parallel off.
    """
    if precompile is fast is pp_parallel is None:
        return None
    walked = "" if precompile is False else "fast" if fast else "full"
    words = ["pp-parallel"] * bool(pp_parallel) + [walked] * bool(walked)
    return WarmupPolicy("+".join(words) or "none")


@dataclass(frozen=True, kw_only=True)
class WarmupOptions:
    """What decides a warm-up besides the policy.

    Attributes:
        batch_sizes: replace the five that follow from the number of SMs.
        graph_batch_sizes: sizes that a CUDA graph of DECODE is captured for after the warm-up.
        walk_max_m: ends the lists of M that are walked; None leaves them as upstream has them.
        compile_lock: whether ranks of a node take turns at the first uses of one GEMM's kernels.
    """

    policy: WarmupPolicy
    batch_sizes: tuple[int, ...] | None = None
    disaggregation: DisaggregationMode = DisaggregationMode.NONE
    speculative: bool = False
    graph_batch_sizes: tuple[int, ...] = ()
    walk_max_m: int | None = None
    compile_lock: bool = False


def walked_ms(
    policy: WarmupPolicy, chunked_prefill_size: int, limit: int | None = None
) -> Sequence[int] | None:
    """M that the execution hook walks under a policy; None where it walks nothing.

    ``limit`` ends upstream's list there.
    """
    if not policy.walked:
        return None
    make = full_m_list if policy.walked == "full" else fast_m_list
    found = make(chunked_prefill_size)
    return found if limit is None else found[: bisect_right(found, limit)]


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
    """What a policy makes a rank do with kernels apart from any forward.

    Attributes:
        total: number of planned kernels of all ranks.
        checked: what this rank looks for in its node's cache; empty but for the first rank of each
            node, which looks for all.
        share: what this rank builds; empty but for the first rank of each node.
        own: what this rank's stage runs.
        walks: what this rank walks.
    """

    total: int = 0
    checked: tuple[Kernel, ...] = ()
    share: tuple[Kernel, ...] = ()
    own: tuple[Kernel, ...] = ()
    walks: tuple[Walk, ...] = ()


_CUBIN_BYTES = 40960
"""Typical size of a compiled kernel, to tell what an exchange moves."""


def kernel_warmup(runner: ModelRunner, options: WarmupOptions, kernels: KernelSet) -> None:
    """Run the policy's warm-up on this rank; exceptions are not swallowed.

    The ``pp-parallel`` policies run only where there is more than one stage and the run is not
    speculative, as SGLang guards it. What ``full`` and ``fast`` walk, the execution hook walks
    at a GEMM's first call, in these dummy runs or later. ``relax`` walks each GEMM of this rank's
    stage here, as vLLM does. ``planned`` builds each planned kernel once on one node, hands it to
    the others and loads it; ``prebuilt`` expects them all in the cache.
    """
    if options.policy.runs_dummies:
        _dummy_runs(runner, options)
    elif options.policy is WarmupPolicy.RELAX:
        for walk in kernels.walks:
            runner.backend.walk(walk)
    elif options.policy is WarmupPolicy.PLANNED:
        _build_and_exchange(runner, kernels)
        runner.backend.load_kernels(kernels.own)
    elif options.policy is WarmupPolicy.PREBUILT:
        runner.backend.verify_kernels(kernels.checked)
        # Nobody loads, and so compiles, before every node's cache was looked at.
        runner.backend.barrier(tuple(range(runner.parallel.world_size)))
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


_EAGER_RUNS = 2
"""Forwards that SGLang runs before it captures a graph."""


def capture_graphs(runner: ModelRunner, options: WarmupOptions) -> None:
    """Capture a CUDA graph of a DECODE forward for each graph batch size, the largest first.

    Nothing happens on a prefill node, which never decodes.
    """
    if ForwardMode.DECODE not in dummy_modes(options, is_generation=runner.is_generation):
        return
    for batch_size in sorted(options.graph_batch_sizes, reverse=True):
        forward = runner.prepared_dummy(batch_size, ForwardMode.DECODE)
        for _ in range(_EAGER_RUNS):
            forward()
        runner.backend.capture(f"graph DECODE {batch_size}", forward)
