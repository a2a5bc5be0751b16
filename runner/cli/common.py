"""Options that several commands share, so that they are named and explained once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from runner.config.environ import Environ
from runner.config.presets import PRESETS
from runner.driver.warmup import DisaggregationMode, WarmupPolicy, policy_of_flags
from runner.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class IntList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Comma-separated integers."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """A tuple of the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,128,1024", param, ctx)


def model_options(function: F) -> F:
    """``--model`` and ``--layers``."""
    function = click.option(
        "--layers", type=int, metavar="N", help="Only the model's first N layers."
    )(function)
    return click.option(
        "--model",
        default="dsv4",
        show_default=True,
        help=f"{', '.join(PRESETS)}, or a path to a Hugging Face config.json.",
    )(function)


def layout_options(*, pp: int, tp: int) -> Callable[[F], F]:
    """``--pp``, ``--tp``, ``--ep``, ``--attn-cp``, ``--stage-layers`` with the given defaults."""
    options = (
        click.option(
            "--stage-layers", type=IntList(), help="Layers of each stage.  [default: even]"
        ),
        click.option(
            "--attn-cp",
            type=int,
            default=1,
            show_default=True,
            help="Split EXTEND tokens of the attention over so many ranks.",
        ),
        click.option("--ep", is_flag=True, help="Whole experts per rank instead of slices."),
        click.option(
            "--tp", type=int, default=tp, show_default=True, help="Tensor-parallel ranks."
        ),
        click.option("--pp", type=int, default=pp, show_default=True, help="Pipeline stages."),
    )

    def decorate(function: F) -> F:
        for option in options:
            function = option(function)
        return function

    return decorate


def serving_options(function: F) -> F:
    """``--disaggregation-mode`` and ``--speculative``."""
    function = click.option(
        "--speculative", is_flag=True, help="Speculative decoding: no pp-parallel warm-up."
    )(function)
    return click.option(
        "--disaggregation-mode",
        default="none",
        show_default=True,
        type=click.Choice([mode.value for mode in DisaggregationMode]),
        help="A prefill node never decodes, a decode node never extends.",
    )(function)


class Positive(click.FloatRange):
    """A finite number above 0; NaN, which every comparison would let through, is none."""

    def __init__(self, most: float) -> None:
        super().__init__(min=0, min_open=True, max=most)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


SECONDS = Positive(1e7)
"""A duration, at most some months."""

GIBIBYTES = Positive(1e6)
FACTOR = Positive(100)


def batch_sizes_option(function: F) -> F:
    """``--batch-sizes`` and ``--prompt-len``."""
    function = click.option(
        "--prompt-len",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Tokens of each prompt in the requests.",
    )(function)
    return click.option(
        "--batch-sizes",
        type=IntList(),
        help="Batch sizes of warm-up and requests.  [default: the five that follow from the SMs]",
    )(function)


def max_tokens_option(function: F) -> F:
    """``--max-tokens`` of a run."""
    return click.option(
        "--max-tokens",
        type=int,
        default=16384,
        show_default=True,
        metavar="N",
        help="Most tokens of a forward that planned and prebuilt prepare for.",
    )(function)


def policy_option(function: F) -> F:
    """``--warmup``, which may be given again."""
    return click.option(
        "--warmup",
        "policies",
        multiple=True,
        type=click.Choice([policy.value for policy in WarmupPolicy]),
        help="Warm-up policy; give it again for several.",
    )(function)


def warmup_options(function: F) -> F:
    """What goes with any policy: streams, graphs, walks and locks."""
    options = (
        click.option(
            "--stream",
            type=IntList(),
            help="Token counts of the requests after the first, instead of the batch sizes.",
        ),
        click.option(
            "--cuda-graphs",
            type=IntList(),
            help="Batch sizes that a CUDA graph of DECODE is captured for.",
        ),
        click.option(
            "--walk-max-m",
            type=click.IntRange(min=1),
            metavar="N",
            help="End the lists of M that full, fast and relax walk there.",
        ),
        click.option(
            "--walk-memory",
            type=GIBIBYTES,
            metavar="GIB",
            help="GPU memory that a walk of full or fast may take; its M halve to fit.",
        ),
        click.option(
            "--compile-lock",
            is_flag=True,
            help="Ranks of a node take turns at the first uses of one GEMM's kernels.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def asked_policies(
    given: Sequence[str], environ: Environ, default: Sequence[WarmupPolicy]
) -> tuple[WarmupPolicy, ...]:
    """The policies of the command line, else the one of SGLang's variables, else the default."""
    if given:
        return tuple(WarmupPolicy(name) for name in dict.fromkeys(given))
    of_flags = policy_of_flags(
        precompile=environ.precompile,
        fast=environ.fast_warmup,
        pp_parallel=environ.pp_parallel_warmup,
    )
    return tuple(default) if of_flags is None else (of_flags,)


def check_sizes(**lists: tuple[int, ...] | None) -> None:
    """Raise UserError where a list of batch sizes or token counts holds what is none."""
    for name, values in lists.items():
        if values is not None and not (values and min(values) >= 1):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {','.join(map(str, values))} must all be at least 1")


def report_options(function: F) -> F:
    """``--timeline``, ``--trace``, ``--plot``."""
    path = click.Path(path_type=Path, dir_okay=False)
    for option in (
        click.option("--plot", type=path, help="Draw a Gantt picture (.png or .svg)."),
        click.option("--trace", type=path, help="Write a Chrome trace; open it in Perfetto."),
        click.option("--timeline", type=path, help="Write the Timelines as JSON (- for stdout)."),
    ):
        function = option(function)
    return function
