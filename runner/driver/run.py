"""A rank's whole run, warm-up and requests: executed for real, or recorded from shapes.

A recording calls :func:`run_rank` too, for every rank. Only single forwards are shared: a forward
that was recorded before does not run again; the recording contains the same :class:`Forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, PPProxyTensors
from runner.backend.gemm_walks import ExecutionHook
from runner.backend.step_runner import R, ScheduleRecorder
from runner.backend.tensor import Tensor
from runner.driver.requests import serve
from runner.driver.warmup import capture_graphs, execution_hook, warm_up
from runner.model.model_runner import ModelRunner
from runner.scenario import MAX_TOKENS, Scenario
from runner.schedule import (
    OF_HOSTS,
    Capture,
    Collective,
    Forward,
    Op,
    Part,
    Schedule,
    flatten,
)
from runner.timeline import FIRST_REQUEST


def run_rank(
    runner: ModelRunner,
    scenario: Scenario,
    keep: Callable[[Tensor | None], None] = lambda logits: None,
) -> None:
    """Warm up and serve on this rank; ``keep`` gets the requests' logits on the last stage."""
    backend = runner.backend
    backend.mark("phase", "warm-up")
    warm_up(runner, scenario)
    if scenario.graph_batch_sizes:
        backend.mark("phase", "graph capture")
        capture_graphs(runner, scenario)
    first, *others = scenario.request_tokens
    backend.mark("phase", FIRST_REQUEST)
    serve(runner, scenario, first, keep)
    if others:
        backend.mark("phase", "requests")
        for tokens in others:  # Each starts once stage 0 is free.
            serve(runner, scenario, tokens, keep)
    backend.mark("phase", "end")


def record(scenario: Scenario) -> Schedule:
    """Record the operations of every rank; see :func:`record_parts`."""
    return Schedule(tuple(map(flatten, record_parts(scenario))))


def record_parts(scenario: Scenario, *, folded: bool = False) -> list[list[Part]]:
    """Record every rank's run from shapes, forward by forward.

    Args:
        scenario: the scenario to record.
        folded: end every replica but the first after the last operation in which all replicas take
            part; from there on, each does the same as the first.

    Raises:
        UserError: the model does not fit the layout.
    """
    parts: list[list[Part]] = []
    shared: int | None = None
    for rank in range(scenario.parallel.world_size):
        if folded and shared is None and scenario.parallel.coordinates(rank).replica:
            shared = sum(map(_is_of_all, parts[0]))
        parts.append(record_rank(scenario, rank, host_collectives=shared))
    return parts


def record_rank(
    scenario: Scenario, rank: int, *, host_collectives: int | None = None
) -> list[Part]:
    """Record one rank's run; ``host_collectives`` ends it after that many host collectives."""
    recorder = _PartRecorder(execution_hook(scenario, rank), host_collectives)
    forwards = _forwards_of(scenario, rank)
    backend = Backend(recorder, scenario.num_sms)
    plain = forwards.runner
    runner = _RecordingRunner(
        scenario.model,
        scenario.parallel,
        rank,
        backend,
        plain.stage,
        forwards=forwards,
        recorder=recorder,
    )
    if host_collectives != 0:
        with suppress(_EndOfRecordingError):
            run_rank(runner, scenario)
    return recorder.parts


def record_forward(scenario: Scenario, rank: int, batch: ForwardBatch) -> Forward:
    """Record one forward of a rank's stage from shapes."""
    return _forwards_of(scenario, rank).of(batch)[0]


class _StageForwards:
    """Recorded forwards of one rank's stage; each is recorded only once."""

    def __init__(self, scenario: Scenario, rank: int) -> None:
        self._recorder = ScheduleRecorder()
        backend = Backend(self._recorder, scenario.num_sms, bf16_fp32_algo=scenario.bf16_fp32_algo)
        self.runner = ModelRunner.build(
            scenario.model,
            scenario.parallel,
            rank,
            backend=backend,
            overlap=scenario.overlap,
        )
        self._known: dict[tuple[object, ...], tuple[Forward, PPProxyTensors | Tensor]] = {}

    def of(self, batch: ForwardBatch) -> tuple[Forward, PPProxyTensors | Tensor]:
        """A forward's operations and its result, a shape."""
        key = (batch.mode, batch.seq_lens, batch.extend_seq_lens)
        if key not in self._known:
            self._recorder.ops.clear()
            result = self.runner.forward(batch, self.runner.dummy_proxy(batch))
            self._known[key] = Forward(tuple(self._recorder.ops)), result
        return self._known[key]


def _forwards_of(scenario: Scenario, rank: int) -> _StageForwards:
    """The stage's recorded forwards, shared by its tensor ranks unless context-parallel."""
    parallel = scenario.parallel
    at = parallel.coordinates(rank)
    like = rank if parallel.attn_cp > 1 else parallel.rank_of(at.pp_rank, 0, at.replica)
    same = replace(scenario.deployment, parallel=replace(parallel, nodes=1), max_tokens=MAX_TOKENS)
    return _recorded_forwards(same, like)


_recorded_forwards = lru_cache(maxsize=512)(_StageForwards)


class _EndOfRecordingError(Exception):
    """Ends a recording early: it has the requested number of host collectives."""


class _PartRecorder:
    """Records parts; implements :class:`runner.backend.step_runner.OpSink`."""

    def __init__(self, hook: ExecutionHook, host_collectives: int | None) -> None:
        self.parts: list[Part] = []
        self._hook, self._left = hook, host_collectives

    def run(self, op: Op, action: Callable[[], R]) -> R:
        self.parts.append(op)
        if self._left is not None and _is_of_all(op):
            self._left -= 1
            if not self._left:
                raise _EndOfRecordingError
        return action()

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        before, self.parts = self.parts, []
        forward()
        before.append(Capture(name, len(flatten(self.parts))))
        self.parts = before

    def forward(self, forward: Forward) -> None:
        """Add a forward, split at each call before which the hook walks."""
        done = 0
        for index, call in forward.calls if self._hook.m_list is not None else ():
            walks = self._hook.before(call)
            if walks:
                self.parts += [Forward(forward.ops[done:index]), *walks]
                done = index
        self.parts.append(Forward(forward.ops[done:]) if done else forward)


@dataclass(frozen=True)
class _RecordingRunner(ModelRunner):
    """A rank that takes its forwards from those already recorded."""

    forwards: _StageForwards = field(kw_only=True)
    recorder: _PartRecorder = field(kw_only=True)

    def forward(
        self, batch: ForwardBatch, proxy: PPProxyTensors | None = None
    ) -> PPProxyTensors | Tensor:
        forward, result = self.forwards.of(batch)
        self.recorder.forward(forward)
        return result


def _is_of_all(part: Part) -> bool:
    return isinstance(part, Collective) and part.name in OF_HOSTS
