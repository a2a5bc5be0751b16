"""Start-up phases before the warm-up: imports, process group and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.config.hf import from_hf, with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.planning.weight_size import weight_size
from sim.costs.profile import Phase, StartUp
from sim.costs.start_up import PHASES, StartPhases, Weights, made_elements, start_phases
from sim.simulate import simulate
from tests.models import DSV3_SMALL
from tests.unit.tiny_runs import h200, machine, scenario

COSTS = StartUp(
    imports=Phase(3.0, 0.5),
    process_group=Phase(1.0, 0.25),
    weights=Phase(2.0, 0.125),
    weight_bandwidth={"disk": 1e6, "page-cache": 2e6},
    weights_made=4e6,
    capture=0.0,
    capture_operation=0.0,
    graph_free=0.1,
)
EVEN = ParallelConfig(pp=2, tp=2, replicas=2, nodes=4)
UNEVEN = replace(EVEN, stage_layers=(1, 7))


def seconds(
    wanted: StartPhases, hosts: int, parallel: ParallelConfig = EVEN, ranks_per_gpu: int = 1
) -> dict[str, float]:
    return dict(start_phases(wanted, COSTS, DSV4_TINY, parallel, hosts, ranks_per_gpu))


def stage_bytes(parallel: ParallelConfig) -> list[float]:
    return [weight_size(DSV4_TINY, parallel, parallel.rank_of(s, 0)).nbytes for s in (0, 1)]


def test_import_time_grows_with_ranks_per_host_and_process_group_with_all_ranks() -> None:
    names = StartPhases(("imports", "process group"))
    assert seconds(names, hosts=1) == {"imports": 7.0, "process group": 3.0}
    assert seconds(names, hosts=4) == {"imports": 4.0, "process group": 3.0}


def test_only_requested_phases_are_given_in_order() -> None:
    assert tuple(seconds(StartPhases(), hosts=4)) == PHASES
    assert tuple(seconds(StartPhases(("weights", "imports")), hosts=4)) == ("imports", "weights")
    assert seconds(StartPhases(()), hosts=4) == {}


def test_ranks_of_a_host_share_its_weight_bandwidth() -> None:
    first, last = stage_bytes(UNEVEN)
    assert last > 2 * first
    only = ("weights",)
    # Each of four hosts holds one stage of two ranks; the larger stage takes longest.
    found = seconds(StartPhases(only), 4, UNEVEN)["weights"]
    assert found == pytest.approx(2.25 + 2 * last / 1e6)
    # One host holds both stages of both replicas.
    found = seconds(StartPhases(only, Weights.PAGE_CACHE), 1, UNEVEN)["weights"]
    assert found == pytest.approx(3.0 + 4 * (first + last) / 2e6)


def test_ranks_of_a_gpu_make_dummy_weights_one_after_another() -> None:
    first, last = (weight_size(DSV4_TINY, UNEVEN, rank).shapes for rank in (0, 2))
    assert first < last
    made_up = StartPhases(("weights",), Weights.DUMMY)
    # Rank order: two tensor ranks of each stage, then the same for the other replica.
    for ranks_per_gpu, elements in (
        (1, last),
        (2, 2 * last),
        (3, 2 * first + last),
        (4, 2 * (first + last)),
        (8, 4 * (first + last)),
    ):
        assert made_elements(DSV4_TINY, UNEVEN, ranks_per_gpu) == elements
        found = seconds(made_up, 1, UNEVEN, ranks_per_gpu)["weights"]
        assert found == pytest.approx(3.0 + elements / 4e6)
    # The set-up time depends on the ranks of a host.
    assert seconds(made_up, 4, UNEVEN)["weights"] == pytest.approx(2.25 + last / 4e6)


def test_dummy_weights_of_one_kind_and_shape_are_made_once() -> None:
    """Two layers of a small model on two stages, counted by hand."""
    model = with_layers(from_hf(DSV3_SMALL, "dsv3-small"), 2)
    attention = 448 * 512 + 256 + 128 + 512 * 256 + 768 * 128 + 512 * 512
    # All norms of 512 share a buffer, and so do the outputs of attention and the dense layer.
    first = 512 + attention + 1024 * 512
    embedding = head = 1024 * 512
    # The shared expert's matrices have the shapes of attention's.
    experts = 8 * 512 + 8 + 8 * 512 * 512 + 8 * 512 * 256
    last = 512 + attention + experts
    stages = ParallelConfig(pp=2)
    assert made_elements(model, stages, 1) == last + head == 4_395_912
    assert made_elements(model, stages, 2) == first + embedding + last + head == 6_166_280
    # On one stage, buffers are shared between layers, and between head and embedding.
    assert made_elements(model, ParallelConfig(), 1) == first + embedding + experts


def test_run_starts_after_the_start_up_phases() -> None:
    one = scenario(pp=2, tp=1, nodes=2)
    bare, begun = (
        simulate(one, machine(start=start)).timeline for start in (StartPhases(()), StartPhases())
    )
    phases = start_phases(StartPhases(), h200().start_up, one.model, one.parallel, 2)
    total = sum(duration for _, duration in phases)
    spans = [s for s in begun.spans if s.kind == "phase" and s.name in PHASES]
    for rank in (0, 1):
        at = 0.0
        for span, (name, duration) in zip(
            (s for s in spans if s.rank == rank), phases, strict=True
        ):
            assert (span.name, span.start) == (name, pytest.approx(at))
            at += duration
            assert span.end == pytest.approx(at)
    assert begun.wall == pytest.approx(bare.wall + total)
    assert begun.up == pytest.approx(bare.up + total)
    assert begun.kernels_compiled == bare.kernels_compiled


def test_simulated_dummy_weights_take_ranks_per_gpu_into_account() -> None:
    one = scenario(pp=2, tp=2)
    start = StartPhases(("weights",), Weights.DUMMY)
    for ranks_per_gpu in (1, 2, 4):
        made = simulate(one, machine(start=start, ranks_per_gpu=ranks_per_gpu)).timeline
        expected = start_phases(start, h200().start_up, one.model, one.parallel, 1, ranks_per_gpu)
        assert made.phases()["weights"] == pytest.approx(dict(expected)["weights"])


def test_ranks_per_gpu_does_not_change_loading_real_weights() -> None:
    for weights in (Weights.DISK, Weights.PAGE_CACHE):
        alone, shared = (seconds(StartPhases(weights=weights), 2, UNEVEN, n) for n in (1, 4))
        assert alone == shared
