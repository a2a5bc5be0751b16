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
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

from launch.cli import launch
from launch.comm import TorchComm, make_groups
from launch.device import CollectiveStream, capture_graph, replayed_event
from launch.gather import machine_facts
from launch.jit import set_up_jit
from launch.limits import Deadline
from launch.options import LaunchOptions
from launch.rank import Rank
from launch.worker import build_runner
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.sink import R
from runner.config.environ import Environ
from runner.driver.model_runner import ModelRunner
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError, run_guarded
from runner.files import write_json
from runner.kernels.types import KernelCall
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.report.outputs import check_outputs
from runner.schedule import Await, Begin, Collective, Mark, Op

_EAGER_RUNS = 2
"""Forwards before a capture, which load kernels and allocate memory."""

_ROUNDS = 5
"""Measurements of ``--repeat`` steps each, of which the median counts."""

_LAUNCH_OPTIONS = (
    *("model", "layers", "pp", "tp", "ep", "attn_cp", "stage_layers"),
    *("device", "cache_dir", "seed", "timeout"),
)
"""Options of ``launch`` that steps take as they are."""

_SETTINGS = ("model", "layers", "pp", "tp", "ep", "mode", "batch", "prompt_len")


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

    def __init__(self, rank: Rank, work_dir: Path, values: dict[str, Any]) -> None:
        number, scenario = rank.place.rank, rank.scenario
        jit = set_up_jit(
            rank.options, rank.environ, scenario, number, work_dir, library=rank.on_gpu
        )
        groups = make_groups(scenario.parallel, rank.options.timeout, rank.link)
        comm = TorchComm(groups, rank.device, rank.link)
        self.sink = StepSink(comm.stream)
        self._runner = build_runner(rank, jit, self.sink, comm)
        self._batch = _batch(self._runner, ForwardMode(values["mode"]), values)
        self._device = rank.device
        self._repeat: int = values["repeat"]

    def measure(self, strategy: OverlapStrategy | None) -> dict[str, Any]:
        """Measure steps by a strategy; None is one batch."""
        stage = self._runner.stage.overlapped([strategy] if strategy else [])

        def forward() -> None:
            stage.forward(self._batch, None)

        def noted() -> None:
            self.sink.listen(True)
            forward()

        self.sink.listen(False)
        for _ in range(_EAGER_RUNS):
            forward()
        step = self._captured(forward)
        rounds = [self._timed(step) for _ in range(_ROUNDS)]
        step = self._captured(noted)
        for _ in range(_EAGER_RUNS):
            dist.barrier()
            step()
        self._synchronise()
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


@click.command(context_settings={"default_map": {"tp": 2}})
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in ForwardMode]),
    default="decode",
    show_default=True,
    help="Which forwards.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of the forward: sequences, of a decode.",
)
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens of each sequence: before a decode, or in an extend.",
)
@click.option(
    "--overlap",
    multiple=True,
    metavar="STRATEGY",
    help=f"What to measure: {', '.join(STRATEGIES)}, or a file.  [default: the mode's]",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help=f"Steps in a row of each of {_ROUNDS} measurements.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where to write what was measured.",
)
def steps(overlap: Sequence[str], json_path: Path, **values: Any) -> None:
    """Measure a forward as one batch and by strategies of two-batch overlap.

    Run by torchrun with --nproc-per-node as --tp says.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(json_path,))
    mode = ForwardMode(values["mode"])
    given = map(load_strategy, overlap) if overlap else STRATEGIES.values()
    strategies = [strategy for strategy in given if strategy.mode is mode]
    environ = Environ.read(os.environ)
    options = _options(values, environ.world_size or 1)
    runs = []
    with (
        Deadline(options.timeout, environ.rank or 0) as deadline,
        tempfile.TemporaryDirectory() as work_dir,
    ):
        rank = Rank.meet(options, environ, WarmupPolicy.NONE)
        if rank.device.type == "cuda" and rank.link == "gloo":
            raise UserError("each rank needs a GPU of its own: a CUDA graph cannot hold gloo calls")
        measured = _Steps(rank, Path(work_dir), values)
        deadline.sink = measured.sink
        with torch.inference_mode():
            for strategy in (None, *strategies):
                runs.append(measured.measure(strategy))
                if rank.place.rank == 0:
                    name = strategy.name if strategy else "one batch"
                    print(f"{name}: {1e3 * runs[-1]['step_seconds']:.3f} ms a step", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    if rank.place.rank == 0:
        data = {
            "version": 1,
            "settings": {name: values[name] for name in _SETTINGS},
            "num_sms": rank.scenario.num_sms,
            "link": rank.link,
            "machine": machine_facts(rank.device),
            "runs": runs,
        }
        write_json(json_path, data)
        print(f"wrote {json_path}")


steps.params[:0] = [option for option in launch.params if option.name in _LAUNCH_OPTIONS]


def _options(values: dict[str, Any], world_size: int) -> LaunchOptions:
    given = {name: values[name] for name in _LAUNCH_OPTIONS}
    options = LaunchOptions(**given, moe_a2a=True, compute="real")
    if options.pp != 1 or options.tp != world_size:
        raise UserError(
            f"--pp {options.pp} --tp {options.tp} with {world_size} ranks: steps are of one "
            "stage, run torchrun --nproc-per-node TP -m launch.steps --tp TP"
        )
    return options


def _batch(runner: ModelRunner, mode: ForwardMode, values: dict[str, Any]) -> ForwardBatch:
    tokens, prompt_len = values["batch"], values["prompt_len"]
    ids = runner.buffers.dummy_ids(tokens)
    if mode.is_extend:
        full, rest = divmod(tokens, prompt_len)
        lens = (prompt_len,) * full + ((rest,) if rest else ())
        cache = runner.buffers.cache(len(lens), prompt_len)
        return ForwardBatch.extend(lens, input_ids=ids, cache=cache)
    cache = runner.buffers.cache(tokens, prompt_len + 1)
    return ForwardBatch.decode((prompt_len + 1,) * tokens, input_ids=ids, cache=cache)


if __name__ == "__main__":
    sys.exit(run_guarded(steps, None, program="torchrun -m launch.steps"))
