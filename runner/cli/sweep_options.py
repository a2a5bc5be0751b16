"""The axes of ``runner sweep``: lists of values, each given at once or in several options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import click

from runner.cli.common import F, IntList
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from sim.sweep.points import Axes


class ChoiceList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Comma-separated words out of a few."""

    name = "WORD,..."

    def __init__(self, choices: Sequence[str]) -> None:
        self._choices = tuple(choices)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """A tuple of the words."""
        words = value if isinstance(value, tuple) else tuple(str(value).split(","))
        for word in words:
            if word not in self._choices:
                self.fail(f"{word!r} must be one of {', '.join(self._choices)}", param, ctx)
        return words


def axis_options(*, pp: int, tp: int) -> Callable[[F], F]:
    """``--pp``, ``--tp``, ``--ep``, ``--nodes``, ``--cores``, ``--warmup``."""
    policies = [policy.value for policy in WarmupPolicy]
    options = (
        _axis("--pp", IntList(), str(pp), "Pipeline stages."),
        _axis("--tp", IntList(), str(tp), "Tensor-parallel ranks."),
        _axis("--ep", ChoiceList(["off", "on"]), "off", "Whole experts per rank, or slices."),
        _axis(
            "--nodes",
            IntList(),
            None,
            "Nodes; the ranks of one share its cores and disk cache.  [default: one a stage]",
        ),
        _axis("--cores", IntList(), None, "CPU cores of a node.  [default: the profile's]"),
        _axis(
            "--warmup",
            ChoiceList(policies),
            "none,pp-parallel,planned",
            f"Policies, out of {', '.join(policies)}.",
        ),
    )

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _axis(
    name: str, kind: IntList | ChoiceList, default: str | None, words: str
) -> Callable[[F], F]:
    shown = "" if default is None else f"  [default: {default}]"
    # With multiple, the list may also come in several options, as runner sim takes policies:
    # without it the last option would silently win.
    return click.option(
        name,
        type=kind,
        multiple=True,
        help=words + shown,
        default=None if default is None else [default],
    )


def take_axes(values: dict[str, Any], *, cores: int) -> Axes:
    """Take the options of :func:`axis_options` out of ``values``; ``cores`` is their default.

    Raises:
        UserError: a number below 1.
    """
    lists = {name: tuple(chain(*values.pop(name))) for name in _NAMES}
    for name in ("pp", "tp", "nodes", "cores"):
        for number in lists[name]:
            if number < 1:
                raise UserError(f"--{name} {number} must be at least 1")
    return Axes(
        policies=[WarmupPolicy(name) for name in lists["warmup"]],
        pp=lists["pp"],
        tp=lists["tp"],
        ep=[word == "on" for word in lists["ep"]],
        nodes=lists["nodes"] or None,
        cores=lists["cores"] or (cores,),
    )


_NAMES = ("pp", "tp", "ep", "nodes", "cores", "warmup")
