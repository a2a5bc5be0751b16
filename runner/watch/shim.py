"""A compiler shim: a stand-in for nvcc that records each compile that it passes on.

DeepGEMM runs whatever ``DG_JIT_NVCC_COMPILER`` names. The shim is a small POSIX shell script that
runs the real nvcc and writes one record for each compile, so it sees the compiles of any process
and need not guess them from slow calls. Each record is one file, renamed into place, so parallel
compiles never mix.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.kernels.describe import name_of_source

_SCRIPT = r"""#!/bin/sh
# Stands in for nvcc and records each compile (start, end, rank, process, exit code, source).
real={nvcc}
log={log}
forbid={forbid}
source=
for argument in "$@"; do
    case "$argument" in *.cu) source=$argument ;; --dryrun) exec "$real" "$@" ;; esac
done
[ -n "$source" ] || exec "$real" "$@"
# The library starts us through a shell, other shims directly; who asked is above them.
asker=$PPID
while case "$(cat /proc/$asker/comm 2>/dev/null)" in sh|dash|bash|nvcc*) ;; *) false ;; esac; do
    asker=$(set -- $(cat /proc/$asker/stat); echo "$4")
done
start=$(date +%s.%N)
record="$log/$start-$$"
describe() {{
    printf '%s\n' "start $start" "end $1" "rank ${{RANK:--1}}" "pid $asker" "exit $2"
    printf '%s\n\n' "command $(tr '\0\n' '  ' </proc/$asker/cmdline 2>/dev/null)"
    cat "$source"
}}
describe 0 -1 >"$record.tmp" && mv "$record.tmp" "$record.running"
if [ -n "$forbid" ] && [ -e "$forbid" ]; then
    echo "a DeepGEMM compile is forbidden by now: $source" >&2
    code={forbidden}
else
    "$real" "$@"
    code=$?
fi
describe "$(date +%s.%N)" $code >"$record.tmp" && mv "$record.tmp" "$record.compile"
rm -f "$record.running"
exit $code
"""

WATCHED = "DEEPGEMM_COLDSTART_WATCHED"
"""Set in the environment of a watched command, so that our own builder uses visible compiles."""

FORBIDDEN_EXIT = 97
"""Exit code of a compile that was not allowed."""

FINISHED = "*.compile"
"""Pattern of finished compiles' records; their names sort by start."""


@dataclass(frozen=True)
class CompileRecord:
    """One compile seen by the shim.

    Attributes:
        start: seconds since the epoch.
        end: seconds since the epoch; 0 if it never ended.
        rank: world rank, -1 if the environment names none.
        pid: the process that asked for the kernel; ``command`` is its command line.
        exit_code: -1 if it never ended.
    """

    start: float
    end: float
    rank: int
    pid: int
    exit_code: int
    source: str
    command: str = ""

    @property
    def kernel_name(self) -> str:
        return name_of_source(self.source)


def write_shim(path: Path, *, nvcc: Path, log_dir: Path, forbid: Path | None = None) -> Path:
    """Write a shim for ``nvcc`` that fails compiles once the file ``forbid`` exists."""
    log_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _SCRIPT.format(
            nvcc=shlex.quote(str(nvcc.absolute())),
            log=shlex.quote(str(log_dir.resolve())),
            forbid=shlex.quote(str(forbid.absolute())) if forbid else "",
            forbidden=FORBIDDEN_EXIT,
        )
    )
    path.chmod(0o755)
    return path


def read_records(log_dir: Path) -> list[CompileRecord]:
    """Finished compiles, ordered by start."""
    return _read(log_dir, FINISHED)


def read_unfinished(log_dir: Path) -> list[CompileRecord]:
    """Compiles that have started and not ended: still running, or killed."""
    return _read(log_dir, "*.running")


def _read(log_dir: Path, pattern: str) -> list[CompileRecord]:
    records = []
    for path in log_dir.glob(pattern):
        # A compile that ended after the listing has renamed its record.
        with suppress(FileNotFoundError):
            records.append(read_record(path))
    return sorted(records, key=lambda record: (record.start, record.pid))


def read_record(path: Path) -> CompileRecord:
    """Read one record that the shim wrote."""
    head, _, source = path.read_text(errors="replace").partition("\n\n")
    values = dict(line.partition(" ")[::2] for line in head.splitlines())
    return CompileRecord(
        start=float(values["start"]),
        end=float(values["end"]),
        rank=int(values["rank"]) if values["rank"].isdecimal() else -1,
        pid=int(values["pid"]),
        exit_code=int(values["exit"]),
        source=source,
        command=values["command"].strip(),
    )
