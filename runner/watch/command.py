"""Run any server unchanged and see every DeepGEMM compile that happens while it runs.

This only needs ``DG_JIT_NVCC_COMPILER``: a shim in nvcc's place records every compile that it
passes on, and refuses compiles once they are forbidden.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError
from runner.watch.shim import (
    FINISHED,
    FORBIDDEN_EXIT,
    WATCHED,
    CompileRecord,
    read_record,
    read_records,
    read_unfinished,
    write_shim,
)

_POLL_SECONDS = 0.2
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Watched:
    """What a watched run did.

    Attributes:
        exit_code: the command's exit code; 128 + n if signal n ended it.
        started: seconds since the epoch.
        was_forbidding: whether compiles were forbidden before the command ended.
        records: finished compiles, including forbidden ones.
        unfinished: compiles that started and never ended.
    """

    exit_code: int
    started: float
    seconds: float
    was_forbidding: bool
    records: list[CompileRecord]
    unfinished: list[CompileRecord]

    @property
    def forbidden(self) -> list[CompileRecord]:
        return [record for record in self.records if record.exit_code == FORBIDDEN_EXIT]

    @property
    def compiled(self) -> list[CompileRecord]:
        return [record for record in self.records if record.exit_code != FORBIDDEN_EXIT]


def watch(
    command: Sequence[str],
    *,
    nvcc: Path,
    environment: Mapping[str, str],
    work_dir: Path,
    forbid_after: float | Path | None = None,
    on_compile: Callable[[CompileRecord, float], None] = lambda record, seconds: None,
) -> Watched:
    """Run ``command`` to its end.

    Args:
        environment: the command's environment, to which the shim is added.
        work_dir: folder for the shim and its records.
        forbid_after: compiles fail after this many seconds, or once this file exists.
        on_compile: called soon after each compile ends, with its start in seconds since the
            command's start.

    Raises:
        UserError: the command cannot be started.
    """
    forbid = forbid_after if isinstance(forbid_after, Path) else work_dir / "forbidden"
    log = work_dir / "compiles"
    shim = write_shim(work_dir / "nvcc", nvcc=nvcc, log_dir=log, forbid=forbid)
    environment = {**environment, "DG_JIT_NVCC_COMPILER": str(shim.absolute()), WATCHED: "1"}
    started = time.time()
    seen: set[Path] = set()
    was_forbidding = False

    def look() -> None:
        nonlocal was_forbidding
        if isinstance(forbid_after, float) and time.time() - started >= forbid_after:
            forbid.touch()
        was_forbidding = was_forbidding or forbid.exists()
        for path in sorted(set(log.glob(FINISHED)) - seen):
            seen.add(path)
            record = read_record(path)
            on_compile(record, record.start - started)

    look()
    with running(command, environment) as child:
        while (code := child.poll()) is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
            look()
    look()
    return Watched(
        exit_code=code if code >= 0 else 128 - code,
        started=started,
        seconds=time.time() - started,
        was_forbidding=was_forbidding,
        records=read_records(log),
        unfinished=read_unfinished(log),
    )


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command, pass signals on to it, and end it if the block is left early.

    Ctrl-C in a terminal reaches the whole process group. So with a terminal, which the command may
    read, the command shares our group and we pass no interrupt on; without one, the command has its
    own group and we pass interrupts on to all of it. Other signals go to the command alone.

    Raises:
        UserError: the command cannot be started.
    """
    shared = sys.stdin is not None and sys.stdin.isatty()
    child: subprocess.Popen[bytes] | None = None
    pending: list[int] = []

    def pass_on(got: int, frame: object) -> None:
        if child is None:
            pending.append(got)
        elif got != signal.SIGINT:
            child.send_signal(got)
        elif not shared:
            os.killpg(child.pid, got)

    # An ignored signal (a hang-up under nohup) stays ignored, here and in the command.
    heard = [each for each in _PASSED_ON if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, pass_on) for each in heard}
    try:
        try:
            child = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdout=stdout,
                process_group=None if shared else 0,
            )
        except OSError as error:
            raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
        for got in pending:
            pass_on(got, None)
        yield child
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            child.wait()
        for each, handler in before.items():
            signal.signal(each, handler)
