"""Python runs this at its start, because the recording put this folder on PYTHONPATH."""

import importlib.machinery
import importlib.util
import os
import sys

NAME = "deepgemm_coldstart_hook"


def _load(name: str, path: str, folder: list[str] | None = None) -> None:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _start_hook(here: str) -> None:
    package = os.path.dirname(here)
    _load(NAME, os.path.join(package, "__init__.py"), [package])
    importlib.import_module(f"{NAME}.start").start()


def _run_next(here: str) -> None:
    """Run the sitecustomize that this one hides."""
    others = [path for path in sys.path if os.path.realpath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.origin is not None:
        _load("sitecustomize", spec.origin)


_here = os.path.dirname(os.path.realpath(__file__))
if os.environ.get("DEEPGEMM_RECORD"):
    try:
        _start_hook(_here)
    except Exception as error:
        print(f"[runner record] recording is off in {os.getpid()}: {error!r}", file=sys.stderr)
_run_next(_here)
