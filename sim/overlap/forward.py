"""Cut one forward of a pipeline stage into parts, and estimate each part's time on a GPU.

A forward runs as one batch, or as two halves that take turns. Either way it is a sequence of
:class:`Part`, which hold recorded operations at first and then seconds on the GPU and its link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain, groupby
from typing import Generic, TypeVar

from runner.backend.forward_batch import ForwardBatch
from runner.driver.run import record_forward
from runner.errors import UserError
from runner.kernels.types import KernelCall
from runner.model.operations import overlapped_order
from runner.model.strategy import MARK, PLAIN, OverlapStrategy
from runner.scenario import Scenario
from runner.schedule import Await, Begin, Collective, Compute, Mark, Op
from sim.costs.profile_costs import ProfileCosts

T = TypeVar("T")


class StepKind(Enum):
    """What a step occupies: the GPU, the GPU and its link, only the link, or nothing."""

    COMPUTE = "compute"
    BLOCK = "block"
    BEGIN = "begin"
    AWAIT = "await"


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work.

    Attributes:
        kind: what it occupies.
        name: the collective's name, equal where it begins and where it is awaited; else empty.
        seconds: how long the step takes once it runs; 0 for an AWAIT.
    """

    kind: StepKind
    name: str
    seconds: float


Ops = tuple[Op, ...]
Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """A stretch of a forward.

    Attributes:
        half: which half of the batch; -1 is the whole batch.
        layer: index among the layers that overlap; -1 is outside them.
        name: the operation; ``before``, ``after`` or ``layer`` if the batch is whole.
        content: the part's operations or steps.
    """

    half: int
    layer: int
    name: str
    content: T


@dataclass(frozen=True)
class Halves(Generic[T]):
    """A forward in two halves.

    Attributes:
        before: the content before the layers that overlap.
        halves: the content of each operation, for each half and layer.
        after: the content after those layers.
        layers: the numbers of those layers in the model.
    """

    before: T
    halves: tuple[tuple[dict[str, T], ...], tuple[dict[str, T], ...]]
    after: T
    layers: range

    def in_turns(self, strategy: OverlapStrategy) -> Iterator[Part[T]]:
        """The parts in the order in which a strategy runs them.

        Raises:
            UserError: the strategy's ``delta_stages`` exceeds the number of stages.
        """
        steps = [(layer, step) for layer in range(len(self.layers)) for step in strategy.steps]
        cut = groupby(steps, lambda its: its[1] == MARK)
        stages = [list(its) for is_mark, its in cut if not is_mark]
        strategy.check_lead(len(stages))
        yield Part(-1, -1, "before", self.before)
        for half, index in overlapped_order(len(stages), strategy.delta_stages):
            for layer, name in stages[index]:
                yield Part(half, layer, name, self.halves[half][layer][name])
        yield Part(-1, -1, "after", self.after)


Work = Halves[Steps]
LayerSteps = dict[str, Steps]


@dataclass(frozen=True)
class Forward:
    """One forward of one rank's stage."""

    scenario: Scenario
    rank: int
    batch: ForwardBatch

    def in_halves(self, comm_sms: int, content: Callable[[Ops], T]) -> Halves[T]:
        """Record the forward on shapes with a mark after every operation, and cut it there.

        Args:
            comm_sms: SMs that the GEMMs leave to communication.
            content: makes a part's content from its operations.

        Raises:
            UserError: nothing can overlap: there is one sequence only, or no layer with experts.
        """
        if self.batch.batch_size < 2:
            raise UserError(
                f"a batch of {self.batch.batch_size} sequence cannot be cut in two: give more "
                "tokens or shorter prompts"
            )
        names = PLAIN[self.batch.mode].operations
        marked = tuple(step for name in names for step in (name, MARK))
        finest = OverlapStrategy("every operation", self.batch.mode, marked, 0, comm_sms)
        (_, before), *sections = self._sections("batch", finest)
        first, second = (
            [content(ops) for half, ops in sections if half == wanted] for wanted in ("0", "1")
        )
        if not first:
            raise UserError("this stage has no layer with experts: there is nothing to overlap")
        halves = _by_layer(names, first), _by_layer(names, second)
        after = tuple(chain(*(ops for half, ops in sections if half not in ("0", "1"))))
        parallel = self.scenario.parallel
        held = parallel.layer_range(
            self.scenario.model.num_hidden_layers, parallel.coordinates(self.rank).pp_rank
        )
        return Halves(content(before), halves, content(after), held[-len(halves[0]) :])

    def whole(self, layers: range, content: Callable[[Ops], T]) -> list[Part[T]]:
        """Record the forward as one batch: the part before ``layers``, each layer, and the rest.

        The layers' own communication still overlaps with their own compute.
        """
        names = [str(layer) for layer in layers]
        parts: dict[str, Ops] = dict.fromkeys(("before", *names, "after"), ())
        for layer, ops in self._sections("layer"):
            key = layer if layer in names else "after" if layer == "end" else "before"
            parts[key] += ops
        return [
            Part(-1, -1, "before", content(parts["before"])),
            *(Part(-1, at, "layer", content(parts[name])) for at, name in enumerate(names)),
            Part(-1, -1, "after", content(parts["after"])),
        ]

    def _sections(self, kind: str, *overlap: OverlapStrategy) -> list[tuple[str, Ops]]:
        """Cut the recorded operations at marks of a kind: each mark's name, and what follows it."""
        scenario = replace(self.scenario, overlap=overlap)
        sections: list[tuple[str, list[Op]]] = [("", [])]
        for op in record_forward(scenario, self.rank, self.batch).ops:
            if not isinstance(op, Mark):
                sections[-1][1].append(op)
            elif op.kind == kind:
                sections.append((op.name, []))
        return [(name, tuple(ops)) for name, ops in sections]


def _by_layer(names: Sequence[str], stages: Sequence[T]) -> tuple[dict[str, T], ...]:
    starts = range(0, len(stages), len(names))
    return tuple(dict(zip(names, stages[at : at + len(names)], strict=True)) for at in starts)


def to_steps(ops: Iterable[Op], costs: ProfileCosts) -> Steps:
    """Turn operations into timed steps; compute between communication becomes one step."""
    steps: list[Step] = []
    seconds = 0.0
    for op in ops:
        if isinstance(op, KernelCall):
            seconds += costs.kernel_seconds(op).device
        elif isinstance(op, Compute):
            seconds += costs.compute_seconds(op).device
        elif isinstance(op, Begin | Collective | Await):
            if seconds:
                steps.append(Step(StepKind.COMPUTE, "", seconds))
            seconds = 0.0
            if isinstance(op, Await):
                steps.append(Step(StepKind.AWAIT, op.name, 0.0))
            else:
                kind = StepKind.BEGIN if isinstance(op, Begin) else StepKind.BLOCK
                steps.append(Step(kind, op.name, costs.collective_seconds(op)))
    if seconds:
        steps.append(Step(StepKind.COMPUTE, "", seconds))
    return tuple(steps)
