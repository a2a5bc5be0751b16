"""Compiles that the shim saw, put where a rank only knew that it loaded something."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runner.timeline import Span
from runner.watch.shim import CompileRecord


def cut_compiles(
    spans: Sequence[Span], records: Sequence[CompileRecord], key_of: Callable[[CompileRecord], str]
) -> list[Span]:
    """Put one rank's compiles, as the shim saw them, in place of that part of its load spans."""
    result = [span for span in spans if span.kind != "load"]
    for record in records:
        rank = record.rank
        result.append(
            Span(rank, record.start, record.end, "compile", record.kernel_name, key_of(record))
        )
    for span in spans:
        if span.kind == "load":
            result += _without(span, records)
    return sorted(result, key=lambda span: (span.start, -span.end))


def _without(span: Span, records: Sequence[CompileRecord]) -> list[Span]:
    """What is left of a span outside of compiles."""
    left = []
    at = span.start
    for record in records:
        if record.end <= span.start or record.start >= span.end:
            continue
        if record.start > at:
            left.append(Span(span.rank, at, record.start, "load", span.name))
        at = max(at, record.end)
    if at < span.end:
        left.append(Span(span.rank, at, span.end, "load", span.name))
    return left
