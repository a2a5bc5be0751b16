"""The command that puts two files of Timelines side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from runner.errors import UserError
from runner.files import write_json
from runner.report.compare import Comparison, comparison_json, comparison_tables
from runner.report.compare import compare as compare_timelines
from runner.timeline import Timeline, read_timelines

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument(
    "files", metavar="A.json B.json | MEASURED.json...", nargs=-1, required=True, type=_FILE
)
@click.option(
    "--hardware",
    metavar="PROFILE",
    help="Hold every measured run of the files against this profile's prediction of it.",
)
@click.option(
    "--json", "json_path", type=_FILE, help="Write JSON here; - is stdout, without the tables."
)
def compare(files: tuple[Path, ...], hardware: str | None, json_path: Path | None) -> None:
    """Compare the timelines in A.json with those of the same policy in B.json.

    B is the reference: relative errors are (A - B) / B. Give the prediction as A and the
    measurement as B. With --hardware each measured run is predicted here, from what its Timeline
    says of the model, the layout and the machine.
    """
    if hardware is not None:
        _judge(files, hardware, json_path)
        return
    if len(files) != 2:
        raise UserError(f"{len(files)} files were given: two are compared, or use --hardware")
    comparisons = _compare_files(*files)
    if json_path is not None:
        _write_json(json_path, comparisons)
    if str(json_path) != "-":
        _print_tables(comparisons)


def _judge(files: tuple[Path, ...], hardware: str, json_path: Path | None) -> None:
    from runner.report.console import make_console
    from runner.report.validation_table import judged_json, judged_table
    from sim.calibration.validation import judge, read_measured, summary
    from sim.costs.profile import load_profile

    profile = load_profile(hardware)
    judged = judge(read_measured(files), profile)
    if json_path is not None:
        write_json(json_path, judged_json(judged, profile.name), indent=1)
    if str(json_path) != "-":
        console = make_console(highlight=False)
        console.print(judged_table(judged, f"Predicted with {profile.name}"))
        console.print(summary(judged))


def _compare_files(a: Path, b: Path) -> list[Comparison]:
    of_a, of_b = _by_policy(a), _by_policy(b)
    common = [policy for policy in of_a if policy in of_b]
    if not common:
        raise UserError(f"no policy in common: {a} has {_listed(of_a)}; {b} has {_listed(of_b)}")
    for path, policies in ((a, of_a), (b, of_b)):
        alone = [policy for policy in policies if policy not in common]
        if alone:
            click.echo(f"note: only in {path}, not compared: {_listed(alone)}", err=True)
    _note_differences(of_a[common[0]], of_b[common[0]])
    return [compare_timelines(of_a[policy], of_b[policy]) for policy in common]


_SCENARIO = (
    "model",
    "layers",
    "pp",
    "tp",
    "replicas",
    "ep",
    "moe_a2a",
    "overlap",
    "attn_cp",
    "stage_layers",
    "nodes",
    "batch_sizes",
    "prompt_len",
    "stream",
    "max_tokens",
    "graph_batch_sizes",
    "walk_max_m",
    "compile_lock",
    "disaggregation",
    "speculative",
    "bf16_fp32_algo",
    "num_sms",
)


def _note_differences(a: Timeline, b: Timeline) -> None:
    """Say where the two runs were not runs of the same thing."""
    for name in _SCENARIO:
        if name in a.meta and name in b.meta and a.meta[name] != b.meta[name]:
            click.echo(f"note: {name} differs: {a.meta[name]} in A, {b.meta[name]} in B", err=True)


def _by_policy(path: Path) -> dict[str, Timeline]:
    found: dict[str, Timeline] = {}
    for timeline in read_timelines(path):
        if timeline.policy in found:
            raise UserError(
                f"{path} has policy {timeline.policy} more than once; must be one timeline each"
            )
        found[timeline.policy] = timeline
    return found


def _listed(policies: Iterable[str]) -> str:
    return ", ".join(policies) or "none"


def _write_json(path: Path, comparisons: list[Comparison]) -> None:
    data = {"version": 1, "comparisons": [comparison_json(item) for item in comparisons]}
    write_json(path, data, indent=2)


def _print_tables(comparisons: list[Comparison]) -> None:
    from runner.report.console import make_console

    console = make_console()
    for comparison in comparisons:
        for table in comparison_tables(comparison):
            console.print(table)
