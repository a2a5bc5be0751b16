"""Rehearse a server: start it on stand-in GPUs, wait until it is ready, and ask it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.kernels.nvcc import toolkit_of
from runner.recording.recording import Recording
from runner.recording.server import Server, version_of
from runner.recording.session import Session, running_group
from runner.standin.build import FAILURES, standin_environment
from runner.standin.cuda_libraries import find_cuda_libraries
from runner.standin.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What to start, and on what.

    Attributes:
        python: the interpreter that the command runs.
        nvcc: a compiler for other JITs than DeepGEMM's; None if there is none.
        version_text: what ``nvcc --version`` prints on the machine that is stood in for.
        folder: an empty folder for this run.
        home: the server's home folder, in which the caches of other JITs stay between runs.
        cache: a kernel cache that the server finds; it is not changed. None: an empty one.
    """

    command: tuple[str, ...]
    gpu: Gpu
    devices: int
    python: Path
    nvcc: Path | None
    version_text: str
    folder: Path
    home: Path
    cache: Path | None
    request_tokens: tuple[int, ...]
    ready_timeout: float
    request_timeout: float


def rehearse_once(
    rehearsal: Rehearsal,
    server: Server,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> tuple[Recording, str]:
    """Run the rehearsal.

    Returns:
        What was recorded, and the stacks of all threads if the server hung; else "".

    Raises:
        UserError: the command cannot be started, or there is no torch with CUDA 13.
    """
    records = rehearsal.folder / "records"
    records.mkdir()
    kind, version = server.kind, version_of(server.kind, rehearsal.python)
    session = Session(rehearsal.command, records, say, f"{kind.name} {version}".strip())
    if version != kind.rehearsed:
        say(f"{kind.name} {version} was never checked, {kind.rehearsed} was: see what is bypassed")
    variables = session.environment(_environment(rehearsal, environment), rehearse=True)
    stacks = ""
    with running_group(rehearsal.command, variables) as child:
        if session.wait_until_ready(server, child, rehearsal.ready_timeout):
            say(f"ready after {session.ready:.0f} s")
            session.ask(server, rehearsal.request_tokens, rehearsal.request_timeout)
        hung = child.poll() is None and (
            session.ready is None or any(request.error for request in session.requests)
        )
        if hung:
            stacks = session.stacks()
        session.note_memory()
    failures = Path(variables[FAILURES])
    if failures.is_file():
        missing = sorted(set(failures.read_text().split()))
        session.problems += [f"{name} is not stood in: it failed" for name in missing]
    recording = session.recording(gpu=rehearsal.gpu.name)
    entries = _entries_folder(rehearsal).iterdir()
    recording.made = sorted(entry.name for entry in entries if not entry.is_symlink())
    return recording, stacks


def _entries_folder(rehearsal: Rehearsal) -> Path:
    """The run's own cache; entries that were there before are links."""
    return rehearsal.folder / "cache" / "cache"


def _environment(rehearsal: Rehearsal, environment: Mapping[str, str]) -> dict[str, str]:
    """The server's variables: a stand-in GPU, and folders that are not the user's."""
    entries = _entries_folder(rehearsal)
    entries.mkdir(parents=True)
    if rehearsal.cache is not None:
        for entry in KernelCache.existing(rehearsal.cache).entries():
            (entries / entry.name).symlink_to(entry.resolve())
    rehearsal.home.mkdir(parents=True, exist_ok=True)
    _, libraries = find_cuda_libraries(rehearsal.python, environment)
    old = environment.get("LD_LIBRARY_PATH")
    folders = [str(libraries[0].parent), *([old] if old else [])]
    base = {
        **environment,
        "HOME": str(rehearsal.home),
        "XDG_CACHE_HOME": str(rehearsal.home / ".cache"),
        "HF_HUB_OFFLINE": "1",
        "LD_LIBRARY_PATH": ":".join(folders),  # Where NVRTC finds its built-in headers.
    }
    if rehearsal.nvcc is not None:
        base.setdefault("CUDA_HOME", str(toolkit_of(rehearsal.nvcc)))
    found = standin_environment(
        rehearsal.gpu,
        environment=base,
        version_text=rehearsal.version_text,
        work_dir=rehearsal.folder,
        python=rehearsal.python,
        devices=rehearsal.devices,
    )
    own = dict.fromkeys(("DG_JIT_CACHE_DIR", "SGLANG_DG_CACHE_DIR"), str(entries.parent))
    bin_folder = rehearsal.python.absolute().parent
    return {**found, **own, "PATH": f"{bin_folder}:{environment.get('PATH', '')}"}
