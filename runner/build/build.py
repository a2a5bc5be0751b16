"""Build jobs the fast way, and the plain way where the fast one meets anything unusual."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from runner.build.compiler import CompileError, NvccCompiler
from runner.build.costs import (
    PREPROCESS_SECONDS,
    assemble_seconds,
    expected_assemble_seconds,
    plain_seconds,
)
from runner.build.cubin import NotACubinError, kernels_in
from runner.build.cut import Unit, cut_units, to_end_seconds, unit_seconds
from runner.build.pool import Pool
from runner.build.ptx import split_ptx
from runner.build.stages import StageError, Stages, UnusualError, ask_stages
from runner.build.unit import Job, match_entries, unit_text
from runner.watch.shim import WATCHED

_FIRST = 1000.0
"""Preprocessing goes before everything else: all units of a header wait for it."""


class Way(Enum):
    """How a kernel was built."""

    FAST = "fast"
    PLAIN = "plain"


@dataclass(frozen=True)
class Built:
    """A job's outcome.

    Attributes:
        job: the job.
        cubin: the kernel, None where the compiler refused it.
        way: how.
        started: when work on it alone began, in seconds since the epoch.
        words: why it went the plain way or, without a cubin, the compiler's words.
    """

    job: Job
    cubin: bytes | None
    way: Way
    started: float
    words: str = ""


@dataclass(frozen=True)
class Module:
    """One kernel's part of a unit's PTX."""

    job: Job
    entry: str
    ptx: str


@dataclass
class Builder:
    """One build.

    Attributes:
        compiler: nvcc and its flags.
        scratch: an empty folder for files on the way.
        workers: processes at a time.
        environment: what the compiler's stages run in.
        on_built: told each outcome, from a worker thread; what it raises ends the build.
        fast: False builds everything the plain way.
        on_shared: told (name, start, end) of each step for several kernels, from a worker thread.
        on_step: told (expected seconds done, expected seconds in all), from worker threads.
    """

    compiler: NvccCompiler
    scratch: Path
    workers: int
    environment: Mapping[str, str]
    on_built: Callable[[Built], None]
    fast: bool = True
    on_step: Callable[[float, float], None] = lambda done, total: None
    on_shared: Callable[[str, float, float], None] = lambda name, start, end: None
    _pool: Pool = field(init=False, repr=False)

    def build(self, jobs: Sequence[Job]) -> None:
        """Build every job once; each outcome goes to ``on_built``."""
        if not jobs:
            return
        self._pool = Pool(self.workers, self.on_step)
        stages, why_not = self._stages()
        if stages is None:
            self._queue_all_plain(jobs, why_not)
        else:
            alone = [job for job in jobs if not job.kernel.entry]
            self._queue_all_plain(alone, "a source of a form of its own")
            alike = [job for job in jobs if job.kernel.entry]
            self._queue_headers(stages, cut_units(alike, self.workers) if alike else [])
        self._pool.drain()

    def _stages(self) -> tuple[Stages | None, str]:
        if not self.fast:
            return None, "as asked"
        if WATCHED in self.environment:
            return None, "runner watch sees each kernel's own compile only"
        flags = self.compiler.arguments
        try:
            return ask_stages(self.compiler.nvcc, flags, self.scratch, self.environment), ""
        except UnusualError as error:
            return None, str(error)

    def _queue_headers(self, stages: Stages, units: list[Unit]) -> None:
        by_header: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            by_header[unit[0].kernel.header].append(unit)
        for number, same in enumerate(by_header.values()):
            self._queue_header(stages, same, self.scratch / f"header{number}")

    def _queue_header(self, stages: Stages, units: list[Unit], folder: Path) -> None:
        for unit in units:
            self._pool.expect(unit_seconds(unit))
            self._pool.expect(sum(expected_assemble_seconds(job.kernel) for job in unit))
        self._pool.expect(PREPROCESS_SECONDS)
        self._pool.add(
            _FIRST + PREPROCESS_SECONDS + max(map(to_end_seconds, units)),
            lambda: self._preprocess(stages, units, folder),
            own=PREPROCESS_SECONDS,
        )

    def _preprocess(self, stages: Stages, units: list[Unit], folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.cu").write_text(f"\n#include <{units[0][0].kernel.header}>\n")
        started = time.time()
        try:
            stages.run(stages.preprocess, folder)
            self.on_shared(f"preprocess {units[0][0].kernel.header}", started, time.time())
        except UnusualError as error:
            for unit in units:
                self._queue_all_plain(unit, str(error))
            return
        text = (folder / stages.preprocessed).read_bytes()
        for number, unit in enumerate(units):
            self._queue_unit(stages, unit, text, folder / f"unit{number}")

    def _queue_unit(self, stages: Stages, unit: Unit, header: bytes, folder: Path) -> None:
        self._pool.add(
            to_end_seconds(unit),
            lambda: self._unit(stages, unit, header, folder),
            own=unit_seconds(unit),
        )

    def _unit(self, stages: Stages, unit: Unit, header: bytes, folder: Path) -> None:
        """Front end of a unit; its kernels' assemblers are queued at once."""
        folder.mkdir()
        started = time.time()
        text = folder / stages.preprocessed
        try:
            text.write_bytes(header + unit_text(unit).encode())
            stages.run(stages.front_end, folder)
            self.on_shared(f"front end of {len(unit)} kernels", started, time.time())
            modules = split_ptx((folder / "kernel.ptx").read_text())
            entries = match_entries(unit, list(modules))
        except StageError as error:
            self._queue_halves(stages, unit, header, folder, str(error))
            return
        except UnusualError as error:
            self._queue_all_plain(unit, str(error))
            return
        finally:
            text.unlink(missing_ok=True)
        for number, (entry, job) in enumerate(entries.items()):
            module = Module(job, entry, modules[entry])
            self._queue_assemble(stages, module, folder / f"kernel{number}")

    def _queue_halves(
        self, stages: Stages, unit: Unit, header: bytes, folder: Path, reason: str
    ) -> None:
        """One wrong kernel fails its whole unit: halve it down to that kernel."""
        if len(unit) == 1:
            self._queue_plain(unit[0], reason)
            return
        for number, part in enumerate((unit[::2], unit[1::2])):
            self._queue_unit(stages, part, header, folder / f"part{number}")

    def _queue_assemble(self, stages: Stages, module: Module, folder: Path) -> None:
        self._pool.add(
            assemble_seconds(len(module.ptx)),
            lambda: self._assemble(stages, module, folder),
            own=expected_assemble_seconds(module.job.kernel),
        )

    def _assemble(self, stages: Stages, module: Module, folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.ptx").write_text(module.ptx)
        started = time.time()
        try:
            stages.run(stages.assemble, folder)
            cubin = (folder / "kernel.cubin").read_bytes()
            if list(kernels_in(cubin)) != [module.entry]:
                raise UnusualError("a cubin of other kernels than its own")
        except (UnusualError, NotACubinError) as error:
            self._queue_plain(module.job, str(error))
            return
        for name in ("kernel.ptx", "kernel.cubin"):
            (folder / name).unlink()
        self.on_built(Built(module.job, cubin, Way.FAST, started))

    def _queue_all_plain(self, jobs: Sequence[Job], reason: str) -> None:
        for job in jobs:
            self._queue_plain(job, reason)

    def _queue_plain(self, job: Job, reason: str) -> None:
        seconds = plain_seconds(job.kernel)
        self._pool.expect(seconds)
        self._pool.add(seconds, lambda: self._plain(job, reason), own=seconds)

    def _plain(self, job: Job, reason: str) -> None:
        folder = self.scratch / "plain" / job.key
        folder.mkdir(parents=True)
        source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
        source.write_text(job.source)
        started = time.time()
        try:
            self.compiler.compile(source, cubin, folder)
            made = cubin.read_bytes()
        except CompileError as error:
            self.on_built(Built(job, None, Way.PLAIN, started, str(error)))
        except FileNotFoundError:
            self.on_built(Built(job, None, Way.PLAIN, started, "nvcc wrote no cubin"))
        else:
            self.on_built(Built(job, made, Way.PLAIN, started, reason))
