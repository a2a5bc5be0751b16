"""Compiles in the place of what a rank only knew as a load."""

from __future__ import annotations

from launch.compile_spans import cut_compiles
from runner.timeline import Span
from runner.watch.shim import CompileRecord


def record(start: float, end: float) -> CompileRecord:
    return CompileRecord(start, end, rank=0, pid=1, exit_code=0, source="")


def cut(spans: list[Span], *records: CompileRecord) -> list[tuple[str, float, float]]:
    made = cut_compiles(spans, records, lambda record: "key")
    return [(span.kind, span.start, span.end) for span in made]


def test_compiles_take_their_part_of_a_load() -> None:
    load = Span(0, 10, 20, "load", "gemm")
    assert cut([load], record(11, 13), record(14, 19)) == [
        ("load", 10, 11),
        ("compile", 11, 13),
        ("load", 13, 14),
        ("compile", 14, 19),
        ("load", 19, 20),
    ]


def test_a_load_without_a_compile_stays_a_load() -> None:
    load = Span(0, 10, 20, "load", "gemm")
    assert cut([load], record(1, 5)) == [("compile", 1, 5), ("load", 10, 20)]
