"""``runner calibrate``: a hardware profile out of measured runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from runner.report.console import make_console, make_table
from runner.report.outputs import check_outputs
from runner.report.progress import counting, progress
from runner.report.validation_table import judged_table
from runner.timeline import Timeline
from sim.calibration.calibrate import Calibration, fit_profile, leave_one_out
from sim.calibration.validation import read_measured, summary
from sim.costs.profile import Profile, load_profile, write_profile


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
    help="Where the profile goes; --hardware takes it.",
)
@click.option(
    "--base",
    default="h200",
    show_default=True,
    help="Profile name or file that what no run tells is taken from.",
)
@click.option("--name", help="The new profile's name.  [default: the output's]")
def calibrate(timelines: tuple[Path, ...], output: Path, base: str, name: str | None) -> None:
    """Fit a hardware profile to measured runs and tell its leave-one-out error.

    TIMELINE.json are files that launch wrote with --timeline. Every run is also predicted by a
    profile that is fitted to the others: that is the error to expect of a run that was not
    measured.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(output,))
    known = load_profile(base)
    measured = read_measured(timelines)
    made = fit_profile(measured, known, name or output.stem)
    write_profile(output, made.profile)
    _print(made)
    _print_left_out(measured, known)
    print(f"wrote {output}")


def _print(made: Calibration) -> None:
    table = make_table(f"Profile {made.profile.name}", ["fitted"], ["value", "samples"])
    for line in made.fitted:
        table.add_row(line.name, line.value, str(line.samples))
    make_console().print(table)


def _print_left_out(measured: Sequence[Timeline], base: Profile) -> None:
    if len(measured) < 2:
        print("one run: there is none to leave out")
        return
    with progress("leave one out") as show:
        judged = leave_one_out(measured, base, counting(show))
    console = make_console(highlight=False)
    console.print(judged_table(judged, "Each run by a profile of the others"))
    console.print(summary(judged))
