"""Predictions against start-ups that others published: python docs/measurements/published.py

Each row of published_figures.json that can be simulated names a command, `runner sim` or `runner
plan`, with its options and the figure to take from the result; the others say why not.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any
from unittest import mock

from rich.table import Table
from rich.text import Text

from runner.backend.gemm_walks import relax_m_list
from runner.cli import cli
from runner.report.console import PIPED_WIDTH, make_console, make_table
from runner.timeline import Timeline, read_timelines
from sim.costs.profile import load_profile

Row = dict[str, Any]
FIGURES = Path(__file__).with_name("published_figures.json")
LIBRARY = "sgl-deep-gemm==0.1.4.post1"
"""The reports are of versions of its time."""


def arguments(set_up: Row) -> list[str]:
    """The options as the command line has them: true sets a flag, texts repeat the option."""
    found = ["--hardware", set_up["hardware"], "--library", LIBRARY]
    for name, value in set_up["options"].items():
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        for one in value if texts else [value]:
            text = ",".join(map(str, one)) if isinstance(one, list) else str(one)
            found += [f"--{name}"] if one is True else [f"--{name}", text]
    return found


def run(set_up: Row, *outputs: str) -> str:
    """What the set-up's command prints, in no other environment than the set-up's."""
    mine = {name: value for name, value in os.environ.items() if "SGL" not in name}
    environment = {**mine, **set_up.get("environment", {})}
    printed = io.StringIO()
    command = [set_up["command"], *arguments(set_up), *outputs]
    with mock.patch.dict(os.environ, environment, clear=True), redirect_stdout(printed):
        cli.main(command, prog_name="runner", standalone_mode=False)
    return printed.getvalue()


def predict(row: Row) -> tuple[float, bool]:
    """The row's figure as its command predicts it, and whether the watchdog ends that run."""
    set_up, figure = row["set_up"], row["figure"]
    if figure == "compiles":
        found = re.search(r"compiled one by one (\d+) s", run(set_up))
        assert found is not None
        return float(found[1]), False
    if figure == "cases":
        return float(relax_cases(json.loads(run(set_up, "--json", "-")))), False
    with tempfile.TemporaryDirectory() as folder:
        result, timeline = Path(folder) / "result.json", Path(folder) / "timeline.json"
        run(set_up, "--json", str(result), "--timeline", str(timeline))
        [prediction] = json.loads(result.read_text())["predictions"]
        [predicted] = read_timelines(timeline)
    seconds = prediction["up_seconds"] if figure == "start-up" else walk_seconds(predicted)
    return seconds, prediction["timeout"] is not None


def walk_seconds(timeline: Timeline) -> float:
    """Seconds of rank 0 from its first walk or compile to its last walk's end, until it is up."""
    spans = [span for span in timeline.by_rank()[0] if span.start < timeline.up]
    walks = [span for span in spans if span.kind == "load" and span.name.startswith("walk ")]
    begun = [span.start for span in spans if span.kind == "compile"] + [walks[0].start]
    return max(span.end for span in walks) - min(begun)


def relax_cases(plan: Row) -> int:
    """Calls of vLLM's `relax` walk over the dense FP8 GEMMs of a plan's JSON."""
    longest: dict[tuple[int, int, int], int] = {}
    for kernel in plan["kernels"]:
        for use in kernel["uses"]:
            if use["type"] == "gemm_nt_f8f8bf16":
                shape = use["n"], use["k"], use["num_sms"]
                last = max(end for _, end in use["m_ranges"])
                longest[shape] = max(longest.get(shape, 0), last)
    return sum(len(relax_m_list(m, n, num_sms)) for (n, _, num_sms), m in longest.items())


def deviation(predicted: float, low: float | None, high: float | None) -> float:
    """Relative distance to the nearer end of a range, 0 inside it; an end that is None is open."""
    if low is not None and predicted < low:
        return predicted / low - 1
    if high is not None and predicted > high:
        return predicted / high - 1
    return 0.0


def thread(source: str) -> str:
    """Repository and number of a GitHub thread."""
    owner, name, _, number = source.removeprefix("https://github.com/").split("/")
    if owner not in ("sgl-project", "vllm-project", "deepseek-ai"):
        name = f"{owner}/{name}"
    return f"{name}#{number}"


def shown(row: Row, predicted: float) -> str:
    """A figure in the unit of the report."""
    if row["figure"] in ("cases", "compiles"):
        return f"{predicted:.0f}" + " s" * (row["figure"] == "compiles")
    minutes = row["reported"].endswith("min")
    return f"{predicted / 60:.1f} min" if minutes else f"{predicted:.1f} s"


def comparison_table(rows: list[Row], predicted: list[float]) -> Table:
    """One row each; deviations are from the nearer end of what was reported."""
    title, headers = "Published figures and predictions", ["reported", "predicted", "deviation"]
    table = make_table(title, ["row", "source", "figure"], headers)
    table.add_column("hardware", no_wrap=True)
    table.pad_edge = False
    for row, value in zip(rows, predicted, strict=True):
        hardware = row["set_up"]["hardware"]
        off = deviation(value, row["low"], row["high"])
        table.add_row(
            Text(row["id"]),
            Text(thread(row["source"])),
            row["figure"],
            Text(row["reported"]),
            shown(row, value),
            f"{100 * off:+.1f} %" if off else "0 %",
            hardware + (", estimate" if load_profile(hardware).estimate else ""),
        )
    return table


def details(row: Row, dies: bool) -> Iterator[str]:
    """What was stated and assumed, and the command."""
    yield from wrapped(f"{row['id']}: {row['what']}", "", "")
    yield from wrapped(f"stated: {row['stated']}")
    for text in row["assumed"]:
        yield from wrapped(f"assumed: {text}")
    if dies:
        yield from wrapped("the watchdog would end the predicted run")
    set_up = row["set_up"]
    variables = [f"{name}={value}" for name, value in set_up.get("environment", {}).items()]
    line = shlex.join([*variables, "runner", set_up["command"], *arguments(set_up)])
    yield from wrapped(line, "  $ ", "      ")


def wrapped(text: str, first: str = "  - ", others: str = "    ") -> list[str]:
    """Lines of an item; a command's words stay whole, since they are to be copied."""
    return wrap(
        text,
        PIPED_WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main() -> None:
    """Print the tables, and between them what was assumed."""
    data = json.loads(FIGURES.read_text())
    rows = [row for row in data["rows"] if "set_up" in row]
    results = [predict(row) for row in rows]
    console = make_console(highlight=False)
    console.print(comparison_table(rows, [value for value, _ in results]))
    off = [
        abs(deviation(value, row["low"], row["high"]))
        for row, (value, _) in zip(rows, results, strict=True)
    ]
    seconds = [error for row, error in zip(rows, off, strict=True) if row["figure"] != "cases"]
    console.print(
        f"{len(seconds)} rows in seconds: median absolute deviation {median(seconds):.1%}, worst "
        f"{max(seconds):.1%}; {off.count(0)} of {len(rows)} rows within the "
        "reported range"
    )
    print("\nAssumed in every row:")
    for text in data["assumed_everywhere"]:
        print(*wrapped(text), sep="\n")
    for row, (_, dies) in zip(rows, results, strict=True):
        print("", *details(row, dies), sep="\n")
    table = make_table("Not simulated", ["row", "reported", "why not"], [])
    for row in data["rows"]:
        if "why_not" in row:
            table.add_row(Text(row["id"]), Text(row["reported"]), Text(row["why_not"]))
    print()
    console.print(table)


if __name__ == "__main__":
    main()
