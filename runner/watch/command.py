"""Run any server unchanged and see every DeepGEMM compile that happens while it runs.

The only means is ``DG_JIT_NVCC_COMPILER``: a shim in nvcc's place records what it passes on, and
refuses it once a compile is forbidden.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
class Forbid:
    """When compiles begin to fail: after so many seconds, or once a file exists."""

    seconds: float | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Watched:
    """What a watched run did.

    Attributes:
        exit_code: the command's; 128 + n where signal n ended it.
        started: seconds since the epoch.
        seconds: how long it ran.
        records: finished compiles, forbidden ones among them.
        unfinished: compiles that had begun and never ended.
    """

    exit_code: int
    started: float
    seconds: float
    records: list[CompileRecord]
    unfinished: list[CompileRecord]

    @property
    def forbidden(self) -> list[CompileRecord]:
        """Compiles that were refused."""
        return [record for record in self.records if record.exit_code == FORBIDDEN_EXIT]

    @property
    def compiled(self) -> list[CompileRecord]:
        """Compiles that the real compiler did."""
        return [record for record in self.records if record.exit_code != FORBIDDEN_EXIT]


def watch(
    command: Sequence[str],
    *,
    nvcc: Path,
    environment: Mapping[str, str],
    work_dir: Path,
    forbid: Forbid | None = None,
    on_compile: Callable[[CompileRecord, float], None] = lambda record, seconds: None,
) -> Watched:
    """Run ``command`` to its end.

    Args:
        command: program and arguments.
        nvcc: the real compiler.
        environment: the command's environment; the shim is added.
        work_dir: for the shim and its records.
        forbid: when compiles begin to fail.
        on_compile: told each compile soon after its end, with its seconds since the start.

    Raises:
        UserError: the command cannot be started.
    """
    flag = _flag(forbid, work_dir)
    log = work_dir / "compiles"
    shim = write_shim(work_dir / "nvcc", nvcc=nvcc, log_dir=log, forbid=flag)
    started = time.time()
    told: set[Path] = set()
    watched = {**environment, "DG_JIT_NVCC_COMPILER": str(shim.absolute()), WATCHED: "1"}
    with running(command, watched) as child:
        while (code := _wait(child)) is None:
            if forbid is not None and forbid.seconds is not None and flag is not None:
                _raise_flag(flag, due=time.time() - started >= forbid.seconds)
            _tell(log, told, started, on_compile)
    _tell(log, told, started, on_compile)
    return Watched(
        exit_code=code if code >= 0 else 128 - code,
        started=started,
        seconds=time.time() - started,
        records=read_records(log),
        unfinished=read_unfinished(log),
    )


def _flag(forbid: Forbid | None, work_dir: Path) -> Path | None:
    """The file whose existence forbids; where nothing is to be waited for it is there at once."""
    if forbid is None:
        return None
    flag = forbid.file or work_dir / "forbidden"
    if forbid.seconds is not None:
        _raise_flag(flag, due=forbid.seconds <= 0)
    return flag


def _raise_flag(flag: Path, *, due: bool) -> None:
    if due and not flag.exists():
        flag.touch()


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _tell(
    log: Path,
    told: set[Path],
    started: float,
    on_compile: Callable[[CompileRecord, float], None],
) -> None:
    for path in sorted(set(log.glob(FINISHED)) - told):
        told.add(path)
        record = read_record(path)
        on_compile(record, record.start - started)


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The command; it ends when the block is left early.

    A terminal's Ctrl-C reaches a shared group by itself. So with a terminal, which the command may
    read, the group is shared and an interrupt not passed on; else the group is the command's own
    and an interrupt goes to all of it. What else ends us goes to the command alone.
    """
    shared = sys.stdin is not None and sys.stdin.isatty()
    running: list[subprocess.Popen[bytes]] = []
    pending: list[int] = []

    def pass_on(got: int, frame: object) -> None:
        if not running:
            pending.append(got)
        elif got == signal.SIGINT:
            if not shared:
                os.killpg(running[0].pid, got)
        else:
            running[0].send_signal(got)

    # What is ignored (a hang-up under nohup) stays ignored, here and in the command.
    heard = [each for each in _PASSED_ON if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, pass_on) for each in heard}
    try:
        running.append(_start(command, environment, own_group=not shared))
        for got in pending:
            pass_on(got, None)
        yield running[0]
    finally:
        for child in running:
            if child.poll() is None:
                child.terminate()
                child.wait()
        for each, handler in before.items():
            signal.signal(each, handler)


def _start(
    command: Sequence[str], environment: Mapping[str, str], *, own_group: bool
) -> subprocess.Popen[bytes]:
    group = 0 if own_group else None
    try:
        return subprocess.Popen(list(command), env=dict(environment), process_group=group)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
