"""Schedules and costs for times that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall
from runner.schedule import Begin, Capture, Collective, Compute, Op, Walk
from runner.timeline import merge
from sim.costs.profile_costs import Seconds
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import ProgramCompiler

TWO = Seconds(2.0)


@dataclass(frozen=True)
class RoundCosts:
    """Round costs; a Compute's flops are its host seconds, its bytes its GPU seconds."""

    compile: float = 10.0
    load: float = 1.0
    bulk: float = 1.0
    kernel: Seconds = TWO
    collective: float = 3.0
    transfer: float = 4.0
    cores: int = 8
    first_forward: float = 0.0

    def compile_seconds(self, kernel: Kernel) -> float:
        return self.compile

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        return [(kernel, 5.0 * i, 5.0 * i + 5.0) for i, kernel in enumerate(kernels)]

    def verify_seconds(self) -> float:
        return 0.5

    def load_seconds(self, *, bulk: bool) -> float:
        return self.bulk if bulk else self.load

    def kernel_seconds(self, call: KernelCall) -> Seconds:
        return self.kernel

    def walk_call_seconds(self, shape: GemmShape, mean_m: float, max_m: int) -> Seconds:
        return Seconds(0.25, 0.5)

    def walk_seconds(self) -> float:
        return 2.0

    def compute_seconds(self, op: Compute) -> Seconds:
        return Seconds(float(op.flops), float(op.bytes))

    def capture_seconds(self, op: Capture) -> float:
        return float(op.operations)

    def collective_seconds(self, op: Collective | Begin) -> float:
        return float(op.bytes) if isinstance(op, Begin) else self.collective

    def transfer_seconds(self, nbytes: int) -> float:
        return self.transfer

    def slowdown(self, compilers: int) -> float:
        return max(1.0, compilers / self.cores)


# A hyper-connection GEMM call runs one kernel, which depends on K.
def call(k: int) -> KernelCall:
    return KernelCall(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 1, 24, 64 * k, 1, 132)


def kernel_of(k: int) -> Kernel:
    return kernels_of(call(k))[0]


def walk(k: int, many: int = 1) -> Walk:
    """Calls of ``call(k)`` with M from 1 to ``many``, all with the same kernel."""
    one = call(k)
    shape = GemmShape(one.type, one.n, one.k, one.num_groups, one.num_sms)
    return Walk(shape, ((1, many, 1),))


def work(host: int, gpu: int = 0) -> Compute:
    return Compute("work", host, gpu)


def simulate(
    *ranks: Sequence[Op],
    node_of: list[int] | None = None,
    host_of: list[int] | None = None,
    timeout: float | None = None,
    host_timeout: float | None = None,
    costs: RoundCosts | None = None,
    cached: frozenset[Kernel] = frozenset(),
    compile_lock: bool = False,
    run_ahead: bool = False,
    start: float = 0.0,
) -> Outcome:
    costs = costs or RoundCosts()
    return Engine(
        [ProgramCompiler(costs, RULES, locked=compile_lock).program(ops) for ops in ranks],
        costs,
        node_of=node_of or [0] * len(ranks),
        cores_per_node=8,
        host_of=host_of,
        timeout=timeout,
        host_timeout=host_timeout,
        cached=cached,
        run_ahead=run_ahead,
        start=start,
    ).run()


def rows(outcome: Outcome, rank: int) -> list[tuple[str, float, float]]:
    """Kind, start and end of a rank's merged spans, without phases."""
    return [
        (s.kind, s.start, s.end)
        for s in merge(outcome.spans)
        if s.rank == rank and s.kind != "phase"
    ]
