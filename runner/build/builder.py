"""Build many kernels the fast way, and with nvcc one by one where the fast way fails.

Kernels of one header share its preprocessing, and kernels of one unit share the front end; the
assembler then runs once per kernel.
"""

from __future__ import annotations

import fcntl
import itertools
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import PriorityQueue

from runner.build.compiler import CompileError, NvccCompiler
from runner.build.estimates import assemble_seconds, plain_seconds, seconds_to_end
from runner.build.stages import StageError, Stages, UnusualError, find_stages, split_ptx
from runner.build.units import Unit, match_entries, split_into_units, unit_text
from runner.files import take_lock
from runner.kernels.entry import NotACubinError, kernels_in
from runner.kernels.kernel import Kernel
from runner.watch.shim import WATCHED

_FIRST = 1000.0
"""Priority of preprocessing: it goes first, since all units of a header wait for it."""


@dataclass(frozen=True)
class Job:
    """One kernel to build under a key; ``source`` is the whole generated text."""

    key: str
    kernel: Kernel
    source: str


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a job.

    Attributes:
        cubin: None if the compiler refused the kernel with the message ``error``.
        started: when work on this kernel alone began, in seconds since the epoch.
        fallback: why nvcc compiled the kernel alone; empty if it was built the fast way.
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
        on_result: called from worker threads; an exception in it ends the build.
        fast: False compiles every kernel alone.
        on_shared: called from worker threads with (name, start, end) of each step that serves
            several kernels.
    """

    compiler: NvccCompiler
    workers: int
    environment: Mapping[str, str]
    on_result: Callable[[BuildResult], None]
    fast: bool = True
    on_shared: Callable[[str, float, float], None] = lambda name, start, end: None
    _pool: TaskPool = field(init=False, repr=False)
    _jobs: Mapping[Kernel, Job] = field(init=False, repr=False)
    _scratch: Path = field(init=False, repr=False)
    _stages: Stages = field(init=False, repr=False)

    def build(self, jobs: Sequence[Job]) -> None:
        """Build every job once."""
        if not jobs:
            return
        self._pool = TaskPool(self.workers)
        self._jobs = {job.kernel: job for job in jobs}
        with scratch_folder() as self._scratch:
            self._add_all()
            self._pool.run()

    def _add_all(self) -> None:
        compiler, environment = self.compiler, self.environment
        try:
            if not self.fast:
                raise UnusualError("as asked")
            if WATCHED in environment:
                raise UnusualError("runner watch sees only compiles of single kernels")
            arguments = compiler.arguments
            self._stages = find_stages(compiler.nvcc, arguments, self._scratch, environment)
        except UnusualError as error:
            self._add_plain(self._jobs, str(error))
            return
        kernels = [kernel for kernel in self._jobs if kernel.entry]
        alone = [kernel for kernel in self._jobs if not kernel.entry]
        self._add_plain(alone, "a source of an unusual form")
        by_header: dict[str, list[Unit]] = defaultdict(list)
        for unit in split_into_units(kernels, self.workers):
            by_header[unit[0].header].append(unit)
        for number, (header, same) in enumerate(by_header.items()):
            task = partial(self._preprocess, header, same, self._scratch / f"header{number}")
            self._pool.add(_FIRST + max(map(seconds_to_end, same)), task)

    def _preprocess(self, header: str, units: Sequence[Unit], folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.cu").write_text(f"\n#include <{header}>\n")
        started = time.time()
        try:
            self._stages.run(self._stages.preprocess, folder)
        except UnusualError as error:
            self._add_plain((kernel for unit in units for kernel in unit), str(error))
            return
        self.on_shared(f"preprocess {header}", started, time.time())
        text = (folder / self._stages.preprocessed).read_bytes()
        for number, unit in enumerate(units):
            self._add_unit(unit, text, folder / f"unit{number}")

    def _add_unit(self, unit: Unit, header: bytes, folder: Path) -> None:
        task = partial(self._compile_unit, unit, header, folder)
        self._pool.add(seconds_to_end(unit), task)

    def _compile_unit(self, unit: Unit, header: bytes, folder: Path) -> None:
        """Run a unit's front end, and queue its kernels' assemblers."""
        folder.mkdir()
        started = time.time()
        text = folder / self._stages.preprocessed
        try:
            text.write_bytes(header + unit_text(unit).encode())
            self._stages.run(self._stages.front_end, folder)
            self.on_shared(f"front end of {len(unit)} kernels", started, time.time())
            modules = split_ptx((folder / "kernel.ptx").read_text())
            entries = match_entries(unit, list(modules))
        except UnusualError as error:
            if isinstance(error, StageError) and len(unit) > 1:
                # One bad kernel fails its whole unit: halve the unit to isolate it.
                for number, half in enumerate((unit[::2], unit[1::2])):
                    self._add_unit(half, header, folder / f"part{number}")
            else:
                self._add_plain(unit, str(error))
            return
        finally:
            text.unlink(missing_ok=True)
        for number, (entry, kernel) in enumerate(entries.items()):
            ptx, place = modules[entry], folder / f"kernel{number}"
            task = partial(self._assemble, kernel, entry, ptx, place)
            self._pool.add(assemble_seconds(len(ptx)), task)

    def _assemble(self, kernel: Kernel, entry: str, ptx: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.ptx").write_text(ptx)
        started = time.time()
        try:
            self._stages.run(self._stages.assemble, folder)
            cubin = (folder / "kernel.cubin").read_bytes()
            if list(kernels_in(cubin)) != [entry]:
                raise UnusualError("the cubin does not hold exactly this kernel")
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
        folder = self._scratch / "plain" / job.key
        folder.mkdir(parents=True)
        started = time.time()
        try:
            result = BuildResult(job, self.compiler.compile(job.source, folder), started, reason)
        except CompileError as error:
            result = BuildResult(job, None, started, reason, str(error))
        self.on_result(result)


class TaskPool:
    """Runs tasks on threads, the one on the longest path first; tasks may add tasks."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._tasks: PriorityQueue[tuple[float, int, Callable[[], None] | None]] = PriorityQueue()
        self._order = itertools.count()
        self._error: BaseException | None = None

    def add(self, seconds_to_end: float, task: Callable[[], None]) -> None:
        """Queue a task; the task and everything that depends on it take ``seconds_to_end``."""
        self._tasks.put((-seconds_to_end, next(self._order), task))

    def run(self) -> None:
        """Run until every task is done.

        Raises:
            BaseException: the first that a task raised; tasks not yet started are dropped.
        """
        for _ in range(self._workers):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            self._tasks.join()
        except BaseException as error:  # An interrupt: running tasks are abandoned.
            self._error = error
            raise
        finally:
            for _ in range(self._workers):
                self._tasks.put((float("inf"), next(self._order), None))
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._tasks.get()[2]) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:  # run() raises it
                self._error = self._error or error
            finally:
                self._tasks.task_done()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder in the system's temporary directory, removed after the block.

    Folders that killed builds left behind are removed first.
    """
    for abandoned in Path(tempfile.gettempdir()).glob("deepgemm-build-*"):
        with suppress(OSError), (abandoned / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned, ignore_errors=True)
    # It gets the name that marks folders as removable only once it is locked.
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
