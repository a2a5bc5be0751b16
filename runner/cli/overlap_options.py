"""Options of two-batch overlap and of the communication that it hides."""

from __future__ import annotations

import click

from runner.cli.common import F
from runner.model.strategy import STRATEGIES


def overlap_options(function: F) -> F:
    """``--overlap``, at most one for each forward mode, and ``--moe-a2a``."""
    function = click.option(
        "--moe-a2a",
        is_flag=True,
        help="Each rank has a block of the tokens; around the experts all-to-all (with --ep), or "
        "gather and scatter.",
    )(function)
    return click.option(
        "--overlap",
        multiple=True,
        metavar="STRATEGY",
        help=f"Overlap two halves of each batch: {', '.join(STRATEGIES)}, or a file.",
    )(function)
