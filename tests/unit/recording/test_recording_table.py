"""The report of a recording."""

from __future__ import annotations

import io
from typing import Any

from runner.kernels.call_template import Template
from runner.recording.recording import CallGroup, Recording, Request, Seen
from runner.report.recording_table import print_recording, stalls_of


def group(name: str, reason: str = "", **phases: Seen) -> CallGroup:
    by_phase = {phase.replace("_", " "): seen for phase, seen in phases.items()}
    return CallGroup(Template(name, ["M"], {}), None, reason, [], phases=by_phase)


def recording(*groups: CallGroup, **values: Any) -> Recording:
    plain: dict[str, Any] = {
        "command": ["vllm"],
        "gpu": "",
        "library": "/dg",
        "ready": 12.4,
        "requests": [],
        "counts": {},
        "peak_bytes": {},
        "problems": [],
    }
    return Recording(groups=list(groups), **{**plain, **values})


def printed(made: Recording) -> list[str]:
    """The lines of the report, without those that are empty or a ruler."""
    file = io.StringIO()
    print_recording(made, file)
    lines = (" ".join(line.split()) for line in file.getvalue().splitlines())
    return [line for line in lines if line.strip(" ─")]


def test_report_names_gpu_time_and_calls_of_each_phase() -> None:
    one = group("f", load=Seen({1: 2}, ["a"]), ready=Seen({1: 5, 9: 1}))
    two = group("g", load=Seen({4: 1}, ["b", "a"]), capture=Seen({0: 3}))
    assert printed(recording(one, two, gpu="h200")) == [
        "ready after 12 s on a stand-in h200",
        "Calls of DeepGEMM",
        "phase functions calls entries made",
        "load 2 3 2",
        "capture 1 3 0",
        "ready 1 6 0",
    ]


def test_report_of_a_server_that_never_became_ready() -> None:
    lines = printed(recording(ready=None, server="vLLM 0.33.0"))
    assert lines[:2] == ["vLLM 0.33.0, /dg", "the server never became ready (on the GPU here)"]
    assert printed(recording(ready=None))[0] == "Calls of DeepGEMM"  # no server at all


def test_memory_is_that_of_the_largest_process() -> None:
    lines = printed(recording(peak_bytes={7: 1 << 30, 8: 3 << 29}))
    assert lines[1] == "memory of the largest of 2 processes: 1.5 GiB"


def test_what_compiled_after_it_was_ready_is_listed() -> None:
    ms = dict.fromkeys(range(1, 9), 1)
    one = group("f", load=Seen({1: 1}, ["a"]), request_of_5_tokens=Seen(ms, ["b", "c"]))
    two = group("g", warm_up=Seen({1: 1}, ["d"]), ready=Seen({0: 1}, ["e"]))
    made = recording(one, two, requests=[Request(5, 1.0, 2.0)])
    assert stalls_of(made) == [("request of 5 tokens", one), ("warm up", two), ("ready", two)]
    assert printed(made)[-4:] == [
        "by call M entries",
        "request of 5 tokens f(M) 1, 2, 3, 4, 5, 6 2",
        "warm up g(M) 1 1",
        "ready g(M) - 1",
    ]


def test_entries_of_the_start_are_no_stalls() -> None:
    one = group("f")
    for phase in ("start", "load", "warm-up", "capture"):
        one.phases[phase] = Seen({1: 1}, ["a"])
    quiet = "no request compiled anything after the server was ready"
    assert stalls_of(recording(one)) == []
    assert quiet not in printed(recording(one))
    assert printed(recording(one, requests=[Request(5, 1.0, 2.0)]))[-1] == quiet


def test_replaced_parts_calls_for_own_sizes_and_problems_are_listed() -> None:
    counts = {"bypass fi x": 1, "bypass fi x.run": 4, "fallback y": 1, "bypass z": 2}
    made = recording(
        group("f", "not known", load=Seen({0: 1})), counts=counts, problems=["one [b]", "two"]
    )
    assert printed(made)[-8:] == [
        "bypassed:",
        "fi x (5 times)",
        "z (2 times)",
        "fell back, as it logged:",
        "y (1 time)",
        "for its own sizes only: f(M) (not known)",
        "one [b]",
        "two",
    ]
