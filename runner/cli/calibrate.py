"""``runner calibrate``: fit a hardware profile to measured runs."""

from __future__ import annotations

from pathlib import Path

import click

from runner.report.console import make_console, make_table
from runner.report.outputs import check_outputs
from runner.report.progress import counting, progress
from runner.report.validation import print_validation
from sim.calibration.calibrate import fit_profile, leave_one_out
from sim.calibration.validation import read_measured
from sim.costs.profile import load_profile, write_profile


@click.command()
@click.argument(
    "timelines",
    metavar="TIMELINE.json...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="PROFILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the profile, for --hardware.",
)
@click.option(
    "--base",
    default="h200",
    show_default=True,
    help="Profile name or file that supplies values which no run gives.",
)
@click.option("--name", help="The new profile's name.  [default: the output's]")
def calibrate(timelines: tuple[Path, ...], output: Path, base: str, name: str | None) -> None:
    """Fit a hardware profile to measured runs and print its leave-one-out error.

    TIMELINE.json are files that launch wrote with --timeline. Each run is also predicted by a
    profile fitted to the other runs, which shows the error to expect for a run that was not
    measured.
    """
    check_outputs(others=(output,))
    known = load_profile(base)
    measured = read_measured(timelines)
    calibration = fit_profile(measured, known, name or output.stem)
    write_profile(output, calibration.profile)
    table = make_table(f"Profile {calibration.profile.name}", ["fitted"], ["value", "samples"])
    for line in calibration.fitted:
        table.add_row(line.name, line.value, str(line.samples))
    make_console().print(table)
    if len(measured) < 2:
        print("no leave-one-out error: that needs at least two runs")
    else:
        with progress("leave one out") as show:
            runs = leave_one_out(measured, known, counting(show))
        title = "Each run, predicted by a profile fitted to the others"
        print_validation(make_console(highlight=False), runs, title)
    print(f"wrote {output}")
