"""The executing sink: what it notes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from launch.loaders import OwnJit
from launch.rank_sink import RankSink
from launch.watchdog import Communication
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall
from runner.schedule import (
    Await,
    Begin,
    Capture,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Recv,
    Send,
    Walk,
)
from runner.timeline import Span

CALL = KernelCall(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 1, 24, 64, 1, 132)


class NewOnce:
    """A loader for which each kernel is new once."""

    def __init__(self) -> None:
        self.seen: set[Kernel] = set()
        self.walked: list[Walk] = []

    def lacks(self, kernels: Sequence[Kernel]) -> bool:
        return not self.seen.issuperset(kernels)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        self.seen.update(kernels)

    def load(self, kernels: Sequence[Kernel]) -> None:
        self.seen.update(kernels)

    def walk(self, walk: Walk) -> None:
        self.walked.append(walk)


@pytest.mark.parametrize("inside", [True, False])
def test_a_first_use_is_a_load_and_the_next_is_compute(inside: bool) -> None:
    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=inside)
    assert sink.run(CALL, lambda: 7) == 7
    first = [span.kind for span in sink.spans]
    assert first == (["load"] if inside else ["load", "compute"])
    sink.run(CALL, lambda: 7)
    assert [span.kind for span in sink.spans][len(first) :] == ["compute"]


def test_without_a_compiler_nothing_is_loaded() -> None:
    sink = RankSink(0, OwnJit(None, RULES), RULES, synchronise=lambda: None, inside=False)
    sink.run(CALL, lambda: None)
    assert [span.kind for span in sink.spans] == ["compute"]


def test_operations_are_kept_and_their_partners_have_one_key() -> None:
    ops: list[Op] = [
        Collective("all_reduce x", (0, 1), 4),
        Send("h", 1, 4),
        Recv("h", 1, 4),
        Collective("all_reduce x", (0, 1), 4),
    ]
    one, two = (
        RankSink(rank, NewOnce(), RULES, synchronise=lambda: None, inside=False) for rank in (0, 1)
    )
    for op in ops:
        one.run(op, lambda: None)
    for op in (ops[0], Recv("h", 0, 4), Send("h", 0, 4), ops[3]):
        two.run(op, lambda: None)
    assert one.ops == ops
    keys = [[span.key for span in sink.spans if span.kind == "comm"] for sink in (one, two)]
    assert keys[0] == ["0,1 #1", "0>1 #1", "1>0 #1", "0,1 #2"] == keys[1]


def test_phases_and_forwards_are_told() -> None:
    told: list[tuple[str, str]] = []
    sink = RankSink(
        0,
        NewOnce(),
        RULES,
        synchronise=lambda: None,
        inside=False,
        on_forward=lambda phase, name: told.append((phase, name)),
    )
    for op in (
        Mark("phase", "warm-up"),
        Mark("forward", "DECODE 1"),
        Compute("x", 1, 1),
        Mark("phase", "requests"),
        Mark("forward", "EXTEND 8"),
        Mark("phase", "end"),
    ):
        sink.run(op, lambda: None)
    assert told == [("warm-up", "DECODE 1"), ("requests", "EXTEND 8")]
    assert [s.name for s in sink.spans if s.kind == "phase"] == ["warm-up", "requests"]


def test_the_device_is_waited_for_before_and_after_communication() -> None:
    waits: list[str] = []
    sink = RankSink(
        0,
        NewOnce(),
        RULES,
        synchronise=lambda: waits.append("wait"),
        inside=True,
        arrive=lambda: waits.append("arrive"),
    )
    sink.run(Collective("all_reduce x", (0, 1), 4), lambda: waits.append("move"))
    assert waits == ["wait", "move", "arrive"]
    assert [(span.kind, span.name) for span in sink.spans] == [
        ("compute", "device"),
        ("comm", "all_reduce x"),
    ]


WALK = Walk(GemmShape(CALL.type, 24, 64, 1, 132), ((1, 64, 1),))


def test_a_walk_is_a_load() -> None:
    loader = NewOnce()
    sink = RankSink(3, loader, RULES, synchronise=lambda: None, inside=True)
    sink.run(WALK, lambda: loader.walk(WALK))
    assert (loader.walked, sink.ops) == ([WALK], [WALK])
    assert sink.last == "walk tf32_hc_prenorm_gemm:24:64:1"
    (span,) = sink.spans
    assert (span.rank, span.kind, span.name) == (3, "load", sink.last)


def test_work_on_kernels_is_a_load_but_for_a_build() -> None:
    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=True)
    for action in ("build", "verify", "load"):
        sink.run(KernelWork(action, ()), lambda: None)
    assert [span.name for span in sink.spans] == ["verify 0 kernels", "load 0 kernels"]
    assert {span.kind for span in sink.spans} == {"load"}


def test_the_lock_is_held_around_a_first_use_and_a_walk_only() -> None:
    events: list[str] = []

    @contextmanager
    def lock(shape: GemmShape) -> Iterator[None]:
        events.append(f"lock {shape.describe()}")
        yield
        events.append("unlock")

    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=True, lock=lock)
    ops: list[Op] = [
        CALL,
        CALL,
        Compute("x", 1, 1),
        Collective("all_reduce x", (0, 1), 4),
        Mark("layer", "1"),
        KernelWork("load", ()),
        WALK,
    ]
    for op in ops:
        sink.run(op, lambda: events.append("act"))
    held = ["lock tf32_hc_prenorm_gemm:24:64:1", "act", "unlock"]
    assert events == [*held, *["act"] * 5, *held]


def test_a_wait_for_the_lock_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.rank_sink.time.time", lambda: now)

    @contextmanager
    def lock(shape: GemmShape) -> Iterator[None]:
        nonlocal now
        now += 5
        yield

    sink = RankSink(2, NewOnce(), RULES, synchronise=lambda: None, inside=True, lock=lock)
    sink.run(CALL, lambda: None)
    assert sink.spans == [
        Span(2, 100, 105, "wait", "compile lock"),
        Span(2, 105, 105, "load", "tf32_hc_prenorm_gemm"),
    ]


def test_a_capture_counts_operations_and_times_nothing_inside() -> None:
    loader = NewOnce()
    graphs: list[str] = []

    def forward() -> None:
        for op in (Mark("forward", "DECODE 8"), CALL, Compute("x", 1, 1), CALL):
            sink.run(op, lambda: graphs.append("act"))

    sink = RankSink(
        0,
        loader,
        RULES,
        synchronise=lambda: graphs.append("wait"),
        inside=True,
        capture=lambda forward: (graphs.append("begin"), forward(), graphs.append("end")),
        on_forward=lambda phase, name: graphs.append("told"),
    )
    sink.run(Mark("phase", "graph capture"), lambda: None)
    sink.spans.clear()
    graphs.clear()
    sink.capture("graph DECODE 8", forward)
    assert sink.ops == [Mark("phase", "graph capture"), Capture("graph DECODE 8", 4)]
    assert [(span.kind, span.name) for span in sink.spans] == [("compute", "graph DECODE 8")]
    assert graphs == ["wait", "begin", *["act"] * 4, "end"], "idle before the capture"
    assert loader.lacks(kernels_of(CALL)), "a capture brings no kernel in"
    sink.run(CALL, lambda: None)
    assert sink.ops[-1] == CALL
    assert sink.spans[-1].kind == "load"


def test_a_failed_capture_leaves_the_operations_whole() -> None:
    def refuse(forward: object) -> None:
        raise ValueError("no graph")

    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=True, capture=refuse)
    sink.run(CALL, lambda: None)
    with pytest.raises(ValueError, match="no graph"):
        sink.capture("graph DECODE 8", lambda: None)
    sink.run(CALL, lambda: None)
    assert sink.ops == [CALL, Capture("graph DECODE 8", 0), CALL]


class Told:
    """Notes what is limited, and when."""

    def __init__(self) -> None:
        self.notes: list[object] = []

    @contextmanager
    def over(self, op: Communication) -> Iterator[None]:
        self.notes.append(("in", op))
        try:
            yield
        finally:
            self.notes.append("out")

    def begun(self, op: Communication, handle: object) -> None:
        self.notes.append(("begun", op, handle))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        self.notes.append("quiet")
        yield
        self.notes.append("asking")


@pytest.mark.parametrize(
    "op", [Collective("all_reduce x", (0, 1), 4), Send("h", 1, 4), Recv("h", 1, 4)]
)
def test_communication_is_limited_until_it_is_done(op: Collective | Send | Recv) -> None:
    told = Told()
    sink = RankSink(
        0,
        NewOnce(),
        RULES,
        synchronise=lambda: told.notes.append("wait"),
        inside=True,
        limit=told,
        arrive=lambda: told.notes.append("arrive"),
    )
    sink.run(Compute("y", 1, 1), lambda: told.notes.append("compute"))
    sink.run(op, lambda: told.notes.append("move"))
    assert told.notes == ["compute", "wait", ("in", op), "move", "arrive", "out"]


def test_what_was_begun_is_limited_beside() -> None:
    told = Told()
    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=True, limit=told)
    begin = Begin("all_to_all tokens of 0", (0, 1), 8)
    sink.run(begin, lambda: "handle")
    sink.run(Await(begin.name), lambda: "result")
    assert told.notes == [
        ("in", begin),
        "out",
        ("begun", begin, "handle"),
        ("in", begin),
        "out",
    ]


def test_nothing_is_asked_of_the_device_in_a_capture() -> None:
    told = Told()
    sink = RankSink(
        0,
        NewOnce(),
        RULES,
        synchronise=lambda: told.notes.append("wait"),
        inside=True,
        limit=told,
        capture=lambda forward: forward(),
    )
    sink.capture("graph DECODE 8", lambda: sink.run(Recv("h", 1, 4), lambda: None))
    assert told.notes == ["wait", "quiet", "asking"]


def test_what_was_begun_is_noted() -> None:
    begin = Begin("all_to_all tokens of 0", (0, 1), 8)
    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=True)
    assert sink.run(begin, lambda: "handle") == "handle"
    assert sink.run(Await(begin.name), lambda: "result") == "result"
    assert [span.kind for span in sink.spans] == ["compute", "wait"]
    sink.run(Mark("phase", "end"), lambda: None)
    assert [span.kind for span in sink.spans] == ["compute", "wait", "compute", "beside"]
    compute, wait, _, beside = sink.spans
    assert compute.end <= beside.start <= wait.start and wait.end <= beside.end


def test_forwards_are_kept_with_their_phase() -> None:
    sink = RankSink(0, NewOnce(), RULES, synchronise=lambda: None, inside=False)
    for op in (Mark("phase", "requests"), Mark("forward", "EXTEND 8"), Mark("phase", "end")):
        sink.run(op, lambda: None)
    assert [(phase, name) for _, phase, name in sink.forwards] == [("requests", "EXTEND 8")]
