"""RankSink: the spans and operations that a real run records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from launch.comm import AsyncCollective  # noqa: E402
from launch.device import CollectiveEvents  # noqa: E402
from launch.loaders import OwnJit  # noqa: E402
from launch.rank_sink import RankSink, split_loads  # noqa: E402
from runner.kernels.kernel import Kernel  # noqa: E402
from runner.kernels.rules import RULES  # noqa: E402
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall  # noqa: E402
from runner.schedule import (  # noqa: E402
    Await,
    Begin,
    Capture,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Message,
    Op,
    Recv,
    Send,
    Walk,
)
from runner.timeline import Span  # noqa: E402
from runner.watch.shim import CompileRecord  # noqa: E402

CALL = KernelCall(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 1, 24, 64, 1, 132)
WALK = Walk(GemmShape(CALL.type, 24, 64, 1, 132), ((1, 64, 1),))
SUM = Collective("all_reduce x", (0, 1), 4)
BEGIN = Begin("all_to_all tokens of 0", (0, 1), 8)


class NewOnce:
    """A loader that reports each call as not ready the first time."""

    def __init__(self, *, inside: bool = True) -> None:
        self.loads_inside_calls = inside
        self.seen: set[KernelCall] = set()

    def is_ready(self, call: KernelCall) -> bool:
        return call in self.seen

    def prepare(self, call: KernelCall) -> None:
        self.seen.add(call)


class FakeEnvironment:
    """A rank's device, wait limit and lock; records what the sink does with them."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def synchronise(self) -> None:
        self.events.append("synchronise")

    def wait_for_communication(self) -> None:
        self.events.append("arrive")

    def times(self, events: CollectiveEvents) -> tuple[float, float]:
        return 3.0, 5.0

    def capture(self, forward: Callable[[], object]) -> None:
        self.events.append("capture")
        forward()
        self.events.append("captured")

    @contextmanager
    def over(self, op: Message) -> Iterator[None]:
        self.events.append(("in", op))
        yield
        self.events.append("out")

    def started(self, op: Message, is_done: Callable[[], bool]) -> None:
        self.events.append(("started", op, is_done()))

    @property
    @contextmanager
    def quiet(self) -> Iterator[None]:
        self.events.append("quiet")
        yield
        self.events.append("not quiet")

    @contextmanager
    def held(self, shape: GemmShape) -> Iterator[None]:
        self.events.append(f"lock {shape.describe()}")
        yield
        self.events.append("unlock")

    def act(self) -> None:
        self.events.append("act")


def make_sink(loader: Any = None, around: Any = None, *, rank: int = 0, **changes: Any) -> RankSink:
    around = around or FakeEnvironment()
    return RankSink(rank, loader or NewOnce(), around, around, **changes)


def kinds(sink: RankSink) -> list[tuple[str, str]]:
    return [(span.kind, span.name) for span in sink.spans]


HC = "tf32_hc_prenorm_gemm"


@pytest.mark.parametrize("inside", [True, False])
def test_first_use_is_a_load_span_and_later_ones_are_compute(inside: bool) -> None:
    sink = make_sink(NewOnce(inside=inside))
    assert sink.run(CALL, lambda: 7) == 7
    first = [("load", HC)] if inside else [("load", HC), ("compute", HC)]
    assert kinds(sink) == first
    sink.run(CALL, lambda: 7)
    assert kinds(sink) == [*first, ("compute", HC)]


def test_no_load_span_without_a_compiler() -> None:
    sink = make_sink(OwnJit(RULES))
    sink.run(CALL, lambda: None)
    assert kinds(sink) == [("compute", HC)]


def test_both_ends_of_a_communication_have_the_same_key() -> None:
    ops: list[Op] = [SUM, Send("h", 1, 4), Recv("h", 1, 4), SUM]
    one, two = (make_sink(rank=rank) for rank in (0, 1))
    for op in ops:
        one.run(op, lambda: None)
    for op in (SUM, Recv("h", 0, 4), Send("h", 0, 4), SUM):
        two.run(op, lambda: None)
    assert one.ops == ops
    keys = [[span.key for span in sink.spans if span.kind == "comm"] for sink in (one, two)]
    assert keys[0] == ["0,1 #1", "0>1 #1", "1>0 #1", "0,1 #2"] == keys[1]


def test_phases_become_spans_and_forwards_are_reported_with_their_phase() -> None:
    reported: list[tuple[str, str]] = []
    sink = make_sink(on_forward=lambda phase, name: reported.append((phase, name)))
    for op in (
        Mark("phase", "warm-up"),
        Mark("forward", "DECODE 1"),
        Compute("x", 1, 1),
        Mark("phase", "requests"),
        Mark("forward", "EXTEND 8"),
        Mark("phase", "end"),
    ):
        sink.run(op, lambda: None)
    assert reported == [("warm-up", "DECODE 1"), ("requests", "EXTEND 8")]
    assert [name for _, name in sink.served] == ["EXTEND 8"]
    assert [s.name for s in sink.spans if s.kind == "phase"] == ["warm-up", "requests"]


@pytest.mark.parametrize("op", [SUM, Send("h", 1, 4), Recv("h", 1, 4)])
def test_communication_starts_on_idle_device_and_is_timed_until_it_arrives(
    op: Collective | Send | Recv,
) -> None:
    around = FakeEnvironment()
    sink = make_sink(around=around)
    sink.run(Compute("y", 1, 1), around.act)
    sink.run(op, around.act)
    assert around.events == ["act", "synchronise", ("in", op), "act", "arrive", "out"]
    name = {"Collective": "", "Send": "send ", "Recv": "recv "}[type(op).__name__] + op.name
    assert kinds(sink) == [("compute", "y"), ("compute", "device"), ("comm", name)]


def test_walks_and_kernel_work_except_builds_are_load_spans() -> None:
    sink = make_sink(rank=3)
    for op in (WALK, *(KernelWork(action, ()) for action in ("build", "verify", "load"))):
        sink.run(op, lambda: None)
    name = f"walk {HC}:24:64:1"
    assert kinds(sink) == [("load", name), ("load", "verify 0 kernels"), ("load", "load 0 kernels")]
    assert {span.rank for span in sink.spans} == {3}
    assert sink.last == "load 0 kernels"


def test_compile_lock_is_held_only_during_first_uses_and_walks() -> None:
    around: Any = FakeEnvironment()
    sink = RankSink(0, NewOnce(), FakeEnvironment(), FakeEnvironment(), locks=around)  # type: ignore[arg-type]
    ops = (CALL, CALL, Compute("x", 1, 1), SUM, Mark("layer", "1"), KernelWork("load", ()), WALK)
    for op in ops:
        sink.run(op, around.act)
    held = [f"lock {HC}:24:64:1", "act", "unlock"]
    assert around.events == [*held, *["act"] * 5, *held]


def test_waiting_for_the_compile_lock_is_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.rank_sink.time.time", lambda: now)

    class Slow(FakeEnvironment):
        @contextmanager
        def held(self, shape: GemmShape) -> Iterator[None]:
            nonlocal now
            now += 5
            yield

    sink = make_sink(rank=2, locks=Slow())
    sink.run(CALL, lambda: None)
    assert sink.spans == [
        Span(2, 100, 105, "wait", "compile lock"),
        Span(2, 105, 105, "load", HC),
    ]


def test_graph_capture_counts_operations_without_timing_them() -> None:
    around, loader = FakeEnvironment(), NewOnce()
    sink = make_sink(loader, around, on_forward=lambda phase, name: around.events.append("told"))
    sink.run(Mark("phase", "graph capture"), lambda: None)
    sink.spans.clear()
    around.events.clear()

    def forward() -> None:
        for op in (Mark("forward", "DECODE 8"), CALL, SUM, CALL):
            sink.run(op, around.act)

    sink.capture("graph DECODE 8", forward)
    assert sink.ops == [Mark("phase", "graph capture"), Capture("graph DECODE 8", 4)]
    assert kinds(sink) == [("compute", "graph DECODE 8")]
    acts = ["act"] * 4
    assert around.events == ["synchronise", "quiet", "capture", *acts, "captured", "not quiet"]
    assert not loader.is_ready(CALL), "a capture loads no kernel"
    sink.run(CALL, lambda: None)
    assert (sink.ops[-1], sink.spans[-1].kind) == (CALL, "load")


def test_failed_capture_leaves_recorded_operations_intact() -> None:
    def refuse() -> None:
        raise ValueError("no graph")

    sink = make_sink()
    sink.run(CALL, lambda: None)
    with pytest.raises(ValueError, match="no graph"):
        sink.capture("graph DECODE 8", refuse)
    sink.run(CALL, lambda: None)
    assert sink.ops == [CALL, Capture("graph DECODE 8", 0), CALL]


def test_asynchronous_collective_over_gloo_is_timed_by_the_host() -> None:
    around = FakeEnvironment()
    sink = make_sink(around=around)
    assert sink.run(BEGIN, lambda: "handle") == "handle"
    assert sink.run(Await(BEGIN.name), lambda: "result") == "result"
    assert around.events == [("in", BEGIN), "out"] * 2
    assert [span.kind for span in sink.spans] == ["compute", "wait"]
    sink.run(Mark("phase", "end"), lambda: None)
    compute, wait, _, beside = sink.spans
    assert (beside.kind, beside.name) == ("beside", BEGIN.name)
    assert compute.end <= beside.start <= wait.start and wait.end <= beside.end


def test_asynchronous_collective_over_nccl_is_timed_by_gpu_events() -> None:
    class Event:
        def query(self) -> bool:
            return False

    event: Any = Event()
    nothing = torch.zeros(0)
    handle = AsyncCollective(CollectiveEvents(event, event, event), nothing, nothing, 1)
    around = FakeEnvironment()
    sink = make_sink(around=around)
    sink.run(BEGIN, lambda: handle)
    assert around.events == [("in", BEGIN), "out", ("started", BEGIN, False)]
    sink.run(Await(BEGIN.name), lambda: "result")
    sink.run(Mark("phase", "end"), lambda: None)
    assert sink.spans[-1] == Span(0, 3.0, 5.0, "beside", BEGIN.name)


# -- compiles that the shim recorded --------------------------------------------------------------


def compiled(start: float, end: float, kernel: Kernel | None = None) -> CompileRecord:
    source = "// Includes' hash value: " + 32 * "0" + "\n" + kernel.body if kernel else ""
    return CompileRecord(start, end, rank=0, pid=1, exit_code=0, source=source)


@pytest.mark.parametrize(
    ("compiles", "expected"),
    [
        (
            [(11, 13), (14, 19)],
            [
                ("load", 10, 11),
                ("compile", 11, 13),
                ("load", 13, 14),
                ("compile", 14, 19),
                ("load", 19, 20),
            ],
        ),
        ([(1, 5)], [("compile", 1, 5), ("load", 10, 20)]),
        ([(10, 20)], [("compile", 10, 20)]),
    ],
)
def test_compiles_are_cut_out_of_load_spans(
    compiles: list[tuple[float, float]], expected: list[tuple[str, float, float]]
) -> None:
    load = Span(0, 10, 20, "load", "gemm")
    made = split_loads([load], [compiled(*times) for times in compiles])
    assert [(span.kind, span.start, span.end) for span in made] == expected


def test_compile_span_has_the_kernels_identity_as_key() -> None:
    kernel = RULES.kernels_of(CALL)[-1]
    (span,) = split_loads([], [compiled(1, 2, kernel)])
    assert (span.name, span.key) == (kernel.name, kernel.identity)
