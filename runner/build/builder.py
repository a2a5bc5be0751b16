"""Build many kernels the fast way, and one by one with nvcc where the fast way cannot.

Kernels of one header share its preprocessing and, as units, the front end; each then has an
assembler of its own.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from runner.build.compiler import CompileError, NvccCompiler
from runner.build.estimates import assemble_seconds, plain_seconds, seconds_to_end
from runner.build.stages import StageError, Stages, UnusualError, find_stages, split_ptx
from runner.build.task_pool import TaskPool
from runner.build.units import Unit, match_entries, split_into_units, unit_text
from runner.files import take_lock
from runner.kernels.entry import NotACubinError, kernels_in
from runner.kernels.kernel import Kernel
from runner.watch.shim import WATCHED

_FIRST = 1000.0
"""Preprocessing goes before everything else: all units of a header wait for it."""


@dataclass(frozen=True)
class Job:
    """One kernel to build under a key; ``source`` is its whole generated text."""

    key: str
    kernel: Kernel
    source: str


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a job.

    Attributes:
        cubin: None if the compiler refused the kernel, and said ``error``.
        started: when work on it alone began, in seconds since the epoch.
        fallback: why nvcc compiled it alone; empty if it was built the fast way.
    """

    job: Job
    cubin: bytes | None
    started: float
    fallback: str = ""
    error: str = ""


@dataclass
class KernelBuilder:
    """Builds jobs with up to ``workers`` compiler processes at a time.

    Attributes:
        scratch: an empty folder.
        on_result: called from worker threads; what it raises ends the build.
        fast: False compiles every kernel alone.
        on_shared: called with (name, start, end) of each step for several kernels, from worker
            threads.
    """

    compiler: NvccCompiler
    scratch: Path
    workers: int
    environment: Mapping[str, str]
    on_result: Callable[[BuildResult], None]
    fast: bool = True
    on_shared: Callable[[str, float, float], None] = lambda name, start, end: None
    _pool: TaskPool = field(init=False, repr=False)
    _jobs: Mapping[Kernel, Job] = field(init=False, repr=False)

    def build(self, jobs: Sequence[Job]) -> None:
        """Build every job once."""
        if not jobs:
            return
        self._pool = TaskPool(self.workers)
        self._jobs = {job.kernel: job for job in jobs}
        compiler, environment = self.compiler, self.environment
        try:
            if not self.fast:
                raise UnusualError("as asked")
            if WATCHED in environment:
                raise UnusualError("runner watch sees each kernel's own compile only")
            stages = find_stages(compiler.nvcc, compiler.arguments, self.scratch, environment)
        except UnusualError as error:
            self._add_plain(self._jobs, str(error))
        else:
            kernels = [kernel for kernel in self._jobs if kernel.entry]
            alone = [kernel for kernel in self._jobs if not kernel.entry]
            self._add_plain(alone, "a source of a form of its own")
            by_header: dict[str, list[Unit]] = defaultdict(list)
            for unit in split_into_units(kernels, self.workers):
                by_header[unit[0].header].append(unit)
            for number, (header, same) in enumerate(by_header.items()):
                folder = self.scratch / f"header{number}"
                task = partial(self._preprocess, stages, header, same, folder)
                self._pool.add(_FIRST + max(map(seconds_to_end, same)), task)
        self._pool.run()

    def _preprocess(self, stages: Stages, header: str, units: Sequence[Unit], folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.cu").write_text(f"\n#include <{header}>\n")
        started = time.time()
        try:
            stages.run(stages.preprocess, folder)
        except UnusualError as error:
            self._add_plain((kernel for unit in units for kernel in unit), str(error))
            return
        self.on_shared(f"preprocess {header}", started, time.time())
        text = (folder / stages.preprocessed).read_bytes()
        for number, unit in enumerate(units):
            self._add_unit(stages, unit, text, folder / f"unit{number}")

    def _add_unit(self, stages: Stages, unit: Unit, header: bytes, folder: Path) -> None:
        task = partial(self._compile_unit, stages, unit, header, folder)
        self._pool.add(seconds_to_end(unit), task)

    def _compile_unit(self, stages: Stages, unit: Unit, header: bytes, folder: Path) -> None:
        """The front end of a unit; its kernels' assemblers are queued at once."""
        folder.mkdir()
        started = time.time()
        text = folder / stages.preprocessed
        try:
            text.write_bytes(header + unit_text(unit).encode())
            stages.run(stages.front_end, folder)
            self.on_shared(f"front end of {len(unit)} kernels", started, time.time())
            modules = split_ptx((folder / "kernel.ptx").read_text())
            entries = match_entries(unit, list(modules))
        except UnusualError as error:
            if isinstance(error, StageError) and len(unit) > 1:
                # One wrong kernel fails its whole unit: halve it down to that kernel.
                for number, half in enumerate((unit[::2], unit[1::2])):
                    self._add_unit(stages, half, header, folder / f"part{number}")
            else:
                self._add_plain(unit, str(error))
            return
        finally:
            text.unlink(missing_ok=True)
        for number, (entry, kernel) in enumerate(entries.items()):
            ptx, place = modules[entry], folder / f"kernel{number}"
            task = partial(self._assemble, stages, kernel, entry, ptx, place)
            self._pool.add(assemble_seconds(len(ptx)), task)

    def _assemble(self, stages: Stages, kernel: Kernel, entry: str, ptx: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.ptx").write_text(ptx)
        started = time.time()
        try:
            stages.run(stages.assemble, folder)
            cubin = (folder / "kernel.cubin").read_bytes()
            if list(kernels_in(cubin)) != [entry]:
                raise UnusualError("a cubin of other kernels than its own")
        except (UnusualError, NotACubinError) as error:
            self._add_plain([kernel], str(error))
            return
        shutil.rmtree(folder)
        self.on_result(BuildResult(self._jobs[kernel], cubin, started))

    def _add_plain(self, kernels: Iterable[Kernel], reason: str) -> None:
        for kernel in kernels:
            task = partial(self._compile_alone, self._jobs[kernel], reason)
            self._pool.add(plain_seconds(kernel), task)

    def _compile_alone(self, job: Job, reason: str) -> None:
        folder = self.scratch / "plain" / job.key
        folder.mkdir(parents=True)
        started = time.time()
        try:
            result = BuildResult(job, self.compiler.compile(job.source, folder), started, reason)
        except CompileError as error:
            result = BuildResult(job, None, started, reason, str(error))
        self.on_result(result)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder in the system's temporary directory, gone after the block.

    Folders of builds that were killed are removed first.
    """
    for abandoned in Path(tempfile.gettempdir()).glob("deepgemm-build-*"):
        with suppress(OSError), (abandoned / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned, ignore_errors=True)
    # It takes the name by which abandoned ones are found only once it is locked.
    new = Path(tempfile.mkdtemp(prefix="deepgemm-new-")).resolve()
    folder = new.with_name(new.name.replace("-new-", "-build-"))
    with (new / ".lock").open("w") as lock:
        take_lock(lock, new.parent)
        new.rename(folder)
        try:
            (folder / "work").mkdir()
            yield folder / "work"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
