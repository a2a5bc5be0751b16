"""The executing sink: what it notes of a run, and how compiles are cut out of loads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launch.rank_sink import OwnJit, RankSink, cut_compiles
from runner.jit.kernel_type import DeepGemmKernelType, KernelCall
from runner.jit.kernels import Kernel
from runner.jit.shim import CompileRecord
from runner.schedule import Collective, Compute, Mark, Op, Recv, Send
from runner.timeline import Span

CALL = KernelCall(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 1, 24, 64, 1, 132)


class NewOnce:
    """A loader for which each kernel is new once."""

    def __init__(self) -> None:
        self.seen: set[Kernel] = set()

    def prepare(self, kernels: Sequence[Kernel]) -> bool:
        new = set(kernels) - self.seen
        self.seen |= new
        return bool(new)


def record(start: float, end: float) -> CompileRecord:
    return CompileRecord(start, end, rank=0, pid=1, exit_code=0, source="")


def cut(spans: list[Span], *records: CompileRecord) -> list[tuple[str, float, float]]:
    made = cut_compiles(spans, records, lambda record: "key")
    return [(span.kind, span.start, span.end) for span in made]


def test_compiles_take_their_part_of_a_load() -> None:
    load = Span(0, 10, 20, "load", "gemm")
    assert cut([load], record(11, 13), record(14, 19)) == [
        ("load", 10, 11), ("compile", 11, 13), ("load", 13, 14), ("compile", 14, 19),
        ("load", 19, 20),
    ]  # fmt: skip


def test_a_load_without_a_compile_stays_a_load() -> None:
    load = Span(0, 10, 20, "load", "gemm")
    assert cut([load], record(1, 5)) == [("compile", 1, 5), ("load", 10, 20)]


@pytest.mark.parametrize("inside", [True, False])
def test_a_first_use_is_a_load_and_the_next_is_compute(inside: bool) -> None:
    sink = RankSink(0, NewOnce(), synchronise=lambda: None, inside=inside)
    assert sink.run(CALL, lambda: 7) == 7
    first = [span.kind for span in sink.spans]
    assert first == (["load"] if inside else ["load", "compute"])
    sink.run(CALL, lambda: 7)
    assert [span.kind for span in sink.spans][len(first) :] == ["compute"]


def test_without_a_compiler_nothing_is_loaded() -> None:
    sink = RankSink(0, OwnJit(None), synchronise=lambda: None, inside=False)
    sink.run(CALL, lambda: None)
    assert [span.kind for span in sink.spans] == ["compute"]


def test_operations_are_kept_and_their_partners_have_one_key() -> None:
    ops: list[Op] = [
        Collective("all_reduce x", (0, 1), 4), Send("h", 1, 4), Recv("h", 1, 4),
        Collective("all_reduce x", (0, 1), 4),
    ]  # fmt: skip
    one, two = (
        RankSink(rank, NewOnce(), synchronise=lambda: None, inside=False) for rank in (0, 1)
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
        0, NewOnce(), synchronise=lambda: None, inside=False,
        on_forward=lambda phase, name: told.append((phase, name)),
    )  # fmt: skip
    for op in (
        Mark("phase", "warm-up"), Mark("forward", "DECODE 1"), Compute("x", 1, 1),
        Mark("phase", "requests"), Mark("forward", "EXTEND 8"), Mark("phase", "end"),
    ):  # fmt: skip
        sink.run(op, lambda: None)
    assert told == [("warm-up", "DECODE 1"), ("requests", "EXTEND 8")]
    assert [s.name for s in sink.spans if s.kind == "phase"] == ["warm-up", "requests"]


def test_the_device_is_waited_for_before_and_after_communication() -> None:
    waits: list[str] = []
    sink = RankSink(0, NewOnce(), synchronise=lambda: waits.append("wait"), inside=True)
    sink.run(Collective("all_reduce x", (0, 1), 4), lambda: waits.append("move"))
    assert waits == ["wait", "move", "wait"]
