"""Which M are planned for the calls of a recording."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.token_to_m import hc_num_splits
from runner.kernels.call_template import CallShape, Template, generalise
from runner.kernels.table import Demand
from runner.planning.call_demands import CallDemands, call_demands
from runner.recording.recording import CallGroup, Recording, Seen

Args = list[Any]


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


def gemm(m: int, n: int = 256) -> Args:
    return [tensor("bfloat16", m, 64), tensor("bfloat16", n, 64), tensor("bfloat16", m, n)]


def contiguous(m: int) -> Args:
    weights = tensor("bfloat16", 8, 256, 64)
    return [tensor("bfloat16", m, 64), weights, tensor("bfloat16", m, 256), tensor("int32", m)]


def hyper(m: int, splits: int, k: int = 16384) -> Args:
    made = [tensor("float32", splits, m, 24), tensor("float32", splits, m)]
    return [tensor("bfloat16", m, k), tensor("float32", 24, k), *made, splits]


def group(
    function: str,
    args: Args,
    ms: Iterable[int],
    *,
    by: Sequence[str] = ("server.py:7:forward",),
    sms: int | None = None,
    **kwargs: Any,
) -> CallGroup:
    template, _ = generalise(function, args, kwargs)
    seen = Seen(dict.fromkeys(ms, 1))
    return CallGroup(template, sms, "", list(by), phases={"ready": seen})


def demands(*groups: CallGroup, max_tokens: int = 300, num_sms: int = 132) -> CallDemands:
    recording = Recording(groups=list(groups))
    return call_demands(recording, max_tokens=max_tokens, num_sms=num_sms)


def only(*groups: CallGroup, **values: int) -> Demand:
    found = demands(*groups, **values)
    assert found.notes == []
    (demand,) = found.demands
    return demand


def splits_of(shape: object) -> int:
    assert isinstance(shape, CallShape)
    template = shape.template
    (splits,) = {template.args[4], *(made["shape"][0] for made in template.args[2:4])}  # type: ignore[index]
    assert isinstance(splits, int)
    return splits


def test_gemm_is_planned_for_all_m_up_to_the_limit() -> None:
    made = group("bf16_gemm_nt", gemm(7), [7, 90])
    demand = only(made)
    assert demand.shape == CallShape.of(made.call, 132)
    assert list(demand.ms) == list(range(1, 301))
    assert demand.stages == (0,)


def test_m_that_were_seen_above_the_limit_are_planned_too() -> None:
    assert list(only(group("bf16_gemm_nt", gemm(7), [7, 500])).ms) == list(range(1, 501))


def test_sms_are_those_of_the_call_else_those_of_the_gpu() -> None:
    limited, free = (group("bf16_gemm_nt", gemm(7), [7], sms=sms) for sms in (100, None))
    found = demands(limited, free, num_sms=148).demands
    assert [demand.shape.num_sms for demand in found] == [100, 148]


def test_contiguous_rows_are_multiples_of_128() -> None:
    call = group("m_grouped_bf16_gemm_nt_contiguous", contiguous(256), [256])
    demand = only(call, max_tokens=600)
    assert (list(demand.ms), demand.shape.m_step) == ([128, 256, 384, 512], 128)
    prefix = group(
        "m_grouped_bf16_gemm_nt_contiguous", contiguous(256), [256], use_psum_layout=True
    )
    assert (len(only(prefix).ms), only(prefix).shape.m_step) == (300, 1)


@pytest.mark.parametrize(("seen", "step"), [([64, 128], 64), ([240, 480], 16), ([128, 300], 4)])
def test_contiguous_rows_of_a_smaller_alignment_are_covered(seen: list[int], step: int) -> None:
    call = group("m_grouped_bf16_gemm_nt_contiguous", contiguous(seen[0]), seen)
    demand = only(call, max_tokens=600)
    assert demand.shape.m_step == step
    assert list(demand.ms) == list(range(step, 601, step))


def test_call_without_m_is_planned_once() -> None:
    weights = group(
        "transform_sf_into_required_layout", [tensor("float32", 2, 2)], [0], is_sfa=False
    )
    assert list(only(weights).ms) == [1]


def test_what_only_a_walk_calls_is_planned_as_it_was_seen() -> None:
    walked = group(
        "bf16_gemm_nt",
        gemm(7),
        [8, 1, 512],
        by=["vllm/model_executor/warmup/deep_gemm_warmup.py:80:walk", "server.py:1:f"],
    )
    assert list(only(walked).ms) == [1, 8, 512]


def test_rows_that_the_caller_gives_to_another_library_are_not_planned() -> None:
    by = ["vllm/kernels/linear/scaled_mm/flashinfer.py:300:run"]
    assert only(group("bf16_gemm_nt", gemm(40), [40], by=by)).ms == range(32, 301)
    assert only(group("bf16_gemm_nt", gemm(40), [8, 40], by=by)).ms == range(8, 301)


def test_call_that_is_not_general_is_planned_alone_and_noted() -> None:
    template = Template("new_function", [tensor("bfloat16", 3, 4)], {})
    call = CallGroup(template, None, "not known", [], phases={"load": Seen({0: 2})})
    found = demands(call)
    assert found.demands == [Demand(CallShape.of(template, 132), (1,))]
    assert found.notes == [
        "planned for its own sizes only: new_function(bfloat16[3,4]) (not known)"
    ]


# -- the hyper-connection GEMM


def by_rule(m: int, buckets: Sequence[int] = (), k: int = 16384, sms: int = 132) -> int:
    wanted = hc_num_splits(m, k, sms)
    return max((splits for splits in buckets if splits <= wanted), default=wanted)


def hypers(ms: Iterable[int], buckets: Sequence[int] = (), **values: Any) -> list[CallGroup]:
    by_splits: dict[int, list[int]] = {}
    for m in ms:
        by_splits.setdefault(by_rule(m, buckets), []).append(m)
    return [
        group("tf32_hc_prenorm_gemm", hyper(ms[0], splits), ms, **values)
        for splits, ms in by_splits.items()
    ]


@pytest.mark.parametrize("buckets", [(), (1, 4, 16), (1, 2, 4, 8, 16)])
def test_splits_of_other_m_follow_the_rule_that_explains_the_seen_ones(
    buckets: tuple[int, ...],
) -> None:
    found = demands(*hypers([1, 300, 1000, 3000], buckets), max_tokens=9000)
    assert found.notes == []
    planned = {m: splits_of(demand.shape) for demand in found.demands for m in demand.ms}
    assert planned == {m: by_rule(m, buckets) for m in range(1, 9001)}
    assert sum(len(demand.ms) for demand in found.demands) == 9000


def test_splits_that_no_rule_explains_are_planned_as_they_were_seen() -> None:
    calls = [
        group("tf32_hc_prenorm_gemm", hyper(4, 3), [4, 9]),
        group("tf32_hc_prenorm_gemm", hyper(4, 5), [70]),
    ]
    found = demands(*calls)
    assert [(splits_of(each.shape), list(each.ms)) for each in found.demands] == [
        (3, [4, 9]),
        (5, [70]),
    ]
    (note,) = found.notes
    assert note.startswith("planned for the numbers of splits that were seen only: tf32_hc_")


def test_one_m_with_two_numbers_of_splits_is_planned_with_both() -> None:
    splits = by_rule(8)
    calls = [group("tf32_hc_prenorm_gemm", hyper(8, n), [8]) for n in (2, splits)]
    found = demands(*calls).demands
    assert {splits_of(each.shape): list(each.ms) for each in found} == {2: [8], splits: [8]}


def test_splits_of_other_places_follow_their_own_rules() -> None:
    one = hypers([1, 300], (1, 4, 16), by=["a.py:1:fused"])
    two = hypers([1, 300], (), by=["b.py:2:plain"])
    found = demands(*one, *two, max_tokens=8)
    assert [splits_of(each.shape) for each in found.demands[:1]] == [16]
    planned = {splits_of(each.shape) for each in found.demands}
    assert planned == {by_rule(m, b) for m in range(1, 301) for b in ((), (1, 4, 16))}


def test_hyper_connection_without_splits_is_a_gemm() -> None:
    args = [*hyper(8, 1)[:2], tensor("float32", 8, 24), tensor("float32", 8), None]
    demand = only(group("tf32_hc_prenorm_gemm", args, [8]))
    assert list(demand.ms) == list(range(1, 301))


def test_hyper_connection_of_no_rows_is_planned_alone() -> None:
    template = Template("tf32_hc_prenorm_gemm", hyper(0, 4), {})
    call = CallGroup(template, None, "a tensor has 0 rows", [], phases={"load": Seen({0: 1})})
    found = demands(call, *hypers([9]))
    assert found.demands[0] == Demand(CallShape.of(template, 132), (1,))
    assert len(found.notes) == 1
    assert {m for each in found.demands[1:] for m in each.ms} == set(range(1, 301))


@pytest.mark.parametrize("k", [256, 16384])
def test_splits_by_name_and_other_keywords_are_kept(k: int) -> None:
    args = hyper(9, by_rule(9, k=k), k)
    more: dict[str, Any] = {"out": {"object": "float32"}, "flag": True, "eps": None}
    call = group("tf32_hc_prenorm_gemm", args[:4], [9], num_splits=args[4], **more)
    for demand in demands(call, max_tokens=200).demands:
        assert isinstance(demand.shape, CallShape)
        kwargs = demand.shape.template.kwargs
        assert kwargs == {"num_splits": by_rule(demand.ms[0], k=k), **more}
        assert kwargs["flag"] is True


# -- every recorded call is covered


@st.composite
def groups(draw: st.DrawFn) -> CallGroup:
    ms = sorted(draw(st.sets(st.integers(1, 700), min_size=1, max_size=5)))
    sms = draw(st.sampled_from([None, 100]))
    walks = "deep_gemm_wrapper/compile_utils.py:1:f"
    by = draw(st.sampled_from([[], ["a.py:1:f"], ["b.py:1:g"], [walks]]))
    kind = draw(st.sampled_from(["dense", "contiguous", "hyper"]))
    if kind == "dense":
        return group("bf16_gemm_nt", gemm(ms[0]), ms, sms=sms, by=by)
    if kind == "contiguous":
        name = "m_grouped_bf16_gemm_nt_contiguous"
        return group(name, contiguous(ms[0]), ms, sms=sms, by=by)
    buckets = draw(st.sampled_from([(), (1, 4, 16), (1, 2, 4, 8, 16)]))
    follows = draw(st.booleans())
    splits = by_rule(ms[0], buckets, sms=sms or 132) if follows else draw(st.integers(1, 40))
    same = [m for m in ms if by_rule(m, buckets, sms=sms or 132) == splits] or ms
    return group("tf32_hc_prenorm_gemm", hyper(same[0], splits), same, sms=sms, by=by)


@given(st.lists(groups(), max_size=6), st.integers(1, 800))
def test_every_recorded_call_is_in_the_demands(calls: list[CallGroup], max_tokens: int) -> None:
    found = demands(*calls, max_tokens=max_tokens)
    planned: dict[tuple[str, int], set[int]] = {}
    for demand in found.demands:
        assert isinstance(demand.shape, CallShape)
        assert list(demand.ms) == sorted(set(demand.ms)) and demand.ms[0] >= 1
        assert all((m - demand.ms[0]) % demand.shape.m_step == 0 for m in demand.ms)
        key = demand.shape.text, demand.shape.num_sms
        planned.setdefault(key, set()).update(demand.ms)
    for call in calls:
        sms = call.num_sms or 132
        assert planned[CallShape.of(call.call, sms).text, sms] >= set(call.ms)


def test_call_that_failed_in_the_server_is_listed_and_not_planned() -> None:
    made = group("bf16_gemm_nt", gemm(7), [7])
    made.errors.append("RuntimeError: no such layout")
    found = demands(made)
    assert found.demands == []
    assert found.notes == [
        f"not planned: {made.title} (it failed in the server: RuntimeError: no such layout)"
    ]


def test_call_with_an_argument_that_cannot_be_made_again_is_listed_and_not_planned() -> None:
    made = group("bf16_gemm_nt", [*gemm(7), {"object": "<Stream 7>"}], [7])
    found = demands(made)
    assert found.demands == []
    assert found.notes == [f"not planned: {made.title} (the argument <Stream 7> is no plain value)"]
    assert demands(group("bf16_gemm_nt", [*gemm(7), {"object": "float32"}], [7])).notes == []
