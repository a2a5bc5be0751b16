"""``torchrun -m launch.steps``: how long a forward takes as one batch and by each strategy.

What ``runner overlap`` predicts, measured: on GPUs the forward is a CUDA graph, run again and
again; then once more with an event behind every operation, which tells what the GPU and the link
did when. ``runner overlap --measured`` lays both side by side.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

from launch.comm import TorchComm, make_groups
from launch.comm_stream import CommStream
from launch.deadline import Deadline
from launch.failure import end_process
from launch.gather import machine_facts
from launch.graphs import GraphCapture
from launch.jit_setup import set_up_jit
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from launch.place import Place, find_place, gpu_of, init_process_group, pick_backend, pick_device
from launch.step_clock import GpuClock, HostClock, StepSink
from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.torch_math import TorchBuffers, TorchMath
from runner.backend.torch_weights import TorchWeights
from runner.cli.common import SECONDS, layout_options, model_options
from runner.cli.guard import run_guarded
from runner.config.environ import Environ
from runner.config.model import ModelConfig
from runner.driver.model_runner import ModelRunner
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError
from runner.files import write_json
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.report.outputs import check_outputs
from runner.scenario import Scenario

_EAGER_RUNS = 2
"""Forwards before a capture: kernels are loaded and memory is there."""

_ROUNDS = 5
"""Measurements of ``--repeat`` steps each, of which the median is told."""


@dataclass
class _Steps:
    """One rank's measurement."""

    runner: ModelRunner
    sink: StepSink
    device: torch.device
    batch: ForwardBatch
    repeat: int

    def measure(self, strategy: OverlapStrategy | None) -> dict[str, Any]:
        """Steps by a strategy, None as one batch."""
        stage = self.runner.stage.overlapped([strategy] if strategy else [])
        self.sink.listen(None)
        for _ in range(_EAGER_RUNS):
            stage.forward(self.batch, None)
        step = self._prepared(lambda: stage.forward(self.batch, None))
        rounds = [self._timed(step) for _ in range(_ROUNDS)]
        clock = GpuClock() if self.device.type == "cuda" else HostClock()

        def noted() -> None:
            self.sink.listen(clock)
            stage.forward(self.batch, None)

        step = self._prepared(noted)
        for _ in range(_EAGER_RUNS):
            dist.barrier()
            step()
        self._synchronise()
        ends = clock.ends()
        return {
            "strategy": None if strategy is None else strategy.to_json(),
            "step_seconds": median(rounds),
            "rounds": rounds,
            "ends": ends,
            "link": self.sink.link(ends),
        }

    def _prepared(self, forward: Callable[[], object]) -> Callable[[], object]:
        """The forward as a graph; on a CPU as it is."""
        if self.device.type != "cuda":
            return forward
        graphs = GraphCapture(self.device)
        graphs(forward)
        return graphs.last.replay

    def _timed(self, step: Callable[[], object]) -> float:
        """Seconds of a step, of some in a row."""
        self._synchronise()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(self.repeat):
            step()
        self._synchronise()
        return (time.perf_counter() - start) / self.repeat

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@click.command()
@model_options
@layout_options(pp=1, tp=2)
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
    help="Steps in a row of each of 5 measurements.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Kernel cache.  [default: DG_JIT_CACHE_DIR, else cold and temporary]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest run.",
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
    environ = Environ.read(os.environ)
    mode = ForwardMode(values["mode"])
    strategies = _strategies(overlap, mode)
    place = find_place(environ)
    if values["pp"] != 1 or place.world_size != values["tp"]:
        raise UserError(
            f"--pp {values['pp']} --tp {values['tp']} with {place.world_size} ranks: steps are of "
            "one stage, run torchrun --nproc-per-node TP -m launch.steps --tp TP"
        )
    measured = _run(values, environ, place, mode, strategies)
    if place.rank == 0:
        settings = {name: values[name] for name in _SETTINGS}
        write_json(json_path, {"version": 1, "settings": settings, **measured})
        print(f"wrote {json_path}")


_SETTINGS = ("model", "layers", "pp", "tp", "ep", "mode", "batch", "prompt_len")


def _strategies(names: Sequence[str], mode: ForwardMode) -> list[OverlapStrategy]:
    found = [load_strategy(name) for name in names] if names else list(STRATEGIES.values())
    return [strategy for strategy in found if strategy.mode is mode]


def _run(
    values: dict[str, Any],
    environ: Environ,
    place: Place,
    mode: ForwardMode,
    strategies: Sequence[OverlapStrategy],
) -> dict[str, Any]:
    device = pick_device(values["device"], place)
    gpu = gpu_of(device) if device.type == "cuda" else None
    options = LaunchOptions(
        **{
            name: values[name]
            for name in (
                "model",
                "layers",
                "tp",
                "ep",
                "attn_cp",
                "seed",
                "stage_layers",
                "device",
                "cache_dir",
                "timeout",
            )
        },
        moe_a2a=True,
    )
    scenario = options.scenario(environ, gpu=gpu, policy=WarmupPolicy.NONE)
    link = pick_backend("auto", device, place, place.local_world_size)
    init_process_group(device, place, backend=link, node=0, timeout=options.timeout)
    if device.type == "cuda" and link == "gloo":
        raise UserError("each rank needs a GPU of its own: over gloo nothing fits into a graph")
    sink, end = StepSink(), partial(end_process, place.rank)
    with Deadline(options.timeout, end) as deadline, tempfile.TemporaryDirectory() as work:
        deadline.sink = sink
        runner = _build(options, environ, scenario, place, device, sink, Path(work))
        batch = _batch(runner, mode, values["batch"], values["prompt_len"])
        one = _Steps(runner, sink, device, batch, values["repeat"])
        runs = []
        with torch.inference_mode():
            for strategy in (None, *strategies):
                runs.append(one.measure(strategy))
                if place.rank == 0:
                    name = strategy.name if strategy else "one batch"
                    print(f"{name}: {1e3 * runs[-1]['step_seconds']:.3f} ms a step", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    return {
        "num_sms": scenario.num_sms,
        "link": link,
        "machine": machine_facts(device),
        "runs": runs,
    }


def _build(
    options: LaunchOptions,
    environ: Environ,
    scenario: Scenario,
    place: Place,
    device: torch.device,
    sink: StepSink,
    work: Path,
) -> ModelRunner:
    real = device.type == "cuda"
    jit = set_up_jit(options, environ, scenario, place.rank, work, library=real)
    groups = make_groups(scenario.parallel, options.timeout, "nccl" if real else "gloo")
    stream = CommStream(device, sink.ran, sink.event) if real else None
    comm = TorchComm(groups, device, through_host=False, stream=stream)
    math = TorchMath(device, jit.entry_points)
    backend = Backend(sink, scenario.num_sms, math, comm, bf16_fp32_algo=scenario.bf16_fp32_algo)
    return ModelRunner.build(
        scenario.model,
        scenario.parallel,
        place.rank,
        backend=backend,
        weights=TorchWeights(options.seed, device, share=real and _is_large(scenario.model)),
        buffers=TorchBuffers(device, scenario.model.vocab_size),
    )


def _is_large(model: ModelConfig) -> bool:
    from runner.planning.weight_size import model_elements

    return model_elements(model) > REAL_MATH_LIMIT


def _batch(runner: ModelRunner, mode: ForwardMode, tokens: int, prompt_len: int) -> ForwardBatch:
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
