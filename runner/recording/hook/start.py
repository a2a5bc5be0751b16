"""Start the hook in a process of the server."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal

from .imports import AfterImport, after_import
from .recorder import Recorder

LIBRARIES = ("deep_gemm", "sgl_deep_gemm", "vllm.third_party.deep_gemm")


def start() -> None:
    """Record from now on; in a rehearsal, also replace what a stand-in GPU cannot run."""
    folder = os.environ["DEEPGEMM_RECORD"]
    recorder = Recorder(folder)
    after: dict[str, AfterImport] = dict.fromkeys(
        LIBRARIES, lambda module: recorder.safely(lambda: recorder.wrap_library(module))
    )
    if os.environ.get("DEEPGEMM_REHEARSE"):
        from .bypass import bypasses
        from .fallbacks import note_fallbacks

        after.update(bypasses(recorder))
        note_fallbacks(recorder)
        _print_stacks_when_asked(folder)
    after_import(after)
    atexit.register(lambda: recorder.safely(recorder.flush))


def _print_stacks_when_asked(folder: str) -> None:
    """On SIGUSR2, write all threads' stacks: the rehearsal asks a process that hangs."""
    stacks = open(os.path.join(folder, f"{os.getpid()}.stacks"), "w")  # noqa: SIM115  # stays open
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
