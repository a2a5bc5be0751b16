"""Start-ups that others published, and how far the simulator is from them.

The rows are data (``sim/data/published_figures.json``, or a file of that form). A row that can be
simulated names a command with its options and the figure to take of it; the others say why not.
:mod:`runner.cli.published` runs the commands.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from statistics import median
from typing import Any

from runner.backend.gemm_walks import relax_m_list
from runner.errors import UserError
from runner.kernels.types import DeepGemmKernelType
from runner.planning.plan import Plan
from runner.timeline import Timeline
from sim.simulate import Prediction


class Figure(Enum):
    """What a row reports, and what is taken of its prediction."""

    START_UP = "start-up"
    WALK = "walk"
    LONGEST_WAIT = "longest wait"
    COMPILES = "compiles"
    CASES = "cases"

    @property
    def command(self) -> str:
        """The command that tells it."""
        return "plan" if self in (Figure.COMPILES, Figure.CASES) else "sim"

    @property
    def unit(self) -> str:
        """Seconds or a count."""
        return "cases" if self is Figure.CASES else "s"


_LIBRARY = "sgl-deep-gemm==0.1.4.post1"
"""What set-ups are predicted with: the reports are of versions of its time."""


@dataclass(frozen=True)
class SetUp:
    """How a row is simulated.

    Attributes:
        command: ``sim`` or ``plan``.
        hardware: name of a shipped profile.
        options: values of the command's options by their names without dashes: true sets a flag,
            a list of numbers is one value, a list of texts gives the option once for each.
        environment: variables that the command would read.
    """

    command: str
    hardware: str
    options: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def arguments(self) -> list[str]:
        """The options as the command line has them."""
        found = ["--hardware", self.hardware, "--library", _LIBRARY]
        for name, value in self.options.items():
            for one in _values(value):
                found += [f"--{name}"] if one is True else [f"--{name}", _text(one)]
        return found

    @property
    def line(self) -> str:
        """The command as one would type it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*variables, "runner", self.command, *self.arguments])


def _values(value: Any) -> list[Any]:
    several = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return value if several else [value]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure.

    Attributes:
        id: its name here.
        source: address of the thread.
        what: what was measured.
        reported: the figure as the thread has it.
        stated: the set-up as far as the thread tells.
        figure: what to take of the prediction; None where there is none.
        low: lower end of what was reported, in the figure's unit; None is open.
        high: the upper end.
        assumed: what the thread does not tell and the set-up needs.
        set_up: how to simulate it; None where that is not possible.
        why_not: the reason, empty where it is.
    """

    id: str
    source: str
    what: str
    reported: str
    stated: str
    figure: Figure | None = None
    low: float | None = None
    high: float | None = None
    assumed: tuple[str, ...] = ()
    set_up: SetUp | None = None
    why_not: str = ""

    @property
    def thread(self) -> str:
        """Repository and number of the thread where it is on GitHub, else its address."""
        found = re.fullmatch(
            r"https://github\.com/([^/]+)/([^/]+)/(?:pull|issues)/(\d+)", self.source
        )
        if found is None:
            return self.source
        owner, name, number = found.groups()
        return f"{name if owner in _UPSTREAM else f'{owner}/{name}'}#{number}"


_UPSTREAM = ("sgl-project", "vllm-project", "deepseek-ai")


@dataclass(frozen=True)
class Published:
    """Rows, and what is assumed in each of them."""

    rows: tuple[Row, ...]
    assumed_everywhere: tuple[str, ...] = ()


def read_published(path: Path | None = None) -> Published:
    """The shipped rows, or those of a file.

    Raises:
        UserError: a file that cannot be read, or holds no such rows.
    """
    file: Path | Traversable = resources.files("sim") / "data" / "published_figures.json"
    file = file if path is None else path
    try:
        data = json.loads(file.read_text())
        rows = tuple(_row(row, index) for index, row in enumerate(_typed(data, "rows", list)))
        common = _texts(data, "assumed_everywhere")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path or file.name} holds no published figures: {error}") from None
    names = [row.id for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path or file.name} has row {name} more than once")
    return Published(rows, common)


_MISSING = object()


def _typed(data: Any, name: str, kind: type, default: Any = _MISSING) -> Any:
    """A field that must have a type; bool is no number."""
    if not isinstance(data, dict):
        raise TypeError(f"an object is needed, not a {type(data).__name__}")
    value = data.get(name, default)
    if value is _MISSING:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, not a {kind.__name__}")
    return value


def _texts(data: Any, name: str) -> tuple[str, ...]:
    values = _typed(data, name, list, [])
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} must be a list of texts")
    return tuple(values)


def _row(data: Any, index: int) -> Row:
    name = data.get("id", index) if isinstance(data, dict) else index
    try:
        return _checked_row(data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"row {name}: {error}") from None


def _checked_row(data: Any) -> Row:
    texts = {
        name: _typed(data, name, str) for name in ("id", "source", "what", "reported", "stated")
    }
    _refuse_others(data, [item.name for item in fields(Row)])
    if ("set_up" in data) == ("why_not" in data):
        raise ValueError("either set_up or why_not must be there")
    if "why_not" in data:
        return Row(**texts, why_not=_typed(data, "why_not", str))
    figure, set_up = Figure(_typed(data, "figure", str)), _set_up(_typed(data, "set_up", dict))
    if set_up.command != figure.command:
        raise ValueError(f"figure {figure.value} is of runner {figure.command}")
    low, high = _bound(data, "low"), _bound(data, "high")
    if low is None and high is None:
        raise ValueError("low and high are both missing")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low} and high {high}")
    assumed = _texts(data, "assumed")
    return Row(**texts, figure=figure, low=low, high=high, assumed=assumed, set_up=set_up)


def _bound(data: dict[str, Any], name: str) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} is {value!r}: it must be a number above 0")
    return float(value)


def _set_up(data: dict[str, Any]) -> SetUp:
    _refuse_others(data, [item.name for item in fields(SetUp)])
    options, environment = _typed(data, "options", dict), _typed(data, "environment", dict, {})
    for name, value in options.items():
        for one in value if value and isinstance(value, list) else [value]:
            if one is False or not isinstance(one, str | int | float):
                raise TypeError(f"option {name} is {value!r}: no such value can be given")
    return SetUp(_typed(data, "command", str), _typed(data, "hardware", str), options, environment)


def _refuse_others(data: dict[str, Any], known: Sequence[str]) -> None:
    for name in data:
        if name not in known:
            raise ValueError(f"{name} is not known")


def walk_seconds(timeline: Timeline) -> float:
    """Seconds of rank 0 from its first walk or compile to its last walk's end, until it is up.

    Raises:
        UserError: it walks nothing.
    """
    spans = [span for span in timeline.of_rank(0) if span.start < timeline.up]
    walks = [span for span in spans if span.kind == "load" and span.name.startswith("walk ")]
    if not walks:
        raise UserError(f"{timeline.policy} walks nothing on rank 0")
    begun = [span.start for span in spans if span.kind == "compile"] + [walks[0].start]
    return max(span.end for span in walks) - min(begun)


def figure_of(figure: Figure, prediction: Prediction) -> float:
    """A figure of a simulated run, in seconds.

    Raises:
        UserError: the run does not have it.
    """
    if figure is Figure.WALK:
        return walk_seconds(prediction.timeline)
    if figure is Figure.LONGEST_WAIT:
        return prediction.longest_wait
    assert figure is Figure.START_UP, f"{figure} is of a plan"
    return prediction.timeline.up


def walk_cases(plan: Plan) -> int:
    """Calls of vLLM's ``relax`` walk over a plan's dense FP8 GEMMs."""
    return sum(
        len(relax_m_list(max(demand.ms), demand.shape.n, demand.shape.num_sms))
        for demand in plan.demands
        if demand.shape.type is DeepGemmKernelType.GEMM_NT_F8F8BF16
    )


def deviation(predicted: float, low: float | None, high: float | None) -> float:
    """Relative distance to the nearer end of a range, 0 inside it; an end that is None is open."""
    if low is not None and predicted < low:
        return predicted / low - 1
    if high is not None and predicted > high:
        return predicted / high - 1
    return 0.0


@dataclass(frozen=True)
class Compared:
    """A row and its prediction.

    Attributes:
        predicted: the row's figure in its unit.
        estimate: whether the profile is one.
        dies: whether the watchdog would have ended the run.
    """

    row: Row
    predicted: float
    estimate: bool
    dies: bool = False

    @property
    def deviation(self) -> float:
        """See :func:`deviation`."""
        return deviation(self.predicted, self.row.low, self.row.high)


@dataclass(frozen=True)
class Summary:
    """Absolute deviations over the rows in seconds, and how many of all lie in their range.

    ``median`` and ``worst`` are None where no row is in seconds.
    """

    rows: int
    within: int
    in_seconds: int
    median: float | None
    worst: float | None

    @property
    def line(self) -> str:
        """The same as text."""
        found = f"{self.within} of {self.rows} rows within the reported range"
        if self.median is None or self.worst is None:
            return found
        return (
            f"{self.in_seconds} rows in seconds: median absolute deviation {self.median:.1%}, "
            f"worst {self.worst:.1%}; {found}"
        )


def summary(compared: Sequence[Compared]) -> Summary:
    """What the deviations come to."""
    seconds = [
        abs(item.deviation) for item in compared if item.row.figure and item.row.figure.unit == "s"
    ]
    return Summary(
        rows=len(compared),
        within=sum(item.deviation == 0 for item in compared),
        in_seconds=len(seconds),
        median=median(seconds) if seconds else None,
        worst=max(seconds, default=None),
    )
