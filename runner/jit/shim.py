"""A compiler shim: an nvcc that records each compile it passes on.

DeepGEMM runs whatever ``DG_JIT_NVCC_COMPILER`` names. The shim is a small POSIX shell script that
runs the real nvcc and writes one record a compile, so that compiles of any process are seen
rather than guessed from slow calls. One record is one file, renamed into place: records of
parallel compiles never mix.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from runner.jit.describe import name_of_source

_SCRIPT = r"""#!/bin/sh
# Runs the real nvcc and records the compile (start, end, rank, pid, exit code, source).
real={nvcc}
log={log}
source=
output=
previous=
for argument in "$@"; do
    case "$argument" in *.cu) source=$argument ;; esac
    [ "$previous" = -o ] && output=$argument
    previous=$argument
done
[ -n "$source" ] || exec "$real" "$@"
start=$(date +%s.%N)
"$real" "$@"
code=$?
end=$(date +%s.%N)
record="$log/$start-$$"
{{
    echo "start $start"
    echo "end $end"
    echo "rank ${{RANK:--1}}"
    echo "pid $PPID"
    echo "exit $code"
    echo "output $output"
    echo
    cat "$source"
}} >"$record.tmp" && mv "$record.tmp" "$record.compile"
exit $code
"""


@dataclass(frozen=True)
class CompileRecord:
    """One compile seen by the shim. Times are seconds since the epoch; rank -1 means unknown."""

    start: float
    end: float
    rank: int
    pid: int
    exit_code: int
    source: str

    @property
    def kernel_name(self) -> str:
        """The library's kernel name, read off the source."""
        return name_of_source(self.source)


def write_shim(path: Path, *, nvcc: Path, log_dir: Path) -> Path:
    """Write the shim script for ``nvcc`` to ``path``; records go to ``log_dir``."""
    log_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _SCRIPT.format(
            nvcc=shlex.quote(str(nvcc.absolute())), log=shlex.quote(str(log_dir.resolve()))
        )
    )
    path.chmod(0o755)
    return path


def read_records(log_dir: Path) -> list[CompileRecord]:
    """Records in order of their start."""
    records = [_read_record(path) for path in log_dir.glob("*.compile")]
    return sorted(records, key=lambda record: (record.start, record.pid))


def _read_record(path: Path) -> CompileRecord:
    head, _, source = path.read_text().partition("\n\n")
    values = dict(line.split(" ", 1) for line in head.splitlines())
    return CompileRecord(
        start=float(values["start"]),
        end=float(values["end"]),
        rank=int(values["rank"]),
        pid=int(values["pid"]),
        exit_code=int(values["exit"]),
        source=source,
    )
