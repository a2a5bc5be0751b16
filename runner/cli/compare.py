"""``runner compare``: compare two files of Timelines, or measured runs with predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import click

from runner.config.parallel import ParallelConfig
from runner.errors import UserError
from runner.files import write_json
from runner.report.compare import (
    TimelineComparison,
    compare_timelines,
    comparison_json,
    comparison_tables,
)
from runner.report.console import make_console
from runner.scenario import Scenario
from runner.timeline import Timeline, read_timelines

_FILE = click.Path(path_type=Path)


def _compared_names() -> list[str]:
    """Metadata that is equal in two Timelines of the same scenario.

    The memory of walks is left out: without the option, a prediction uses its profile's.
    """
    names = [item.name for item in (*fields(ParallelConfig), *fields(Scenario))]
    return [name for name in dict.fromkeys(["model", "layers", *names]) if name != "walk_memory"]


@click.command()
@click.argument(
    "files", metavar="A.json B.json | MEASURED.json...", nargs=-1, required=True, type=_FILE
)
@click.option(
    "--hardware",
    metavar="PROFILE",
    help="Predict every measured run in the files with this profile, and compare.",
)
@click.option(
    "--json", "json_path", type=_FILE, help="Write JSON here; - is stdout, without the tables."
)
def compare(files: tuple[Path, ...], hardware: str | None, json_path: Path | None) -> None:
    """Compare the timelines in A.json with those of the same policy in B.json.

    B is the reference: relative errors are (A - B) / B. Give the prediction as A and the
    measurement as B. With --hardware each measured run is predicted here, from what its Timeline
    says about the model, the layout and the machine.
    """
    if hardware is not None:
        _validate(files, hardware, json_path)
        return
    if len(files) != 2:
        raise UserError(
            f"{len(files)} files were given: give two to compare, or measured ones with --hardware"
        )
    comparisons = _compare_files(*files)
    if json_path is not None:
        data = {"version": 1, "comparisons": [comparison_json(item) for item in comparisons]}
        write_json(json_path, data, indent=2)
    if str(json_path) != "-":
        console = make_console()
        for comparison in comparisons:
            for table in comparison_tables(comparison):
                console.print(table)


def _validate(files: tuple[Path, ...], hardware: str, json_path: Path | None) -> None:
    from runner.report.validation import print_validation, validation_json
    from sim.calibration.validation import read_measured, validate
    from sim.costs.profile import load_profile

    profile = load_profile(hardware)
    runs = validate(read_measured(files), profile)
    if json_path is not None:
        write_json(json_path, validation_json(runs, profile.name), indent=1)
    if str(json_path) != "-":
        print_validation(make_console(highlight=False), runs, f"Predicted with {profile.name}")


def _compare_files(a: Path, b: Path) -> list[TimelineComparison]:
    """Compare the policies that both files have, and report on stderr what cannot be compared."""
    of_a, of_b = _by_policy(a), _by_policy(b)
    common = [policy for policy in of_a if policy in of_b]
    if not common:
        raise UserError(f"no policy in common: {a} has {_listed(of_a)}; {b} has {_listed(of_b)}")
    for path, policies in ((a, of_a), (b, of_b)):
        alone = [policy for policy in policies if policy not in common]
        if alone:
            click.echo(f"note: only in {path}, not compared: {_listed(alone)}", err=True)
    meta_a, meta_b = of_a[common[0]].meta, of_b[common[0]].meta
    for name in _compared_names():
        if name in meta_a and name in meta_b and meta_a[name] != meta_b[name]:
            click.echo(f"note: {name} differs: {meta_a[name]} in A, {meta_b[name]} in B", err=True)
    return [compare_timelines(of_a[policy], of_b[policy]) for policy in common]


def _by_policy(path: Path) -> dict[str, Timeline]:
    found: dict[str, Timeline] = {}
    for timeline in read_timelines(path):
        if timeline.policy in found:
            raise UserError(
                f"{path} has policy {timeline.policy} more than once: each may appear once"
            )
        found[timeline.policy] = timeline
    return found


def _listed(policies: Iterable[str]) -> str:
    return ", ".join(policies) or "none"
