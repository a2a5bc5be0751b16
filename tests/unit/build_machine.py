"""A build machine with a fake nvcc, and checks of what ``runner compile`` leaves on it."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import read_manifest, sha256
from runner.kernels.entry import kernels_in
from runner.kernels.rules import RULES
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import Plan, make_plan

REPOSITORY = Path(__file__).parents[2]
SPEC = "paged_mqa_logits_metadata:1:1"
GEMM = ("--gemm", SPEC, "--max-m", "128")
"""Four kernels of one header, for 32, 64, 96 and 128 rows; built in that order by one job."""

NVCC = """#!/bin/sh
here={here}
if [ "$1" = --version ]; then
    echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0
fi
for word; do
    if [ "$word" = --dryrun ]; then echo "no dry runs here" >&2; exit 1; fi
done
key=$(basename "$(dirname "$1")")
echo "$key" >>"$here/log"
if [ -e "$here/block" ] && grep -q -f "$here/block" "$1"; then
    echo "$key" >"$here/ready"
    read -r _ <"$here/go"
fi
if [ -e "$here/broken" ] && grep -q -f "$here/broken" "$1"; then
    echo "error: it is broken" >&2; exit 3
fi
cp "$here/kernel.cubin" "$4"
"""


@dataclass(frozen=True)
class BuildMachine:
    """A folder with a fake nvcc, a fake library and an empty scratch folder."""

    root: Path

    @property
    def cache(self) -> KernelCache:
        return KernelCache(self.root / "dg")

    @property
    def tmp(self) -> Path:
        return self.root / "scratch"

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "SGL", "NVCC_"))}
        return {
            **clean,
            "DG_JIT_NVCC_COMPILER": str(self.root / "nvcc" / "nvcc"),
            "DG_JIT_CACHE_DIR": str(self.cache.root),
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.tmp),
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "runner", "compile", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=REPOSITORY,
            env={**self.environment, **environment},
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=self.environment,
        )

    def compiled(self) -> list[str]:
        """Keys that nvcc was run for, in order."""
        path = self.root / "nvcc" / "log"
        return path.read_text().split() if path.exists() else []

    def tell_nvcc(self, word: str, pattern: str) -> None:
        """Make nvcc block at (``block``) or reject (``broken``) sources that match a pattern."""
        (self.root / "nvcc" / word).write_text(f"{pattern}\n")

    def wait_for_nvcc(self) -> str:
        """The key at which nvcc blocks."""
        return (self.root / "nvcc" / "ready").read_text().strip()

    def let_nvcc_go(self) -> None:
        (self.root / "nvcc" / "go").write_text("go\n")

    def leave_no_nvcc(self) -> None:
        """Unblock nvcc if it still blocks."""
        with suppress(OSError):  # nobody reads
            os.close(os.open(self.root / "nvcc" / "go", os.O_WRONLY | os.O_NONBLOCK))

    def stats(self) -> dict[str, tuple[int, int]]:
        """Inode and modification time of every file of every entry, to detect changes."""
        files = [path for entry in self.cache.entries() for path in entry.iterdir()]
        return {
            f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in files
        }


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The text of the only line on standard error that starts with ``error:``."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def output(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def summary(lines: list[str]) -> str:
    (line,) = [line for line in lines if " already there; " in line]
    return line.partition(";")[0]


def rows_of(entry: Path) -> int:
    source = (entry / "kernel.cu").read_text()
    return int(source.partition("metadata<\n")[2].partition(",")[0])


def keys_of(machine: BuildMachine, *rows: int) -> list[str]:
    """Keys of the planned kernels with these numbers of rows."""
    found = {rows_of(entry): entry.name for entry in machine.cache.entries()}
    return [found[row] for row in rows]


def assert_whole(machine: BuildMachine, count: int) -> None:
    entries = machine.cache.entries()
    assert len(entries) == count
    for entry in entries:
        assert sorted(path.name for path in entry.iterdir()) == ["kernel.cu", "kernel.cubin"]
        assert kernels_in((entry / "kernel.cubin").read_bytes()) == {"kernel": b"code"}
        assert "__instantiate_kernel" in (entry / "kernel.cu").read_text()


def assert_tidy(machine: BuildMachine) -> None:
    assert list((machine.cache.root / "tmp").iterdir()) == []
    assert list(machine.tmp.iterdir()) == []


def assert_manifest_names_all(machine: BuildMachine) -> None:
    manifest = read_manifest(machine.cache.root)
    assert manifest is not None
    assert sorted(manifest.entries) == [entry.name for entry in machine.cache.entries()]
    for key, entry in manifest.entries.items():
        folder = machine.cache.entry(key)
        assert entry.name == "sm90_paged_mqa_logits_metadata"
        assert entry.source_sha256 == sha256((folder / "kernel.cu").read_bytes())
        assert entry.cubin_sha256 == sha256((folder / "kernel.cubin").read_bytes())
        assert entry.cubin_bytes == len((folder / "kernel.cubin").read_bytes())
        rows = rows_of(folder)
        assert [use["m_ranges"] for use in entry.uses] == [[[rows - 31, rows]]]


def plan() -> Plan:
    return make_plan(gemm_demands(SPEC, max_m=128, num_sms=132), RULES)
