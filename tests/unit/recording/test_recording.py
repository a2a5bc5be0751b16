"""Recordings: calls joined over M, processes and phases, and their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.files import write_json
from runner.kernels.call_template import Template, generalise
from runner.recording.events import ProcessRecord, RecordedCall
from runner.recording.grouping import group_calls
from runner.recording.recording import (
    CallGroup,
    Recording,
    Request,
    Seen,
    read_recording,
    to_json,
)


def tensor(dtype: str, *shape: int, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), **more}


def gemm(m: int, n: int = 256) -> list[Any]:
    return [tensor("bfloat16", m, 64), tensor("bfloat16", n, 64), tensor("bfloat16", m, n)]


def called(args: list[Any], function: str = "bf16_gemm_nt", **values: Any) -> RecordedCall:
    plain: dict[str, Any] = {
        "kwargs": {},
        "num_sms": None,
        "phase": "start",
        "rank": None,
        "by": [],
        "started": 0.0,
        "seconds": 0.0,
        "entries": [],
        "error": None,
    }
    return RecordedCall(function, args, **{**plain, **values})


def grouped(*calls: RecordedCall) -> list[CallGroup]:
    return group_calls([ProcessRecord(calls=list(calls))])


def test_calls_that_differ_in_m_alone_are_one_group() -> None:
    (group,) = grouped(called(gemm(7), count=3), called(gemm(1)), called(gemm(7), count=2))
    assert group.title == "bf16_gemm_nt(bfloat16[M,64], bfloat16[256,64], bfloat16[M,256])"
    assert group.phases == {"start": Seen({7: 5, 1: 1})}
    assert (group.ms, group.phases["start"].calls) == ([1, 7], 6)
    assert (group.reason, group.ranks, group.errors) == ("", set(), [])


def test_calls_with_other_sizes_keywords_or_sms_are_other_groups() -> None:
    calls = [
        called(gemm(7)),
        called(gemm(7, n=512)),
        called(gemm(7), num_sms=100),
        called(gemm(7), kwargs={"c": None}),
        called(gemm(7), "fp8_gemm_nt"),
    ]
    assert len(grouped(*calls, *calls)) == 5


def test_group_has_what_all_processes_saw_by_phase() -> None:
    one = called(
        gemm(4), rank=0, phase="load", entries=["a"], seconds=2.0, started=1.0, by=["x.py:1:f"]
    )
    two = called(gemm(4), rank=1, phase="load", entries=["b"], seconds=3.0, started=2.0)
    late = called(gemm(8), rank=1, phase="ready", entries=["c"], started=9.0, error="E: no")
    again = called(gemm(8), rank=1, phase="ready", started=9.5, error="E: no", count=4)
    (group,) = group_calls([ProcessRecord(calls=[late, two]), ProcessRecord(calls=[again, one])])
    assert group.ranks == {0, 1}
    assert group.by == ["x.py:1:f"]
    assert group.phases == {
        "load": Seen({4: 2}, ["a", "b"], 3.0),
        "ready": Seen({8: 5}, ["c"], 0.0),
    }
    assert list(group.phases) == ["load", "ready"]
    assert group.errors == ["E: no"]


def test_groups_are_in_the_order_of_their_first_calls() -> None:
    first, second = called(gemm(1, n=8), started=1.0), called(gemm(1, n=16), started=2.0)
    groups = group_calls([ProcessRecord(calls=[second]), ProcessRecord(calls=[first])])
    assert [group.call.at(1)[0][1] for group in groups] == [gemm(1, n)[1] for n in (8, 16)]


def scaled(m: int) -> list[Any]:
    padded = (m + 3) // 4 * 4
    scales = tensor("float32", m, 2, stride=[1, padded])
    weights = tensor("float8_e4m3fn", 64, 256)
    return [[tensor("float8_e4m3fn", m, 256), scales], weights, tensor("bfloat16", m, 64)]


@pytest.mark.parametrize("order", [[1, 9, 30], [9, 1, 30], [30, 9, 1], [1, 9], [9, 1]])
def test_call_with_one_row_joins_the_group_that_gives_the_same_call(order: list[int]) -> None:
    ms = {m: number for number, m in enumerate(order)}
    (group,) = grouped(*(called(scaled(m), started=ms[m]) for m in order))
    assert group.ms == sorted(order)
    assert group.call.at(50) == (scaled(50), {})


def test_call_that_is_not_general_has_a_reason_and_no_m() -> None:
    calls = [called([tensor("bfloat16", m, 4)], "new_function", count=2) for m in (3, 3, 5)]
    one, two = grouped(*calls)
    assert one.reason == two.reason == "which sizes of new_function follow the tokens is not known"
    assert (one.ms, one.phases) == ([], {"start": Seen({0: 4})})
    assert one.call == Template("new_function", [tensor("bfloat16", 3, 4)], {})


def calls_of_gemms() -> st.SearchStrategy[RecordedCall]:
    return st.builds(
        lambda m, n, phase, sms, rank, count, at: called(
            gemm(m, n), phase=phase, num_sms=sms, rank=rank, count=count, started=at
        ),
        st.integers(1, 20),
        st.sampled_from([64, 256]),
        st.sampled_from(["load", "ready"]),
        st.sampled_from([None, 100]),
        st.integers(0, 2),
        st.integers(1, 9),
        st.floats(0, 9),
    )


@given(st.lists(calls_of_gemms(), max_size=12))
def test_groups_have_every_call_once(calls: list[RecordedCall]) -> None:
    expected: dict[str, int] = {}
    for call in calls:
        key = json.dumps([call.args, call.num_sms, call.phase])
        expected[key] = expected.get(key, 0) + call.count
    found: dict[str, int] = {}
    for group in grouped(*calls):
        for phase, seen in group.phases.items():
            for m, count in seen.counts.items():
                key = json.dumps([group.call.at(m)[0], group.num_sms, phase])
                assert key not in found
                found[key] = count
    assert found == expected


# -- JSON


def recordings() -> st.SearchStrategy[Recording]:
    text, number = st.text(max_size=5), st.integers(0, 5000)
    numbers = st.floats(0, 1e6)
    plain = st.one_of(text, number, st.booleans(), st.none())
    data = st.recursive(plain, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
    seen = st.builds(
        Seen,
        st.dictionaries(st.integers(0, 300), st.integers(1, 3), max_size=40),
        st.lists(text, max_size=3),
        numbers,
    )
    template = st.builds(
        Template, text, st.lists(data, max_size=3), st.dictionaries(text, data, max_size=2)
    )
    groups = st.builds(
        CallGroup,
        template,
        st.none() | number,
        text,
        st.lists(text, max_size=2),
        st.sets(number, max_size=3),
        st.dictionaries(text, seen, max_size=3),
        st.lists(text, max_size=2),
    )
    return st.builds(
        Recording,
        command=st.lists(text, max_size=3),
        gpu=text,
        library=text,
        ready=st.none() | numbers,
        requests=st.lists(st.builds(Request, number, numbers, numbers, text), max_size=2),
        groups=st.lists(groups, max_size=3),
        counts=st.dictionaries(text, number, max_size=3),
        peak_bytes=st.dictionaries(number, number, max_size=3),
        problems=st.lists(text, max_size=2),
    )


@given(recordings())
def test_recording_round_trips_through_its_file(
    tmp_path_factory: pytest.TempPathFactory, recording: Recording
) -> None:
    path = tmp_path_factory.getbasetemp() / "recording.json"
    write_json(path, to_json(recording))
    assert read_recording(path) == recording


def test_long_lists_of_m_are_short_in_json(tmp_path: Path) -> None:
    template, _ = generalise("bf16_gemm_nt", gemm(3), {})
    counts = {**dict.fromkeys(range(1, 5000), 2), **dict.fromkeys(range(8192, 16385, 128), 1)}
    group = CallGroup(template, None, "", [], phases={"load": Seen(counts)})
    recording = Recording(groups=[group])
    path = tmp_path / "recording.json"
    write_json(path, to_json(recording))
    assert len(path.read_bytes()) < 700
    assert read_recording(path) == recording


def test_entries_are_distinct_and_may_be_those_of_some_phases() -> None:
    one = called(gemm(1), phase="load", entries=["b", "a"])
    two = called(gemm(2), phase="ready", entries=["c", "a"])
    recording = Recording(groups=grouped(one, two))
    assert recording.entries() == ["a", "b", "c"]
    assert recording.entries(["ready"]) == ["a", "c"]
    assert recording.entries([]) == []


EMPTY = to_json(Recording())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a recording: JSONDecodeError"),
        ("[" * 200_000, "is not a recording: ValueError.*nested too deeply"),
        ("[]", "is not a recording of runner record or runner rehearse"),
        ('{"kind": "timeline"}', "is not a recording of runner record or runner rehearse"),
        ('{"kind": "recording"}', "is not a recording: KeyError"),
        (json.dumps({**EMPTY, "version": 2}), "has version 2: this tool reads 1"),
        (json.dumps({**EMPTY, "calls": 3}), "is not a recording: TypeError"),
        (json.dumps({**EMPTY, "calls": [[]]}), "is not a recording: TypeError"),
        (json.dumps({**EMPTY, "requests": [{"a": 1}]}), "is not a recording: TypeError"),
        (json.dumps({**EMPTY, "peak_bytes": {"a": 1}}), "is not a recording: ValueError"),
        (json.dumps({**EMPTY, "peak_bytes": []}), "is not a recording: AttributeError"),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_recording_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recording.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_recording(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_unreadable_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read .*none: No such file"):
        read_recording(tmp_path / "none")
