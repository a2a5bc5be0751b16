"""Reading what the hook wrote: events of each process, also of ones that were killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.recording.events import ProcessRecord, RecordedCall, read_processes


def call(number: int, function: str = "f", **values: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "args": [],
        "kwargs": {},
        "num_sms": None,
        "phase": "start",
        "rank": None,
        "by": [],
        "started": 1.0,
        "seconds": 0.5,
        "entries": [],
        "error": None,
    }
    return {"event": "call", "number": number, "function": function, **plain, **values}


def write(folder: Path, name: str, *events: dict[str, Any]) -> None:
    lines = (json.dumps({"time": 1.0, **event}) + "\n" for event in events)
    (folder / f"{name}.jsonl").write_text("".join(lines))


def only(folder: Path) -> ProcessRecord:
    (found,) = read_processes(folder)
    return found


def test_every_kind_of_event_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        "7-a",
        {"event": "process", "pid": 7, "parent": 1, "argv": ["vllm", "serve"]},
        {"event": "library", "module": "deep_gemm", "file": "/dg/__init__.py", "version": "2"},
        {"event": "bypass", "name": "flashinfer x", "count": 1},
        {"event": "fallback", "name": "y", "count": 1},
        call(0, "f", args=[1], rank=3, entries=["kernel.a"], by=["a.py:1:f"]),
        {"event": "calls", "counts": [[0, 5]]},
        {"event": "counts", "counts": {"bypass flashinfer x": 4}},
        {"event": "stopped", "error": "OSError()"},
    )
    found = RecordedCall(
        "f", [1], {}, None, "start", 3, ["a.py:1:f"], 1.0, 0.5, ["kernel.a"], None, count=5
    )
    assert only(tmp_path) == ProcessRecord(
        pid=7,
        argv=["vllm", "serve"],
        libraries=[("deep_gemm", "/dg/__init__.py")],
        calls=[found],
        counts={"bypass flashinfer x": 4, "fallback y": 1},
        stopped="OSError()",
    )


def test_later_counts_replace_earlier_ones(tmp_path: Path) -> None:
    counts = [{"event": "calls", "counts": [[1, 2]]}, {"event": "calls", "counts": [[1, 9]]}]
    write(tmp_path, "7-a", call(0), call(1), *counts)
    assert [each.count for each in only(tmp_path).calls] == [1, 9]


def test_counts_belong_to_numbers_whatever_the_order_of_calls(tmp_path: Path) -> None:
    counts = {"event": "calls", "counts": [[0, 5], [1, 7]]}
    write(tmp_path, "7-a", call(1, "second"), call(0, "first"), counts)
    found = only(tmp_path).calls
    assert {each.function: each.count for each in found} == {"first": 5, "second": 7}


def test_processes_are_in_the_order_of_their_starts(tmp_path: Path) -> None:
    for pid, start in ((30, "ff"), (4, "1000"), (200, "2")):
        write(tmp_path, f"{pid}-{start}", {"event": "process", "pid": pid, "argv": []})
    (tmp_path / "phase").write_text("ready")
    assert [each.pid for each in read_processes(tmp_path)] == [200, 30, 4]


def test_folder_without_records_has_no_processes(tmp_path: Path) -> None:
    assert read_processes(tmp_path) == []


def test_what_follows_half_a_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "7-a", call(0), call(1))
    path = tmp_path / "7-a.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n") + (whole[cut : cut + 1] == b"\n")
        assert len(only(tmp_path).calls) == lines
