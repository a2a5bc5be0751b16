"""Make command-line options from dataclasses, and command lines from their values.

Each field made by :func:`runner.config.fields.option` is an option: its type says how to parse the
text, and its default is written only there. Commands get typed values, never a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import wraps
from itertools import chain
from math import isnan
from os import PathLike, fsdecode
from pathlib import Path
from typing import TypeVar, get_args, get_origin

import click

from runner.config.environ import Environ
from runner.config.fields import (
    OptionDetails,
    field_types,
    from_plain,
    option,
    to_plain,
    without_none,
)
from runner.config.hf import load_model, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import PRESETS
from runner.config.warmup import WarmupPolicy, policy_of_flags
from runner.errors import UserError
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategies
from runner.scenario import Scenario

F = TypeVar("F", bound=Callable[..., object])
GIB = 1 << 30


class IntList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Comma-separated whole numbers from 1 on."""

    name = "N,N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(
            word.strip().isascii() and word.strip().isdecimal() and int(word) for word in words
        ):
            self.fail(f"{value!r} must be whole numbers from 1 on, such as 1,128,1024", param, ctx)
        return tuple(map(int, words))


class _Listed(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated values of another type."""

    name = "VALUE,..."

    def __init__(self, each: click.ParamType) -> None:  # type: ignore[type-arg]
        self._each = each

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[object, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._each.convert(word, param, ctx) for word in str(value).split(","))


class PathType(click.Path):
    """A path that is not empty."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(
        self, value: str | PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        if value == "":
            self.fail("'' is not a path: it must not be empty", param, ctx)
        return Path(fsdecode(super().convert(value, param, ctx)))


_UNITS = {
    unit: click.FloatRange(min=0, min_open=True, max=most)
    for unit, most in {"SECONDS": 1e7, "GIB": 1e6, "X": 100.0}.items()
}
_SCALES = {"GIB": GIB}


@dataclass(frozen=True)
class Option:
    """A dataclass field as a command-line option."""

    name: str
    kind: object
    default: object
    details: OptionDetails

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return self.details.flag or f"--{self.name.replace('_', '-')}"

    @property
    def _off_flag(self) -> str:
        """The flag that switches off an option that is on by default; empty if there is none."""
        return f"--no-{self.flag[2:]}" if self.kind is bool and self.default is not False else ""

    @property
    def _repeats(self) -> bool:
        is_list = get_origin(self.kind) is tuple
        return is_list and (self.details.listed or get_args(self.kind)[0] is not int)

    def decorate(self, function: F) -> F:
        """Add the option to a command's function."""
        explained = self.details.help
        default = to_plain(self.default)
        if self.default == () or self.details.required or self.details.listed:
            default = None
        if isinstance(default, list) and not self._repeats:
            default = ",".join(map(str, default))
        flag = f"{self.flag}/{self._off_flag}" if self._off_flag else self.flag
        kind: dict[str, object] = {"type": self._click_type(), "multiple": self._repeats}
        if default is not None:
            kind["default"] = default
        add: Callable[..., Callable[[F], F]] = click.option
        return add(
            flag,
            self.name,
            metavar=self.details.metavar or self.details.unit or None,
            hidden=self.details.hidden,
            required=self.details.required,
            help=explained,
            show_default=default is not None
            and default is not False
            and "[default" not in explained,
            **({"is_flag": True, "default": default} if self.kind is bool else kind),
        )(function)

    def _click_type(self) -> object:
        kind = get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind
        choices = self.details.choices
        if isinstance(kind, type) and issubclass(kind, Enum):
            choices = tuple(str(to_plain(member)) for member in kind)
        if self.details.listed:
            return _Listed(click.Choice(choices) if choices else click.IntRange(min=1))
        if choices:
            return click.Choice(choices)
        if get_origin(self.kind) is tuple and kind is int:
            return IntList()
        if kind is int and self.details.least is not None:
            return click.IntRange(min=self.details.least)
        if kind is float:
            return _UNITS[self.details.unit]
        return PathType() if kind is Path else kind

    def value(self, given: object) -> object:
        """Convert click's value to the field's."""
        if given is None or given == ():
            return self.default
        if isinstance(given, tuple) and self._repeats:
            return from_plain(self.kind, list(chain(*given) if self.details.listed else given))
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return from_plain(self.kind, given)
        if isinstance(given, float):
            if isnan(given):  # Ranges let NaN through.
                raise UserError(
                    f"Invalid value for '{self.flag}': '{given}' is not a finite number"
                )
            return given * _SCALES.get(self.details.unit, 1)
        return given

    def argv(self, value: object) -> list[str]:
        """The arguments that give the field this value; none if it is the default."""
        if value == self.default:
            return []
        if isinstance(value, bool):
            return [self.flag if value else self._off_flag]
        if isinstance(value, tuple) and self._repeats:
            return [word for item in value for word in (self.flag, str(to_plain(item)))]
        if isinstance(value, tuple):
            return [self.flag, ",".join(map(str, value))]
        if isinstance(value, float):
            value = value / _SCALES.get(self.details.unit, 1)
        return [self.flag, str(to_plain(value))]


def _options_of(cls: type, groups: Iterable[str] = ()) -> list[Option]:
    """Options of a dataclass's fields, in all groups or in some."""
    kinds = field_types(cls)
    return [
        Option(item.name, without_none(kinds[item.name]), item.default, item.metadata["option"])
        for item in fields(cls)
        if "option" in item.metadata and (not groups or item.metadata["option"].group in groups)
    ]


def to_argv(value: object) -> list[str]:
    """The command-line arguments that produce this value of an options dataclass."""
    return [
        word for item in _options_of(type(value)) for word in item.argv(getattr(value, item.name))
    ]


@dataclass(frozen=True)
class OptionGroup:
    """Options whose values together make one argument of a command."""

    options: Sequence[Option]
    make: Callable[[dict[str, object]], object]

    def decorate(self, function: F) -> F:
        """Add the options to a command's function."""
        for item in reversed(self.options):
            function = item.decorate(function)
        return function

    def take(self, values: dict[str, object]) -> object:
        """Remove these options' values from click's and make the argument from them."""
        return self.make({item.name: item.value(values.pop(item.name)) for item in self.options})


def options_of(cls: Callable[..., object], *, without: Sequence[str] = ()) -> OptionGroup:
    """The options of a dataclass; fields in ``without`` keep their defaults."""
    assert isinstance(cls, type)
    options = [item for item in _options_of(cls) if item.name not in without]
    return OptionGroup(options, lambda values: cls(**values))


def with_options(
    *groups: type | OptionGroup,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of dataclasses or groups to a command, which gets one value of each."""
    made = [options_of(each) if isinstance(each, type) else each for each in groups]

    names = [item.name for each in made for item in each.options]
    assert len(names) == len(set(names)), f"two options of one name among {names}"

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            taken = [each.take(values) for each in made]
            function(*taken, **values)

        for each in reversed(made):
            command = each.decorate(command)
        return command

    return decorate


@dataclass(frozen=True)
class ScenarioOptions:
    """A command line's scenario options by field; the model and strategies are still text."""

    options: Sequence[Option]
    given: Mapping[str, object]

    @property
    def model(self) -> ModelConfig:
        """Load the model that ``--model`` and ``--layers`` describe.

        Raises:
            UserError: no such model, or it has fewer layers.
        """
        model, layers = load_model(str(self.given["model"])), self.given["layers"]
        return with_layers(model, layers) if isinstance(layers, int) else model

    def scenario(self, environ: Environ, **fixed: object) -> Scenario:
        """Make the scenario; where no option sets a value, the environment may.

        Args:
            environ: the environment.
            fixed: values for fields of Scenario or ParallelConfig that override the options.

        Raises:
            UserError: values that contradict each other or the model.
        """
        given = {**self.given, **fixed}
        # Click has already checked each option's type.
        make_layout: Callable[..., ParallelConfig] = ParallelConfig
        make: Callable[..., Scenario] = Scenario
        strategies: Callable[..., tuple[OverlapStrategy, ...]] = load_strategies
        layout = {name: given[name] for name in field_types(ParallelConfig) if name in given}
        layout["stage_layers"] = layout.get("stage_layers") or environ.stage_layers
        if layout.get("nodes") is None:
            alone = make_layout(**{**layout, "nodes": 1})
            layout["nodes"] = alone.replicas * alone.pp
        own = {name: given[name] for name in field_types(Scenario) if name in given}
        own |= {"model": self.model, "overlap": strategies(given.get("overlap", ()))}
        own |= {"parallel": make_layout(**layout)}
        return make(**{"bf16_fp32_algo": environ.bf16_fp32_algo, **own})

    def changed(self, *groups: str) -> list[Option]:
        """Options of some groups that differ from their defaults."""
        return [
            item
            for item in self.options
            if item.details.group in groups and self.given[item.name] != item.default
        ]

    def to_argv(self) -> list[str]:
        """The command-line arguments that give the same options."""
        return [word for item in self.options for word in item.argv(self.given[item.name])]


@dataclass(frozen=True)
class _ModelOptions:
    """Scenario fields that the command line gives as text."""

    model: str = option(
        "dsv4",
        OptionDetails(
            f"{', '.join(PRESETS)}, or a path to a Hugging Face config.json.", group="model"
        ),
    )
    layers: int | None = option(
        None, OptionDetails("Use only the model's first N layers.", group="model", metavar="N")
    )
    overlap: tuple[str, ...] = option(
        (),
        OptionDetails(
            f"Overlap two halves of each batch: {', '.join(STRATEGIES)}, or a file.",
            group="deployment",
            metavar="STRATEGY",
        ),
    )


def scenario_options(*groups: str, without: Sequence[str] = (), **defaults: object) -> OptionGroup:
    """Some groups of the scenario's options, as one :class:`ScenarioOptions`.

    Args:
        groups: ``model``, ``deployment``, ``plan``, ``run``, ``placement``: see the fields of
            Scenario and ParallelConfig.
        without: fields that the command sets itself.
        defaults: the command's own defaults, by field.
    """
    defaults = {"nodes": None, **defaults}
    found = [
        replace(item, default=defaults.get(item.name, item.default))
        for cls in (_ModelOptions, ParallelConfig, Scenario)
        for item in _options_of(cls, groups)
        if item.name not in without
    ]
    return OptionGroup(found, lambda values: ScenarioOptions(found, values))


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Which warm-up policies to run."""

    warmup: tuple[WarmupPolicy, ...] = option(
        (), OptionDetails("Warm-up policy; repeat the option for several.")
    )

    def policies(
        self, environ: Environ, default: Sequence[WarmupPolicy]
    ) -> tuple[WarmupPolicy, ...]:
        """Policies from the command line, else from SGLang's variables, else the default."""
        if self.warmup:
            return tuple(dict.fromkeys(self.warmup))
        of_flags = policy_of_flags(
            precompile=environ.precompile,
            fast=environ.fast_warmup,
            pp_parallel=environ.pp_parallel_warmup,
        )
        return tuple(default) if of_flags is None else (of_flags,)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Files to write Timelines to."""

    timeline: Path | None = option(
        None, OptionDetails("Write the Timelines as JSON (- for stdout).")
    )
    trace: Path | None = option(None, OptionDetails("Write a Chrome trace; open it in Perfetto."))
    plot: Path | None = option(None, OptionDetails("Draw a Gantt picture (.png or .svg)."))
