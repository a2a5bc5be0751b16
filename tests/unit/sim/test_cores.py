"""Cores shared by the compiles that run on them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.engine.cores import Cores


def ends_of(cores: Cores, jobs: list[tuple[int, int]]) -> dict[int, float]:
    """When each (start, seconds) ends; jobs are in order of start."""
    ends: dict[int, float] = {}
    pending = list(enumerate(jobs))
    while pending or cores.next_end() is not None:
        end = cores.next_end()
        if pending and (end is None or pending[0][1][0] <= end):
            index, (start, seconds) = pending.pop(0)
            cores.start(start, seconds, lambda at, index=index: ends.__setitem__(index, at))
        else:
            assert end is not None
            cores.finish(end)
    return ends


def test_nothing_runs_at_first() -> None:
    assert Cores(float).next_end() is None


def test_jobs_share_as_the_slowdown_says() -> None:
    # Each of n takes n times as long: 4 s alone, then 6 s of work at half speed.
    assert ends_of(Cores(float), [(0, 10), (4, 10)]) == {0: 16.0, 1: 20.0}
    assert ends_of(Cores(lambda n: 1.0), [(0, 10), (4, 10)]) == {0: 10.0, 1: 14.0}


def test_what_ends_together_ends_in_the_order_of_starting() -> None:
    ended: list[str] = []
    cores = Cores(lambda n: 1.0)
    for name in ("first", "second"):
        cores.start(0.0, 5.0, lambda at, name=name: ended.append(name))
    cores.finish(5.0)
    assert ended == ["first", "second"]
    assert cores.next_end() is None


def test_every_change_is_a_version() -> None:
    cores = Cores(lambda n: 1.0)
    versions = [cores.version]
    for start in (0.0, 1.0):
        cores.start(start, 4.0, lambda at: None)
        versions.append(cores.version)
    cores.finish(4.0)
    versions.append(cores.version)
    assert len(set(versions)) == 4
    assert cores.next_end() == 5.0


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_cores_do_all_work_and_never_more_than_they_can(
    jobs: list[tuple[int, int]], count: int
) -> None:
    """Shared cores end every job, not before its own length, and keep within total capacity."""
    starts = sorted(jobs)
    ends = ends_of(Cores(lambda running: max(1.0, running / count)), starts)
    total = sum(seconds for _, seconds in starts)
    assert len(ends) == len(starts)
    for index, (start, seconds) in enumerate(starts):
        assert ends[index] >= start + seconds - 1e-6
    assert max(ends.values()) >= starts[0][0] + total / count - 1e-6
    assert max(ends.values()) <= starts[-1][0] + total + 1e-6
