"""Run a function right after a module has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

AfterImport = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """A module's own loader, and a function to run afterwards."""

    def __init__(self, inner: importlib.abc.Loader, after: AfterImport) -> None:
        self._inner, self._after = inner, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What the module says about itself names its own loader.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._after(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds the functions to what the other finders find."""

    def __init__(self, after: Mapping[str, AfterImport]) -> None:
        self._after = after
        self._asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        after = self._after.get(name)
        if after is None or getattr(self._asking, "name", None) == name:
            return None
        self._asking.name = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, after)
        return spec


def after_import(after: Mapping[str, AfterImport]) -> None:
    """Run each function after its module's import; at once for modules already imported."""
    sys.meta_path.insert(0, _Finder(after))
    for name, function in after.items():
        if name in sys.modules:
            function(sys.modules[name])
