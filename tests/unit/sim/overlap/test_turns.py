"""Two half batches in turns: times checked by hand, and against the simulation engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.config.hf import from_hf, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_forward
from runner.errors import UserError
from runner.kernels.rules import RULES
from runner.kernels.types import KernelCall
from runner.model.strategy import MARK, NEEDS, STRATEGIES, OverlapStrategy
from runner.scenario import Scenario
from runner.schedule import Begin, Collective, Compute, Op
from sim.costs.profile import Link, load_profile
from sim.costs.profile_costs import ProfileCosts, Seconds
from sim.engine.engine import Engine
from sim.engine.rank_program import ProgramCompiler
from sim.overlap.forward import Forward, LayerSteps, Part, Step, StepKind, Steps, Work, to_steps
from sim.overlap.turns import LayerTotals, Turns, Waits, explain_waits, run
from tests.models import DSV3_SMALL
from tests.unit.sim_rounds import RoundCosts

Row = tuple[float, float, str, int, int, str]


def gpu(seconds: float) -> Step:
    return Step(StepKind.COMPUTE, "", seconds)


def block(name: str, seconds: float) -> Step:
    return Step(StepKind.BLOCK, name, seconds)


def begin(name: str, seconds: float) -> Step:
    return Step(StepKind.BEGIN, name, seconds)


def wait(name: str) -> Step:
    return Step(StepKind.AWAIT, name, 0.0)


def layer(**steps: Steps) -> LayerSteps:
    return {name: steps.get(name, ()) for name in NEEDS}


def toy(half: int) -> LayerSteps:
    """Attention takes 4, an asynchronous dispatch 3, experts 2."""
    tokens = f"tokens of {half}"
    return layer(
        attn_core=(gpu(4),),
        dispatch_a=(begin(tokens, 3),),
        dispatch_b=(wait(tokens),),
        experts=(gpu(2),),
    )


def work(
    first: list[LayerSteps], second: list[LayerSteps], before: Steps = (), after: Steps = ()
) -> Work:
    return Work(before, (tuple(first), tuple(second)), after, range(len(first)))


def placed(lead: int, *after: str) -> OverlapStrategy:
    """A strategy with marks after the given operations."""
    steps = [step for name in NEEDS for step in ((name, MARK) if name in after else (name,))]
    return OverlapStrategy("mine", ForwardMode.DECODE, tuple(steps), lead)


def rows(turns: Turns) -> list[Row]:
    return [(p.start, p.end, p.lane, p.half, p.layer, p.name) for p in turns.pieces]


def totals(turns: Turns) -> tuple[float, float, float, float]:
    return turns.seconds, turns.compute, turns.communication, turns.exposed


# -- checked by hand ------------------------------------------------------------------------------


def test_without_marks_halves_run_in_sequence_and_hide_nothing() -> None:
    turns = run_in_turns(work([toy(0)], [toy(1)]), placed(0))
    assert rows(turns)[:3] == [
        (0, 4, "compute", 0, 0, "attn_core"),
        (4, 7, "link", 0, 0, "tokens"),
        (4, 7, "wait", 0, 0, "tokens"),
    ]
    assert totals(turns) == (18, 12, 6, 6)


def test_other_half_hides_communication_fully_or_partly() -> None:
    """The first dispatch overlaps 4 of attention, the second 2 of experts."""
    turns = run_in_turns(work([toy(0)], [toy(1)]), placed(0, "dispatch_a"))
    assert rows(turns) == [
        (0, 4, "compute", 0, 0, "attn_core"),
        (4, 7, "link", 0, 0, "tokens"),
        (4, 8, "compute", 1, 0, "attn_core"),
        (8, 11, "link", 1, 0, "tokens"),
        (8, 10, "compute", 0, 0, "experts"),
        (10, 11, "wait", 1, 0, "tokens"),
        (11, 13, "compute", 1, 0, "experts"),
    ]
    assert totals(turns) == (13, 12, 6, 1)


def test_lead_of_one_stage_over_two_layers() -> None:
    """There are three stages (layer 0; 0 and 1; 1); the first half starts with one alone.

    "> t" is a wait until t.
    A 0-4, > 7, 7-13; B 13-17 (tokens 17-20); A experts 17-19; B > 20, 20-26, > 29, 29-31.
    """
    both = work([toy(0), toy(0)], [toy(1), toy(1)])
    turns = run_in_turns(both, placed(1, "dispatch_a"))
    assert rows(turns) == [
        (0, 4, "compute", 0, 0, "attn_core"),
        (4, 7, "link", 0, 0, "tokens"),
        (4, 7, "wait", 0, 0, "tokens"),
        (7, 9, "compute", 0, 0, "experts"),
        (9, 13, "compute", 0, 1, "attn_core"),
        (13, 16, "link", 0, 1, "tokens"),
        (13, 17, "compute", 1, 0, "attn_core"),
        (17, 20, "link", 1, 0, "tokens"),
        (17, 19, "compute", 0, 1, "experts"),
        (19, 20, "wait", 1, 0, "tokens"),
        (20, 22, "compute", 1, 0, "experts"),
        (22, 26, "compute", 1, 1, "attn_core"),
        (26, 29, "link", 1, 1, "tokens"),
        (26, 29, "wait", 1, 1, "tokens"),
        (29, 31, "compute", 1, 1, "experts"),
    ]
    assert totals(turns) == (31, 24, 12, 7)
    assert turns.by_layer() == [LayerTotals(12, 6, 4), LayerTotals(12, 6, 3)]


def test_blocking_collective_waits_for_an_earlier_asynchronous_one() -> None:
    scatters = layer(attn_core=(gpu(1), block("scatter", 2)), experts=(gpu(1),))
    first = {**toy(0), "dispatch_a": (begin("tokens of 0", 5),)}
    turns = run_in_turns(work([first], [scatters]), placed(0, "dispatch_a"))
    assert rows(turns) == [
        (0, 4, "compute", 0, 0, "attn_core"),
        (4, 9, "link", 0, 0, "tokens"),
        (4, 5, "compute", 1, 0, "attn_core"),
        (9, 11, "link", 1, 0, "scatter"),
        (5, 11, "wait", 1, 0, "scatter"),
        (11, 13, "compute", 0, 0, "experts"),
        (13, 14, "compute", 1, 0, "experts"),
    ]
    assert totals(turns) == (14, 8, 7, 6)


def test_work_before_and_after_the_layers_belongs_to_no_layer() -> None:
    before, after = (gpu(1), block("all_reduce embedding", 2)), (gpu(3),)
    turns = run_in_turns(work([toy(0)], [toy(1)], before, after), placed(0, "dispatch_a"))
    assert rows(turns)[:3] == [
        (0, 1, "compute", -1, -1, "before"),
        (1, 3, "link", -1, -1, "all_reduce embedding"),
        (1, 3, "wait", -1, -1, "all_reduce embedding"),
    ]
    assert rows(turns)[-1] == (16, 19, "compute", -1, -1, "after")
    assert totals(turns) == (3 + 13 + 3, 1 + 12 + 3, 2 + 6, 2 + 1)
    assert turns.by_layer() == [LayerTotals(12, 6, 1)]


def test_steps_of_zero_duration_give_no_pieces() -> None:
    nothing = layer(experts=(gpu(0), block("x", 0), begin("y", 0), wait("y")))
    turns = run_in_turns(work([nothing], [nothing]), placed(0, "gate"))
    assert rows(turns) == [] and turns.seconds == 0


def test_lead_above_the_number_of_stages_is_refused() -> None:
    both = work([toy(0)], [toy(1)])
    assert run_in_turns(both, placed(2, "gate")).seconds == 18
    with pytest.raises(UserError, match="delta_stages = 3 must be at most 2, the stages"):
        run_in_turns(both, placed(3, "gate"))


def test_unsplit_batch_hides_dispatch_behind_its_shared_experts() -> None:
    """Shared experts hide 1 of the dispatch's 4."""
    one = (gpu(2), begin("tokens", 4), gpu(1), wait("tokens"), gpu(1))
    turns = run(
        [
            Part(-1, -1, "before", (gpu(1), block("gather", 2))),
            *(Part(-1, index, "layer", one) for index in range(2)),
            Part(-1, -1, "after", (gpu(5),)),
        ]
    )
    assert rows(turns)[2:6] == [
        (1, 3, "wait", -1, -1, "gather"),
        (3, 5, "compute", -1, 0, "layer"),
        (5, 9, "link", -1, 0, "tokens"),
        (5, 6, "compute", -1, 0, "layer"),
    ]
    assert totals(turns) == (22, 1 + 4 + 4 + 5, 2 + 8, 2 + 6)
    assert turns.by_layer() == [LayerTotals(4, 4, 3), LayerTotals(4, 4, 3)]


def test_explain_waits_lists_waits_and_what_hides_them() -> None:
    both = work([toy(0)], [toy(1)], (block("outside", 5),))
    plain, better = run_in_turns(both, placed(0)), run_in_turns(both, placed(0, "dispatch_a"))
    assert explain_waits(plain, better) == [Waits("tokens", 6, (6, 1), ("nothing", "attn_core"))]


# -- recorded operations --------------------------------------------------------------------------

# This link is fast enough to hide some collectives; the profile's links hide none.
PROFILE = load_profile("h200")
COSTS = ProfileCosts(PROFILE, Link(latency=2e-6, bandwidth=2e11), 8)
DSV3 = from_hf(DSV3_SMALL, "dsv3-small")
MODELS = {"dsv4-tiny": with_layers(DSV4_TINY, 4), "dsv3-small": DSV3}
BATCHES = {
    ForwardMode.DECODE: ForwardBatch.decode(tuple(range(100, 613))),
    ForwardMode.EXTEND: ForwardBatch.extend((700, 900, 1000, 513, 77)),
}
OWN = tuple(
    OverlapStrategy(
        f"all marks, {lead} ahead",
        mode,
        tuple(step for name in NEEDS for step in (name, MARK)),
        lead,
    )
    for mode in ForwardMode
    for lead in (0, 3, 14)
) + tuple(OverlapStrategy("no mark", mode, tuple(NEEDS), 1) for mode in ForwardMode)
ALL = (*STRATEGIES.values(), *OWN)


def scenario(model: ModelConfig, *, ep: bool) -> Scenario:
    return Scenario(
        model=model,
        parallel=ParallelConfig(pp=1, tp=2, ep=ep, moe_a2a=True),
        policy=WarmupPolicy.NONE,
    )


def record_work(its: Scenario, batch: ForwardBatch, sms: int = 0) -> Work:
    return Forward(its, 0, batch).in_halves(sms, lambda ops: to_steps(ops, COSTS))


def run_in_turns(work: Work, strategy: OverlapStrategy) -> Turns:
    return run(work.in_turns(strategy))


@dataclass(frozen=True)
class BusyCosts(RoundCosts):
    """A profile's GPU times, charged to the host or the GPU; compiling and loading is free."""

    compile: float = 0.0
    load: float = 0.0
    bulk: float = 0.0
    on_host: bool = True

    def kernel_seconds(self, call: KernelCall) -> Seconds:
        return self._seconds(COSTS.kernel_seconds(call))

    def compute_seconds(self, op: Compute) -> Seconds:
        return self._seconds(COSTS.compute_seconds(op))

    def collective_seconds(self, op: Collective | Begin) -> float:
        return COSTS.collective_seconds(op)

    def _seconds(self, real: Seconds) -> Seconds:
        return Seconds(real.device, 0.0) if self.on_host else Seconds(0.0, real.device)


def engine_ends(ops: list[tuple[Op, ...]], *, run_ahead: bool) -> tuple[float, ...]:
    """End of each rank: all work runs on the host, or (``run_ahead``) all on the GPU."""
    costs = BusyCosts(on_host=not run_ahead)
    programs = [ProgramCompiler(costs, RULES).program(its) for its in ops]
    node_of = [0] * len(ops)
    engine = Engine(programs, costs, node_of=node_of, cores_per_node=8, run_ahead=run_ahead)
    return engine.run().ends


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ALL, ids=lambda s: f"{s.name}-{s.mode.value}")
def test_turns_and_engine_agree_on_the_end_of_overlapped_forwards(
    strategy: OverlapStrategy, model: str, ep: bool, run_ahead: bool
) -> None:
    its, batch = scenario(MODELS[model], ep=ep), BATCHES[strategy.mode]
    turns = run_in_turns(record_work(its, batch, strategy.comm_sms), strategy)
    overlapped = replace(its, overlap=(strategy,))
    ops = [record_forward(overlapped, rank, batch).ops for rank in (0, 1)]
    ends = engine_ends(ops, run_ahead=run_ahead)
    assert ends == pytest.approx((turns.seconds, turns.seconds), rel=1e-9)
    assert turns.compute + turns.exposed == pytest.approx(turns.seconds, rel=1e-9)
    assert 0 < turns.exposed < turns.communication


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ForwardMode)
def test_turns_and_engine_agree_on_the_end_of_an_unsplit_forward(
    mode: ForwardMode, model: str
) -> None:
    its, batch = scenario(MODELS[model], ep=True), BATCHES[mode]
    layers = record_work(its, batch).layers
    parts = Forward(its, 0, batch).whole(layers, lambda ops: to_steps(ops, COSTS))
    turns = run(parts)
    ends = engine_ends([record_forward(its, rank, batch).ops for rank in (0, 1)], run_ahead=False)
    assert len(parts) == len(layers) + 2
    assert ends == pytest.approx((turns.seconds, turns.seconds), rel=1e-9)


def test_dense_layers_are_not_overlapped() -> None:
    its = scenario(DSV3, ep=True)
    made = record_work(its, BATCHES[ForwardMode.DECODE])
    assert made.layers == range(1, 4) and [len(half) for half in made.halves] == [3, 3]
    operations = STRATEGIES["deepseek-decode"].operations
    assert all(tuple(layer) == operations for half in made.halves for layer in half)
    with pytest.raises(UserError, match=r"^this stage has no layer with experts"):
        record_work(scenario(with_layers(DSV3, 1), ep=True), BATCHES[ForwardMode.DECODE])


def test_single_sequence_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"^a batch of 1 sequence cannot be cut in two: give more"):
        record_work(scenario(DSV3, ep=True), ForwardBatch.extend((4096,)))


def test_fewer_sms_lengthen_compute_but_not_communication() -> None:
    its = scenario(MODELS["dsv4-tiny"], ep=True)
    strategy, batch = STRATEGIES["dsv4-prefill"], BATCHES[ForwardMode.EXTEND]
    all_sms, fewer = (run_in_turns(record_work(its, batch, sms), strategy) for sms in (0, 20))
    assert fewer.compute > all_sms.compute
    assert fewer.communication == pytest.approx(all_sms.communication, rel=1e-9)


def test_consecutive_compute_becomes_one_step() -> None:
    ops: list[Op] = [
        Compute("a", 1, 2),
        Compute("b", 3, 4),
        Collective("c", (0, 1), 5),
        Compute("d", 0, 0),
        Begin("e", (0, 1), 6),
        Compute("f", 7, 8),
    ]
    assert to_steps(ops, RoundCosts(collective=9.0)) == (
        gpu(6),
        block("c", 9),
        begin("e", 6),
        gpu(8),
    )
