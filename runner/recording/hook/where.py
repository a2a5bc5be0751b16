"""Where a call comes from: phase, rank, source lines; and which entries the JIT's cache has."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

PHASE_FILE = "phase"
"""What the recording writes once the server answers: ``ready``, ``request 1`` and so on."""

# Functions of SGLang and vLLM that are on the stack in a phase; the first that matches wins.
_PHASES = (
    ("capture", ("capture", "capture_model", "capture_one_batch_size", "capture_graph")),
    (
        "warm-up",
        (
            "compile_or_warm_up_model",
            "determine_available_memory",
            "kernel_warmup",
            "maybe_warmup",
            "_maybe_compile_deep_gemm_one_type_all",
            "warmup_kernels",
            "profile_run",
        ),
    ),
    ("load", ("load_model", "process_weights_after_loading", "load_weights")),
)
_PASSED_ON = ("deep_gemm_wrapper/entrypoint.py", "vllm/utils/deep_gemm.py", "deep_gemm/__init__.py")
_SHOWN_FRAMES = 4


class Where:
    """The phase of the server, and what the stack says about a call."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, PHASE_FILE)
        self.phase = "start"

    def poll(self) -> None:
        """Read the phase that the recording has set."""
        try:
            with open(self._path) as file:
                self.phase = file.read() or self.phase
        except FileNotFoundError:
            pass

    def now(self) -> dict[str, object]:
        """Phase, rank and the nearest source lines of the server, ``file:line:function``."""
        frames = _server_frames(sys._getframe(1))
        phase = self.phase
        if phase == "start":
            phase = _phase_of([function for *_, function in frames])
        lines = [f"{path}:{line}:{function}" for path, line, function in frames]
        return {"phase": phase, "rank": _rank(), "by": lines[:_SHOWN_FRAMES]}


def _server_frames(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """(path below site-packages, line, function) of the stack, innermost first."""
    found = []
    here = os.path.dirname(__file__)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(here) and not path.endswith(_PASSED_ON):
            short = path.rpartition("site-packages/")[2]
            found.append((short, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _phase_of(functions: list[str]) -> str:
    torch = sys.modules.get("torch")
    cuda = None if torch is None else torch.cuda
    if cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing():
        return "capture"
    for phase, names in _PHASES:
        if any(function in names for function in functions):
            return phase
    return "start"


def _rank() -> int | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank())


def entries_of(known: int) -> tuple[int, set[str] | None]:
    """Names of all cache entries, and the folder's time; None if that is still ``known``."""
    root = os.environ.get("DG_JIT_CACHE_DIR") or os.path.expanduser("~/.deep_gemm")
    folder = os.path.join(root.partition(":")[0], "cache")
    try:
        changed = os.stat(folder).st_mtime_ns
        if changed == known:
            return known, None
        return changed, set(os.listdir(folder))
    except OSError:
        return known, None
