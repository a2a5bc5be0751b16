"""Run a server with the recording hook in its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from runner.recording.events import read_processes
from runner.recording.grouping import group_calls
from runner.recording.hook.where import PHASE_FILE
from runner.recording.recording import Recording, Request
from runner.recording.server import Server
from runner.watch.command import running

_SITE = Path(__file__).parent / "hook" / "site"
_POLL_SECONDS = 0.5
_STACK_SECONDS = 2.0
_END_SECONDS = 20.0


@dataclass
class Session:
    """A server that is being recorded.

    Attributes:
        folder: where its processes write what they record.
        server: its name and version.
        say: shows one line to the user.
    """

    command: Sequence[str]
    folder: Path
    say: Callable[[str], None]
    server: str = ""
    started: float = field(default_factory=time.monotonic)
    ready: float | None = None
    max_tokens: int | None = None
    requests: list[Request] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def environment(self, base: Mapping[str, str], *, rehearse: bool = False) -> dict[str, str]:
        """``base`` with the hook; in a rehearsal, it also replaces what a stand-in cannot run."""
        path = base.get("PYTHONPATH")
        found = {
            **base,
            "PYTHONPATH": f"{_SITE}{os.pathsep}{path}" if path else str(_SITE),
            "DEEPGEMM_RECORD": str(self.folder.absolute()),
        }
        return {**found, "DEEPGEMM_REHEARSE": "1"} if rehearse else found

    def set_phase(self, phase: str) -> None:
        """Name the phase that calls belong to from now on."""
        scratch = self.folder / f".{PHASE_FILE}"
        scratch.write_text(phase)
        scratch.replace(self.folder / PHASE_FILE)
        time.sleep(_POLL_SECONDS)  # The hook looks this often.

    def wait_until_ready(
        self, server: Server | None, child: subprocess.Popen[bytes], timeout: float = float("inf")
    ) -> bool:
        """Wait until the server answers; False if it ends or does not within the time."""
        while child.poll() is None and self.seconds < timeout:
            if server is not None and server.is_ready():
                self.ready = self.seconds
                self.max_tokens = server.max_tokens()
                self.note_memory()
                self.set_phase("ready")
                return True
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
        return False

    def ask(self, server: Server, tokens: Sequence[int], timeout: float) -> None:
        """Send one request of each length, one after the other, each a phase of its own."""
        for number, count in enumerate(tokens):
            self.set_phase(f"request of {count} tokens")
            start = self.seconds
            error = server.ask(count, number, timeout)
            self.requests.append(Request(count, start, self.seconds, error))
            self.say(f"request of {count} tokens: {error or f'{self.seconds - start:.1f} s'}")
            if error and server.is_ready() is False:
                return

    def note_memory(self) -> None:
        """Keep the most memory that each recorded process has held."""
        for process in self._pids():
            with suppress(OSError, ValueError, IndexError):
                status = Path(f"/proc/{process}/status").read_text()
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                self.peak_bytes[process] = max(peak, self.peak_bytes.get(process, 0))

    def _pids(self) -> list[int]:
        names = {path.stem.partition("-")[0] for path in self.folder.glob("*-*.jsonl")}
        return [int(name) for name in names if name.isdecimal()]

    def stacks(self) -> str:
        """Ask each process of a rehearsal for the stacks of its threads."""
        pids = self._pids()
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGUSR2)
        time.sleep(_STACK_SECONDS)
        texts = []
        for pid in pids:
            with suppress(OSError):
                texts.append(f"process {pid}\n{(self.folder / f'{pid}.stacks').read_text()}")
        return "\n".join(texts)

    def recording(self, *, gpu: str = "") -> Recording:
        """What was recorded until now."""
        processes = read_processes(self.folder)
        counts: dict[str, int] = {}
        problems = list(self.problems)
        libraries: list[str] = []
        for process in processes:
            for name, count in process.counts.items():
                counts[name] = counts.get(name, 0) + count
            problems += [f"recording stopped in {process.pid}: {process.stopped}"] * bool(
                process.stopped
            )
            libraries += [file for _, file in process.libraries]
        return Recording(
            command=list(self.command),
            server=self.server,
            gpu=gpu,
            library=str(Path(libraries[0]).parent) if libraries else "",
            ready=self.ready,
            max_tokens=self.max_tokens,
            requests=self.requests,
            groups=group_calls(processes),
            counts=counts,
            peak_bytes=self.peak_bytes,
            problems=problems,
        )


@contextmanager
def running_group(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command and end it, with all processes that it started, when the block is left.

    Its output goes to our standard error.
    """
    with running(command, environment, stdout=2) as child:
        try:
            yield child
        finally:
            _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    group = os.getpgid(child.pid) if child.poll() is None else child.pid
    own = group != os.getpgid(0)
    for how, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _END_SECONDS)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, how) if own else child.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
