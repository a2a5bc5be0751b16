"""``runner record``: run a server on its own GPU and record every DeepGEMM call."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path

import click

from runner.cli.standin import interpreter_of
from runner.errors import WorkFailedError
from runner.files import write_json
from runner.recording.recording import to_json
from runner.recording.server import Server, kind_of, version_of
from runner.recording.session import Session
from runner.report.outputs import check_outputs
from runner.report.recording_table import print_recording
from runner.watch.command import running


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the recording as JSON.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def record(command: tuple[str, ...], json_path: Path | None) -> None:
    """Run COMMAND unchanged and record every DeepGEMM call that its Python processes make.

    What the recording costs and what it cannot see is in docs/rehearsing.md. The report goes to
    standard error: standard output belongs to the command.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(json_path,))
    kind = kind_of(command)
    server = Server(kind, command) if kind else None
    with tempfile.TemporaryDirectory(prefix="deepgemm-record-") as folder:
        name = f"{kind.name} {version_of(kind, interpreter_of(command))}".strip() if kind else ""
        session = Session(command, Path(folder), _say, name)
        with running(command, session.environment(os.environ)) as child:
            waiting = threading.Thread(
                target=session.wait_until_ready, args=(server, child), daemon=True
            )
            waiting.start()
            code = child.wait()
            waiting.join()
        recording = session.recording()
    if json_path is not None:
        write_json(json_path, to_json(recording))
    print_recording(recording, sys.stderr)
    if code:
        code = code if code > 0 else 128 - code
        raise WorkFailedError(f"the command ended with {code}", code)


def _say(line: str) -> None:
    print(f"[runner record] {line}", file=sys.stderr, flush=True)
