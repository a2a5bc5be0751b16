"""How each step of the forward runs: it passes its operation and the actual work to a sink."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from runner.backend.gemm_walks import ExecutionHook
from runner.backend.tensor import Tensor
from runner.config.environ import DEFAULT_BF16_FP32_ALGO, Bf16Fp32Algo
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.schedule import (
    BARRIER,
    EXCHANGE,
    Capture,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Walk,
)

if TYPE_CHECKING:
    from runner.backend.torch_math import TorchMath


R = TypeVar("R")


class OpSink(Protocol):
    """Receives every operation of a rank in order."""

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Record ``op`` and do its work, ``action``."""

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Record a graph capture of ``forward``, which passes its operations to this sink."""


class ScheduleRecorder:
    """A sink that keeps the operations: one rank's part of a Schedule.

    Equal operations become one object, so readers can compare them by identity.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._known: dict[Op, Op] = {}

    def run(self, op: Op, action: Callable[[], R]) -> R:
        self.ops.append(self._known.setdefault(op, op))
        return action()

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Record only the capture, with the number of operations in ``forward``."""
        before, self.ops = self.ops, []
        forward()
        before.append(Capture(name, len(self.ops)))
        self.ops = before


class Communicator(Protocol):
    """Moves tensors between ranks; groups and peers are world ranks."""

    def all_gather(self, x: Tensor, group: tuple[int, ...], dim: int) -> Tensor:
        """Concatenate the group's tensors along ``dim``, in group order."""

    def begin(self, kind: str, x: Tensor, group: tuple[int, ...]) -> object:
        """Start a collective and return a handle for :meth:`end`.

        Args:
            kind: ``all_reduce``; ``all_gather`` along the first dimension; ``all_to_all``, which
                gives each rank its block from every rank; or ``reduce_scatter``, which sums these
                blocks.
            x: [rows, ...] for the first two kinds, else [ranks * rows, ...]: a block per rank.
            group: world ranks.
        """

    def end(self, begun: object) -> Tensor:
        """Wait for a collective and return its result."""

    def send(self, x: Tensor, peer: int) -> None:
        """Send to a world rank."""

    def recv(self, shape: tuple[int, ...], dtype: str, peer: int) -> Tensor:
        """Receive a tensor of the given shape and element type from a world rank."""


class KernelStore(Protocol):
    """Where a rank's compiled kernels come from."""

    def work(self, work: KernelWork) -> None:
        """Build kernels into this node's cache, verify that it has all of them intact, or load."""

    def exchange(self) -> None:
        """Wait for all nodes' builds; then copy each node's kernels to every other node's cache."""

    def walk(self, walk: Walk) -> None:
        """Call a GEMM with every M of a list."""

    def wait(self) -> None:
        """Wait for all ranks."""


@dataclass(frozen=True)
class StepRunner:
    """One rank's interpreter of the forward, without the steps themselves.

    A step passes its operation to ``sink`` and returns what ``math`` computes. Without ``math``,
    nothing is computed and steps return shapes; this is how a Schedule is recorded.

    Attributes:
        sink: receives every operation in order.
        num_sms: SMs of the GPU that runs, or would run, the kernels.
        math: computes in torch; None computes only shapes.
        comm: moves tensors between ranks; None moves nothing.
        kernels: where compiled kernels come from; None compiles and loads nothing.
        bf16_fp32_algo: what computes bf16 x bf16 -> fp32 GEMMs.
        hook: decides what to walk before a call.
        comm_sms: stack of SMs that GEMMs leave to communication; the last one applies.
    """

    sink: OpSink
    num_sms: int
    math: TorchMath | None = None
    comm: Communicator | None = None
    kernels: KernelStore | None = None
    bf16_fp32_algo: Bf16Fp32Algo = DEFAULT_BF16_FP32_ALGO
    hook: ExecutionHook = field(default_factory=ExecutionHook)
    comm_sms: list[int] = field(default_factory=lambda: [0])

    @property
    def gemm_sms(self) -> int:
        """SMs that GEMMs may use now."""
        return self.num_sms - self.comm_sms[-1]

    @contextmanager
    def leaving_sms(self, count: int) -> Iterator[None]:
        """Make GEMMs inside the block leave ``count`` SMs to communication.

        Raises:
            UserError: no SM would be left.
        """
        if count >= self.num_sms:
            raise UserError(f"comm_sms = {count} leaves none of the GPU's {self.num_sms} SMs")
        self.comm_sms.append(count)
        try:
            if self.math is None:
                yield
            else:
                with self.math.gemm_sms(self.gemm_sms if count else None):
                    yield
        finally:
            self.comm_sms.pop()

    def mark(self, kind: str, name: str) -> None:
        """Record a point in the run: a phase, a forward, a layer, a yield or a batch."""
        self.sink.run(Mark(kind, name), lambda: None)

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Capture a CUDA graph of ``forward``; its operations are only counted."""
        self.sink.capture(name, forward)

    # -- work on kernels, apart from any call -----------------------------------------------------

    def walk(self, walk: Walk) -> None:
        self._on_kernels(walk, lambda store: store.walk(walk))

    def work_on_kernels(self, action: str, kernels: tuple[Kernel, ...]) -> None:
        """Build, verify or load kernels; see :class:`KernelWork` for ``action``."""
        work = KernelWork(action, kernels)
        self._on_kernels(work, lambda store: store.work(work))

    def barrier(self, group: tuple[int, ...]) -> None:
        """Wait for all ranks; ``group`` must contain all of them."""
        self._on_kernels(Collective(BARRIER, group, 0), lambda store: store.wait())

    def exchange_kernels(self, group: tuple[int, ...], nbytes: int) -> None:
        """See :meth:`KernelStore.exchange`; every rank of ``group`` takes part."""
        self._on_kernels(Collective(EXCHANGE, group, nbytes), lambda store: store.exchange())

    # -- how steps run ----------------------------------------------------------------------------

    def _without_operation(self, shape: R, work: Callable[[TorchMath], R]) -> R:
        return shape if self.math is None else work(self.math)

    def _run(self, op: Op, shape: R, work: Callable[[TorchMath], R]) -> R:
        return self.sink.run(op, lambda: self._without_operation(shape, work))

    def _compute(
        self, name: str, nbytes: int, shape: R, work: Callable[[TorchMath], R], *, flops: int = 0
    ) -> R:
        return self._run(Compute(name, flops, nbytes), shape, work)

    def _kernel(self, call: KernelCall, shape: R, work: Callable[[TorchMath], R]) -> R:
        for walk in self.hook.before(call):
            self.walk(walk)
        return self._run(call, shape, work)

    def _call(self, kind: T, m: int, n: int, k: int, groups: int) -> KernelCall:
        # The hyper-connection GEMM uses all SMs, even if others are left to communication.
        sms = self.num_sms if kind is T.TF32_HC_PRENORM_GEMM else self.gemm_sms
        return KernelCall(kind, m, n, k, groups, sms)

    def _quantise(self, x: Tensor) -> None:
        """Record that activations are quantised; the GEMM that follows does the work."""
        self.sink.run(Compute("quantise_fp8", 0, x.nbytes + x.nbytes // 2), lambda: None)

    def _communicate(self, op: Op, shape: Tensor, work: Callable[[Communicator], Tensor]) -> Tensor:
        def act() -> Tensor:
            moved = shape if self.comm is None else work(self.comm)
            return shape if self.math is None else moved

        return self.sink.run(op, act)

    def _on_kernels(self, op: Op, work: Callable[[KernelStore], None]) -> None:
        self.sink.run(op, lambda: None if self.kernels is None else work(self.kernels))
