"""Parallel layouts: ranks, groups, nodes and pipeline stages."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig, RankCoordinates, stage_sizes
from runner.config.presets import DSV3, DSV4, DSV4_PRO, DSV4_TINY
from runner.errors import UserError


@st.composite
def layouts(draw: st.DrawFn) -> ParallelConfig:
    attn_cp = draw(st.sampled_from([1, 2, 3, 4]))
    tp = attn_cp * draw(st.integers(1, 4))
    pp, replicas = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    world = tp * pp * replicas
    nodes = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    return ParallelConfig(pp=pp, tp=tp, attn_cp=attn_cp, replicas=replicas, nodes=nodes)


@given(layouts(), st.data())
def test_rank_and_coordinates_are_inverse(parallel: ParallelConfig, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, parallel.world_size - 1))
    at = parallel.coordinates(rank)
    assert parallel.rank_of(at.pp_rank, at.tp_rank, at.replica) == rank
    assert 0 <= at.pp_rank < parallel.pp
    assert 0 <= at.tp_rank < parallel.tp
    assert 0 <= at.replica < parallel.replicas


@given(layouts())
def test_ranks_are_numbered_replica_then_stage_then_tensor_rank(parallel: ParallelConfig) -> None:
    in_order = [
        RankCoordinates(replica, pp_rank, tp_rank)
        for replica in range(parallel.replicas)
        for pp_rank in range(parallel.pp)
        for tp_rank in range(parallel.tp)
    ]
    assert [parallel.coordinates(rank) for rank in range(parallel.world_size)] == in_order


@given(layouts())
def test_groups_partition_the_ranks(parallel: ParallelConfig) -> None:
    everyone = range(parallel.world_size)
    for group_of, size in (
        (parallel.tp_group, parallel.tp),
        (parallel.attn_cp_group, parallel.attn_cp),
    ):
        groups = {group_of(rank) for rank in everyone}
        assert all(rank in group_of(rank) and len(group_of(rank)) == size for rank in everyone)
        assert sorted(rank for group in groups for rank in group) == list(everyone)
        for group in groups:
            places = {(at.replica, at.pp_rank) for at in map(parallel.coordinates, group)}
            assert len(places) == 1


@given(layouts())
def test_nodes_hold_consecutive_ranks(parallel: ParallelConfig) -> None:
    nodes = [parallel.node_of(rank) for rank in range(parallel.world_size)]
    assert nodes == sorted(nodes)
    assert [nodes.count(node) for node in range(parallel.nodes)] == (
        [parallel.ranks_per_node] * parallel.nodes
    )


def test_groups_and_coordinates_of_one_layout() -> None:
    parallel = ParallelConfig(pp=2, tp=4, attn_cp=2, replicas=2, nodes=2)
    assert (parallel.world_size, parallel.ranks_per_node, parallel.attn_tp) == (16, 8, 2)
    assert parallel.coordinates(13) == RankCoordinates(replica=1, pp_rank=1, tp_rank=1)
    assert parallel.rank_of(1, 1, replica=1) == 13
    assert parallel.tp_group(13) == (12, 13, 14, 15)
    assert parallel.attn_cp_group(13) == (13, 15)
    assert parallel.node_of(13) == 1


@pytest.mark.parametrize("rank", [-1, 8])
def test_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(UserError) as caught:
        ParallelConfig(pp=2, tp=4).coordinates(rank)
    assert str(caught.value) == f"rank {rank} is outside 0..7"


@given(st.integers(1, 100), st.data())
def test_layers_split_evenly_with_extra_layers_in_last_stages(
    layers: int, data: st.DataObject
) -> None:
    pp = data.draw(st.integers(1, layers))
    sizes = stage_sizes(layers, pp)
    assert len(sizes) == pp
    assert sum(sizes) == layers
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes)
    parallel = ParallelConfig(pp=pp)
    ranges = [parallel.layer_range(layers, stage) for stage in range(pp)]
    assert [layer for stage in ranges for layer in stage] == list(range(layers))


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [
        (43, 1, [43]),
        (43, 2, [21, 22]),
        (43, 4, [10, 11, 11, 11]),
        (61, 4, [15, 15, 15, 16]),
        (61, 8, [7, 7, 7, 8, 8, 8, 8, 8]),
        (8, 8, [1] * 8),
    ],
)
def test_stage_sizes_of_known_models(layers: int, pp: int, expected: list[int]) -> None:
    assert stage_sizes(layers, pp) == expected


def test_explicit_stage_layers_determine_layer_ranges() -> None:
    parallel = ParallelConfig(pp=3, stage_layers=(20, 13, 10))
    assert [parallel.layer_range(43, stage) for stage in range(3)] == [
        range(0, 20),
        range(20, 33),
        range(33, 43),
    ]


@pytest.mark.parametrize("given_sizes", [(20, 20), (42, 2), (43, 0), (44, -1)])
def test_explicit_stage_layers_must_add_up_to_the_model(given_sizes: tuple[int, ...]) -> None:
    shown = ",".join(map(str, given_sizes))
    with pytest.raises(UserError) as caught:
        ParallelConfig(pp=2, stage_layers=given_sizes).check_fits(DSV4)
    assert str(caught.value) == (
        f"stage sizes {shown} must each be at least 1 and add up to 43 layers"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pp": 0}, "pp=0 must be at least 1"),
        ({"tp": -1}, "tp=-1 must be at least 1"),
        ({"attn_cp": 0}, "attn_cp=0 must be at least 1"),
        ({"replicas": 0}, "replicas=0 must be at least 1"),
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"tp": 4, "attn_cp": 3}, "attn_cp=3 must divide tp=4"),
        (
            {"pp": 2, "tp": 2, "replicas": 2, "nodes": 3},
            "nodes=3 must divide the 8 ranks of replicas=2 x pp=2 x tp=2",
        ),
        ({"pp": 3, "stage_layers": (1, 2)}, "2 stage sizes were given for pp=3 stages"),
    ],
)
def test_invalid_layouts_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ParallelConfig(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (DSV4_TINY, {"pp": 9}, "pp=9 stages need at least as many layers: the model has 8"),
        (DSV4, {"tp": 3}, "tp=3 must divide num_attention_heads=64 of dsv4"),
        (DSV4, {"tp": 16}, "tp=16 must divide o_groups=8 of dsv4"),
        # Attention is split over tp / attn_cp ranks, the vocabulary over all tp.
        (DSV4, {"tp": 6, "attn_cp": 3}, "tp=6 must divide vocab_size=129280 of dsv4"),
        (DSV4, {"tp": 6, "attn_cp": 2}, "tp=3 must divide num_attention_heads=64 of dsv4"),
        (
            DSV4_PRO,
            {"tp": 16},
            "tp=16 must cut moe_intermediate_size=3072 of dsv4-pro into multiples of 128 "
            "(FP8 scaling blocks)",
        ),
        (
            DSV4_TINY,
            {"tp": 16, "attn_cp": 8, "ep": True},
            "ep over tp=16 must divide n_routed_experts=8 of dsv4-tiny",
        ),
        (
            DSV3,
            {"tp": 32},
            "tp=32 must cut moe_intermediate_size=2048 of dsv3 into multiples of 128 "
            "(FP8 scaling blocks)",
        ),
    ],
)
def test_check_fits_refuses_layouts_that_do_not_divide_the_model(
    model: ModelConfig, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        ParallelConfig(**values).check_fits(model)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (DSV4, {"pp": 4, "tp": 8}),
        (DSV4, {"pp": 4, "tp": 8, "ep": True}),
        (DSV4, {"tp": 16, "attn_cp": 2}),
        (DSV4_PRO, {"pp": 4, "tp": 8}),
        (DSV3, {"pp": 2, "tp": 16}),
        (DSV4_TINY, {"pp": 8, "tp": 2, "replicas": 3}),
    ],
)
def test_check_fits_accepts_layouts_that_divide_the_model(
    model: ModelConfig, values: dict[str, Any]
) -> None:
    ParallelConfig(**values).check_fits(model)
