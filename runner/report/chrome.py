"""Timelines in the Chrome trace event format, which Perfetto opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runner.timeline import Span, Timeline

_THREADS_PER_PROCESS = 1_000_000

Event = dict[str, object]


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, object]:
    """Make a trace: one process per Timeline, one thread per rank, one complete event per span.

    ``ts`` and ``dur`` are in microseconds, to the nanosecond. Phases enclose the spans within
    them. The format cannot show spans that overlap without nesting on one thread, so those of one
    rank go to further threads ``rank N #2`` and so on.
    """
    events: list[Event] = []
    for index, timeline in enumerate(timelines):
        events += _process_events(index + 1, timeline)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _process_events(pid: int, timeline: Timeline) -> Iterator[Event]:
    yield _metadata("process_name", pid, 0, name=timeline.label)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    layout = timeline.meta.get("ranks", [])
    for rank, spans in enumerate(timeline.by_rank()):
        name = f"rank {rank}"
        if rank < len(layout):
            name += f" (stage {layout[rank]['pp_rank']}, tp {layout[rank]['tp_rank']})"
        # A rank without spans still gets a thread, to show that it did nothing.
        for lane, lane_spans in enumerate(_lanes(spans) or [[]]):
            # Perfetto takes thread id 0 for the idle task and the process's id for the main
            # thread, so no thread may have either.
            tid = pid * _THREADS_PER_PROCESS + lane * timeline.world_size + rank
            suffix = f" #{lane + 1}" if lane else ""
            yield _metadata("thread_name", pid, tid, name=name + suffix)
            yield _metadata("thread_sort_index", pid, tid, sort_index=rank)
            for span in lane_spans:
                start, end = _nanoseconds(span)
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.kind,
                    "pid": pid,
                    "tid": tid,
                    "ts": start / 1000,
                    "dur": (end - start) / 1000,
                    "args": {"key": span.key},
                }


def _metadata(event: str, pid: int, tid: int, **args: object) -> Event:
    return {"ph": "M", "name": event, "pid": pid, "tid": tid, "args": args}


def _nanoseconds(span: Span) -> tuple[int, int]:
    # Whole numbers, so that adjacent spans neither overlap nor stick out of their phase.
    start = round(span.start * 1e9)
    return start, max(start, round(span.end * 1e9))


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spread one rank's spans over as few lanes as possible so that the spans of each lane nest."""

    def outermost_first(span: Span) -> tuple[int, int, bool]:
        start, end = _nanoseconds(span)
        return start, -end, span.kind != "phase"

    lanes: list[list[Span]] = []
    open_ends: list[list[int]] = []
    for span in sorted(spans, key=outermost_first):
        start, end = _nanoseconds(span)
        for lane, ends in zip(lanes, open_ends, strict=True):
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or end <= ends[-1]:  # The innermost open span encloses it.
                lane.append(span)
                ends.append(end)
                break
        else:
            lanes.append([span])
            open_ends.append([end])
    return lanes
