"""``torchrun -m launch.steps``: time a forward as one batch and with each overlap strategy.

This measures what ``runner overlap`` predicts; ``runner overlap --measured`` shows both side by
side. On GPUs the forward is a CUDA graph, replayed many times, then once more with an event after
every operation, which shows when the GPU and the link were busy.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

from launch.comm import TorchComm, make_groups
from launch.device import CollectiveStream, capture_graph, replayed_event
from launch.gather import machine_facts
from launch.jit import set_up_jit
from launch.limits import Deadline
from launch.options import ROUNDS, LaunchOptions, StepOptions
from launch.rank import Rank
from launch.worker import build_runner
from runner.backend.forward_batch import ForwardBatch
from runner.backend.step_runner import R
from runner.config.environ import Environ
from runner.config.warmup import WarmupPolicy
from runner.driver.requests import prompt_lens
from runner.errors import UserError, run_guarded
from runner.files import write_json
from runner.kernels.types import KernelCall
from runner.model.model_runner import ModelRunner
from runner.model.strategy import OverlapStrategy
from runner.options import ScenarioOptions, scenario_options, with_options
from runner.report.outputs import check_outputs
from runner.schedule import Await, Begin, Collective, Mark, Op
from runner.target import LibraryOptions

_EAGER_RUNS = 2
"""Forwards that run before a capture, to load kernels and allocate memory."""

_OF_SCENARIO = ("model", "layers", "pp", "tp", "ep")


class HostEvent:
    """The host's clock with the interface of a GPU event: a CPU's operations end on return."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


class StepSink:
    """Runs operations and, while it listens, records when each of them ends.

    Attributes:
        last: the operation that is running, or ran last.

    Args:
        stream: the GPU's stream for collectives; None on a CPU.
    """

    def __init__(self, stream: CollectiveStream | None) -> None:
        self.last = "start"
        self._stream = stream
        self.listen(False)

    def listen(self, listening: bool) -> None:
        """Forget everything and start or stop listening; times count from now."""
        self._listening = listening
        self._points: list[Any] = []
        self._intervals: list[list[int]] = []
        self._begun: dict[str, list[int]] = {}
        if self._stream is not None:
            self._stream.noted = [] if listening else None
        if listening:
            self._note()

    def _note(self) -> None:
        event = HostEvent() if self._stream is None else replayed_event()
        event.record()
        self._points.append(event)

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Do ``op``."""
        if isinstance(op, Mark):
            return action()
        self.last = op.describe() if isinstance(op, KernelCall) else op.name
        here = len(self._points)
        if isinstance(op, Begin | Collective):
            self._begun[op.name] = [here - 1, here]
            self._intervals.append(self._begun[op.name])
        elif isinstance(op, Await):
            self._begun.pop(op.name)[1] = here
        result = action()
        if self._listening:
            self._note()
        return result

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        raise NotImplementedError(f"{name} within a step")

    def ends(self) -> list[float]:
        """Seconds at which each operation ended, after a 0 for the start."""
        return [self._seconds(point) for point in self._points]

    def link(self) -> list[tuple[float, float]]:
        """Start and end of every collective in seconds, ordered by start.

        On a CPU the end of an asynchronous collective is not known; the end of its wait is used.
        """
        if self._stream is not None:
            noted = self._stream.noted or []
            return [(self._seconds(events.start), self._seconds(events.end)) for events in noted]
        ends = self.ends()
        return [(ends[first], ends[last]) for first, last in self._intervals]

    def _seconds(self, event: Any) -> float:
        return float(self._points[0].elapsed_time(event)) / 1e3


class _Steps:
    """One rank's measurement."""

    def __init__(self, rank: Rank, work_dir: Path, options: StepOptions) -> None:
        jit = set_up_jit(rank, work_dir)
        groups = make_groups(rank.scenario.parallel, rank.options.timeout)
        comm = TorchComm(groups, rank.device, rank.link)
        self.sink = StepSink(comm.stream)
        self._runner = build_runner(rank, jit, self.sink, comm)
        self._batch = _batch(self._runner, options)
        self._device = rank.device
        self._repeat = options.repeat

    @torch.inference_mode()
    def measure(self, strategy: OverlapStrategy | None) -> dict[str, Any]:
        """Measure steps with a strategy; None means one batch, without overlap."""
        stage = self._runner.stage.overlapped([strategy] if strategy else [])

        def forward(listening: bool) -> None:
            self.sink.listen(listening)
            stage.forward(self._batch, None)

        for _ in range(_EAGER_RUNS):
            forward(False)
        step = self._captured(partial(forward, False))
        rounds = [self._timed(step) for _ in range(ROUNDS)]
        step = self._captured(partial(forward, True))
        for _ in range(_EAGER_RUNS):
            dist.barrier()
            step()
        self._synchronise()
        if dist.get_rank() == 0:
            name = strategy.name if strategy else "one batch"
            print(f"{name}: {1e3 * median(rounds):.3f} ms a step", flush=True)
        return {
            "strategy": None if strategy is None else strategy.to_json(),
            "step_seconds": median(rounds),
            "rounds": rounds,
            "ends": self.sink.ends(),
            "link": self.sink.link(),
        }

    def _captured(self, forward: Callable[[], None]) -> Callable[[], object]:
        """The forward as a CUDA graph; on a CPU, the forward itself."""
        if self._device.type != "cuda":
            return forward
        graph = capture_graph(self._device, forward)
        return graph.replay

    def _timed(self, step: Callable[[], object]) -> float:
        """Seconds per step, averaged over ``repeat`` steps in a row."""
        self._synchronise()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(self._repeat):
            step()
        self._synchronise()
        return (time.perf_counter() - start) / self._repeat

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@click.command()
@with_options(
    scenario_options(
        "model",
        "deployment",
        without=("overlap", "moe_a2a", "max_tokens", "disaggregation"),
        tp=2,
    ),
    StepOptions,
)
def main(given: ScenarioOptions, options: StepOptions) -> None:
    """Measure a forward as one batch and with strategies of two-batch overlap.

    Run it under torchrun, with --nproc-per-node equal to --tp.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(options.json,))
    environ = Environ.read(os.environ)
    launched = _launch_options(given, options, environ.world_size)
    with (
        Deadline(options.timeout, environ.rank) as deadline,
        tempfile.TemporaryDirectory() as work_dir,
    ):
        rank = Rank.connect(launched, environ)
        if rank.device.type == "cuda" and rank.link == "gloo":
            raise UserError("each rank needs its own GPU: a CUDA graph cannot contain gloo calls")
        steps = _Steps(rank, Path(work_dir), options)
        deadline.where = lambda: steps.sink.last
        runs = [steps.measure(strategy) for strategy in (None, *options.strategies)]
        dist.barrier()
    dist.destroy_process_group()
    if rank.number == 0:
        settings = {name: given.given[name] for name in _OF_SCENARIO}
        settings |= {
            "mode": options.mode.value,
            "batch": options.batch,
            "prompt_len": options.prompt_len,
        }
        data = {
            "version": 1,
            "settings": settings,
            "num_sms": rank.scenario.num_sms,
            "link": rank.link,
            "machine": machine_facts(rank.device),
            "runs": runs,
        }
        write_json(options.json, data)
        print(f"wrote {options.json}")


def _launch_options(given: ScenarioOptions, options: StepOptions, world_size: int) -> LaunchOptions:
    layout = {"pp": given.given["pp"], "tp": given.given["tp"]}
    if layout != {"pp": 1, "tp": world_size}:
        raise UserError(
            f"--pp {layout['pp']} --tp {layout['tp']} with {world_size} ranks: this measures one "
            "stage; run torchrun --nproc-per-node TP -m launch.steps --tp TP"
        )
    return LaunchOptions(
        given=replace(given, given={**given.given, "moe_a2a": True}),
        kernels=LibraryOptions(),
        policies=(WarmupPolicy.NONE,),
        compute="real",
        device=options.device,
        cache_dir=options.cache_dir,
        seed=options.seed,
        timeout=options.timeout,
    )


def _batch(runner: ModelRunner, options: StepOptions) -> ForwardBatch:
    tokens, prompt_len = options.batch, options.prompt_len
    ids = runner.dummy_ids(tokens)
    if options.mode.is_extend:
        lens = prompt_lens(tokens, prompt_len)
        cache = runner.backend.new_cache(len(lens), prompt_len)
        return ForwardBatch.extend(lens, input_ids=ids, cache=cache)
    cache = runner.backend.new_cache(tokens, prompt_len + 1)
    return ForwardBatch.decode((prompt_len + 1,) * tokens, input_ids=ids, cache=cache)


if __name__ == "__main__":
    sys.exit(run_guarded(main, None, program="torchrun -m launch.steps"))
