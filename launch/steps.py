"""``torchrun -m launch.steps``: how long a forward takes as one batch and by each strategy.

This measures what ``runner overlap`` predicts. On GPUs the forward is a CUDA graph, replayed many
times, and once more with an event behind every operation, which shows what the GPU and the link did
when. ``runner overlap --measured`` shows both next to each other.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from launch.options import LaunchOptions, RankOptions
from launch.rank import Rank
from launch.worker import build_runner
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.sink import R
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.warmup import WarmupPolicy
from runner.driver.requests import prompt_lens
from runner.errors import UserError, run_guarded
from runner.files import write_json
from runner.kernels.types import KernelCall
from runner.model.model_runner import ModelRunner
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.options import ScenarioOptions, scenario_options, with_options
from runner.report.outputs import check_outputs
from runner.schedule import Await, Begin, Collective, Mark, Op
from runner.target import LibraryOptions

_EAGER_RUNS = 2
"""Forwards before a capture, which load kernels and allocate memory."""

_ROUNDS = 5
"""Measurements of ``--repeat`` steps each, of which the median counts."""

_OF_SCENARIO = ("model", "layers", "pp", "tp", "ep")


@dataclass(frozen=True, kw_only=True)
class StepOptions(RankOptions):
    """What is measured, and where it goes. Times in seconds."""

    mode: ForwardMode = option(ForwardMode.DECODE, OptionDetails("Which forwards."))
    batch: int = option(
        512,
        OptionDetails("Tokens of the forward: sequences, of a decode.", metavar="N", least=2),
    )
    prompt_len: int = option(
        128,
        OptionDetails(
            "Tokens of each sequence: before a decode, or in an extend.", metavar="N", least=1
        ),
    )
    overlap: tuple[str, ...] = option(
        (),
        OptionDetails(
            f"What to measure: {', '.join(STRATEGIES)}, or a file.  [default: the mode's]",
            metavar="STRATEGY",
        ),
    )
    repeat: int = option(
        10,
        OptionDetails(f"Steps in a row of each of {_ROUNDS} measurements.", metavar="N", least=1),
    )
    cache_dir: Path | None = option(None, OptionDetails("Kernel cache.  [default: a cold one]"))
    json: Path = option(
        Path(), OptionDetails("Where to write what was measured.", metavar="FILE", required=True)
    )

    @property
    def strategies(self) -> list[OverlapStrategy]:
        """Those of the mode, of the ones given or of all."""
        given = map(load_strategy, self.overlap) if self.overlap else STRATEGIES.values()
        return [strategy for strategy in given if strategy.mode is self.mode]


class HostEvent:
    """The host's clock, used like a GPU's event: a CPU has done an operation when it returns."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


class StepSink:
    """Runs operations and, while it listens, notes when each of them ends.

    Attributes:
        last: the operation at hand.

    Args:
        stream: the GPU's stream for collectives; None on a CPU.
    """

    def __init__(self, stream: CollectiveStream | None) -> None:
        self.last = "start"
        self._stream = stream
        self.listen(False)

    def listen(self, listening: bool) -> None:
        """Forget everything; while listening, times count from now on."""
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
        """Start and end of every collective in seconds, in the order of their starts.

        On a CPU one that was begun counts until it is awaited: nobody says when it ended.
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
        """Measure steps by a strategy; None is one batch."""
        stage = self._runner.stage.overlapped([strategy] if strategy else [])

        def forward(listening: bool) -> None:
            self.sink.listen(listening)
            stage.forward(self._batch, None)

        for _ in range(_EAGER_RUNS):
            forward(False)
        step = self._captured(partial(forward, False))
        rounds = [self._timed(step) for _ in range(_ROUNDS)]
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
        """The forward as a graph; on a CPU as it is."""
        if self._device.type != "cuda":
            return forward
        graph = capture_graph(self._device, forward)
        return graph.replay

    def _timed(self, step: Callable[[], object]) -> float:
        """Seconds of a step, averaged over ``repeat`` in a row."""
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
    """Measure a forward as one batch and by strategies of two-batch overlap.

    Run by torchrun with --nproc-per-node as --tp says.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(options.json,))
    environ = Environ.read(os.environ)
    launched = _launch_options(given, options, environ.world_size or 1)
    with (
        Deadline(options.timeout, environ.rank or 0) as deadline,
        tempfile.TemporaryDirectory() as work_dir,
    ):
        rank = Rank.meet(launched, environ)
        if rank.device.type == "cuda" and rank.link == "gloo":
            raise UserError("each rank needs a GPU of its own: a CUDA graph cannot hold gloo calls")
        steps = _Steps(rank, Path(work_dir), options)
        deadline.where = lambda: steps.sink.last
        runs = [steps.measure(strategy) for strategy in (None, *options.strategies)]
        dist.barrier()
    dist.destroy_process_group()
    if rank.place.rank == 0:
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
            f"--pp {layout['pp']} --tp {layout['tp']} with {world_size} ranks: steps are of one "
            "stage, run torchrun --nproc-per-node TP -m launch.steps --tp TP"
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
