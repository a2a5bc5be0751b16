"""Which dummy forwards a warm-up runs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.errors import UserError
from runner.forward_batch import ForwardMode
from runner.scenario import Scenario, record, record_rank
from runner.schedule import Mark, Op, Recv, Send
from runner.warmup import (
    DisaggregationMode,
    WarmupOptions,
    WarmupPolicy,
    dummy_modes,
    pp_parallel_batch_sizes,
    resolve_batch_sizes,
)

DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND
MODEL = with_layers(DSV4_TINY, 2)


@pytest.mark.parametrize(
    ("num_sms", "alignment", "expected"),
    [
        (132, 1, (1, 128, 1024, 2112, 8448)),
        (132, 2, (2, 128, 1024, 2112, 8448)),
        (132, 5, (5, 130, 1025, 2115, 8450)),
        (132, 256, (256, 1024, 2304, 8448)),
        (78, 1, (1, 128, 576, 1216, 4992)),
        # Few SMs: the lower bounds hold, and equal sizes collapse.
        (8, 1, (1, 128, 256, 512)),
        (2, 1, (1, 128, 256)),
    ],
)
def test_the_five_batch_sizes(num_sms: int, alignment: int, expected: tuple[int, ...]) -> None:
    assert pp_parallel_batch_sizes(num_sms, alignment) == expected
    assert resolve_batch_sizes(None, num_sms, alignment) == expected


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=8).map(tuple),
    st.integers(1, 200),
    st.integers(1, 16),
)
def test_given_batch_sizes_are_rounded_up(
    sizes: tuple[int, ...], num_sms: int, alignment: int
) -> None:
    resolved = resolve_batch_sizes(sizes, num_sms, alignment)
    assert list(resolved) == sorted(set(resolved))
    assert all(size % alignment == 0 for size in resolved)
    assert all(any(0 <= after - size < alignment for after in resolved) for size in sizes)
    assert len(resolved) <= len(set(sizes))


def test_given_batch_sizes_below_one() -> None:
    with pytest.raises(UserError) as caught:
        resolve_batch_sizes((4, 0), 132, 1)
    assert str(caught.value) == "batch sizes 4,0 must all be at least 1"


@pytest.mark.parametrize(
    ("disaggregation", "is_generation", "expected"),
    [
        (DisaggregationMode.NONE, True, (DECODE, EXTEND)),
        (DisaggregationMode.NONE, False, (EXTEND,)),
        (DisaggregationMode.PREFILL, True, (EXTEND,)),
        (DisaggregationMode.PREFILL, False, (EXTEND,)),
        (DisaggregationMode.DECODE, True, (DECODE,)),
        (DisaggregationMode.DECODE, False, ()),
    ],
)
def test_modes_of_a_disaggregated_server(
    disaggregation: DisaggregationMode, is_generation: bool, expected: tuple[ForwardMode, ...]
) -> None:
    options = WarmupOptions(policy=WarmupPolicy.PP_PARALLEL, disaggregation=disaggregation)
    assert dummy_modes(options, is_generation=is_generation) == expected


def scenario(parallel: ParallelConfig, **options: Any) -> Scenario:
    values = {"policy": WarmupPolicy.PP_PARALLEL, "batch_sizes": (1, 128), **options}
    return Scenario(model=MODEL, parallel=parallel, warmup=WarmupOptions(**values))


def phase(ops: tuple[Op, ...], name: str) -> list[Op]:
    """Operations between a phase's mark and the next."""
    marks = [i for i, op in enumerate(ops) if isinstance(op, Mark) and op.kind == "phase"]
    first = next(i for i in marks if ops[i] == Mark("phase", name))
    return list(ops[first + 1 : next(i for i in marks if i > first)])


def forwards(ops: list[Op]) -> list[str]:
    return [op.name for op in ops if isinstance(op, Mark) and op.kind == "forward"]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_stage_runs_decode_then_extend_at_each_size(rank: int) -> None:
    ops = record_rank(scenario(ParallelConfig(pp=2)), rank)
    assert forwards(phase(ops, "warm-up")) == ["DECODE 1", "EXTEND 1", "DECODE 128", "EXTEND 128"]
    assert forwards(phase(ops, "requests")) == ["EXTEND 1", "DECODE 1", "EXTEND 128", "DECODE 128"]


def test_the_warm_up_waits_for_no_other_stage() -> None:
    for ops in record(scenario(ParallelConfig(pp=2, tp=2))).ranks:
        assert not [op for op in phase(ops, "warm-up") if isinstance(op, (Send, Recv))]
        assert [op for op in phase(ops, "requests") if isinstance(op, (Send, Recv))]


@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        (ParallelConfig(pp=1, tp=2), {}),
        (ParallelConfig(pp=2), {"policy": WarmupPolicy.NONE}),
        (ParallelConfig(pp=2), {"speculative": True}),
    ],
    ids=["one stage", "policy none", "speculative"],
)
def test_no_warm_up(parallel: ParallelConfig, options: dict[str, Any]) -> None:
    ops = record_rank(scenario(parallel, **options), 1)
    assert phase(ops, "warm-up") == []
    assert len(forwards(phase(ops, "requests"))) == 4


@pytest.mark.parametrize(
    ("disaggregation", "mode"),
    [(DisaggregationMode.PREFILL, "EXTEND"), (DisaggregationMode.DECODE, "DECODE")],
)
def test_a_split_server_runs_its_own_mode_only(
    disaggregation: DisaggregationMode, mode: str
) -> None:
    ops = record_rank(scenario(ParallelConfig(pp=2), disaggregation=disaggregation), 1)
    for name in ("warm-up", "requests"):
        assert forwards(phase(ops, name)) == [f"{mode} 1", f"{mode} 128"]


def test_batch_sizes_follow_context_parallelism() -> None:
    parallel = ParallelConfig(pp=2, tp=2, attn_cp=2)
    ops = record_rank(scenario(parallel, batch_sizes=(1, 3)), 3)
    assert forwards(phase(ops, "warm-up")) == ["DECODE 2", "EXTEND 2", "DECODE 4", "EXTEND 4"]
