"""One forward of a stage cut into halves, layers and operations, with what each takes on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.errors import UserError
from runner.kernels.types import KernelCall
from runner.model.strategy import MARK, PLAIN, OverlapStrategy
from runner.scenario import Scenario, record_forward
from runner.schedule import Await, Begin, Collective, Compute, Mark, Op
from sim.costs.profile_costs import ProfileCosts


class StepKind(Enum):
    """What a step occupies: the GPU, the GPU and its link, the link alone, or nothing."""

    COMPUTE = "compute"
    BLOCK = "block"
    BEGIN = "begin"
    AWAIT = "await"


@dataclass(frozen=True, slots=True)
class Step:
    """Part of an operation.

    Attributes:
        kind: see :class:`StepKind`.
        name: of a collective, the same where it is begun and awaited; empty for compute.
        seconds: how long it takes once it runs; 0 of an AWAIT.
    """

    kind: StepKind
    name: str
    seconds: float


Steps = tuple[Step, ...]
LayerSteps = dict[str, Steps]
"""Steps of each operation of a layer."""


@dataclass(frozen=True)
class Work:
    """A forward in two halves.

    Attributes:
        mode: of the forward.
        comm_sms: SMs that its GEMMs leave to communication.
        before: what comes before the layers that overlap.
        halves: of each half, the steps of each operation of each layer.
        after: what comes after them.
        layers: numbers of these layers.
    """

    mode: ForwardMode
    comm_sms: int
    before: Steps
    halves: tuple[tuple[LayerSteps, ...], tuple[LayerSteps, ...]]
    after: Steps
    layers: range


def record_work(
    scenario: Scenario, rank: int, batch: ForwardBatch, costs: ProfileCosts, comm_sms: int
) -> Work:
    """Run the forward on shapes with a mark between all operations, and ask what they take.

    Raises:
        UserError: there is nothing to overlap: one sequence, or no layer with experts.
    """
    cut = cut_forward(scenario, rank, batch, comm_sms)
    first, second = (
        tuple({name: to_steps(ops, costs) for name, ops in layer.items()} for layer in half)
        for half in cut.halves
    )
    before, after = to_steps(cut.before, costs), to_steps(cut.after, costs)
    return Work(batch.mode, comm_sms, before, (first, second), after, cut.layers)


Ops = Sequence[Op]
LayerOps = dict[str, Ops]


@dataclass(frozen=True)
class Cut:
    """A forward in two halves: what each operation of each layer does; see :class:`Work`."""

    before: Ops
    halves: tuple[Sequence[LayerOps], Sequence[LayerOps]]
    after: Ops
    layers: range


def cut_forward(scenario: Scenario, rank: int, batch: ForwardBatch, comm_sms: int) -> Cut:
    """Run the forward on shapes with a mark between all operations.

    Raises:
        UserError: there is nothing to overlap: one sequence, or no layer with experts.
    """
    if batch.batch_size < 2:
        raise UserError(
            f"a batch of {batch.batch_size} sequence cannot be cut in two: give more tokens or "
            "shorter prompts"
        )
    marked = tuple(step for name in PLAIN[batch.mode].operations for step in (name, MARK))
    finest = OverlapStrategy("every operation", batch.mode, marked, 0, comm_sms)
    ops = record_forward(replace(scenario, overlap=(finest,)), rank, batch)
    before, stages, after = _cut(ops)
    if not stages["0"]:
        raise UserError("this stage has no layer with experts: there is nothing to overlap")
    names = finest.operations
    first, second = (_by_layer(names, its) for its in stages.values())
    held = scenario.parallel.layer_range(
        scenario.model.num_hidden_layers, scenario.parallel.coordinates(rank).pp_rank
    )
    return Cut(before, (first, second), after, held[len(held) - len(first) :])


def _by_layer(names: Sequence[str], stages: Sequence[Ops]) -> list[LayerOps]:
    starts = range(0, len(stages), len(names))
    return [dict(zip(names, stages[at : at + len(names)], strict=True)) for at in starts]


def record_plain(
    scenario: Scenario, rank: int, batch: ForwardBatch, costs: ProfileCosts, layers: range
) -> tuple[Steps, list[Steps], Steps]:
    """The same forward as one batch: what is before some layers, each of them, what is after."""
    before, inside, after = cut_plain(scenario, rank, batch, layers)
    parts = [to_steps(ops, costs) for ops in inside]
    return to_steps(before, costs), parts, to_steps(after, costs)


def cut_plain(
    scenario: Scenario, rank: int, batch: ForwardBatch, layers: range
) -> tuple[Ops, list[Ops], Ops]:
    """The forward as one batch: what is before some layers, in each of them, and after."""
    before: list[Op] = []
    after: list[Op] = []
    inside: dict[str, list[Op]] = {str(layer): [] for layer in layers}
    current = before
    for op in record_forward(replace(scenario, overlap=()), rank, batch):
        if isinstance(op, Mark) and op.kind == "layer":
            current = after if op.name == "end" else inside.get(op.name, current)
        elif not isinstance(op, Mark):
            current.append(op)
    return before, [*inside.values()], after


def _cut(ops: Ops) -> tuple[list[Op], dict[str, list[list[Op]]], list[Op]]:
    """What is before the stages, each half's stages, and what is after."""
    before: list[Op] = []
    after: list[Op] = []
    halves: dict[str, list[list[Op]]] = {"0": [], "1": []}
    current = before
    for op in ops:
        if isinstance(op, Mark) and op.kind == "batch":
            current = after
            if op.name in halves:
                current = []
                halves[op.name].append(current)
        elif not isinstance(op, Mark):
            current.append(op)
    return before, halves, after


def to_steps(ops: Iterable[Op], costs: ProfileCosts) -> Steps:
    """What operations take on the GPU and its link, compute between communication in one step."""
    return tuple(_merged(_steps(ops, costs)))


def _steps(ops: Iterable[Op], costs: ProfileCosts) -> Iterator[Step]:
    for op in ops:
        if isinstance(op, KernelCall):
            yield Step(StepKind.COMPUTE, "", costs.kernel_seconds(op).device)
        elif isinstance(op, Compute):
            yield Step(StepKind.COMPUTE, "", costs.compute_seconds(op).device)
        elif isinstance(op, Collective):
            yield Step(StepKind.BLOCK, op.name, costs.collective_seconds(op))
        elif isinstance(op, Begin):
            yield Step(StepKind.BEGIN, op.name, costs.collective_seconds(op))
        elif isinstance(op, Await):
            yield Step(StepKind.AWAIT, op.name, 0.0)


def _merged(steps: Iterable[Step]) -> Iterator[Step]:
    seconds = 0.0
    for step in steps:
        if step.kind is StepKind.COMPUTE:
            seconds += step.seconds
            continue
        if seconds:
            yield Step(StepKind.COMPUTE, "", seconds)
        seconds = 0.0
        yield step
    if seconds:
        yield Step(StepKind.COMPUTE, "", seconds)
