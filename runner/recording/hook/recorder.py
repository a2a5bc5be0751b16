"""Note each distinct call of a DeepGEMM library, from all threads of one process.

A process appends to one file of its own, a line of JSON per event and one ``write`` per line, so
that what was noted survives the process. Calls that look alike are counted, not noted again.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .describe import describe, has_tensor, key_of
from .where import Where, entries_of

_POLL_SECONDS = 0.25
_MARK = "_deepgemm_coldstart_recorded"


class _Call:
    """A distinct call: how often it was made, and how many of these are on file."""

    __slots__ = ("count", "number", "written")

    def __init__(self, number: int) -> None:
        self.number, self.count, self.written = number, 1, 1


class Recorder:
    """Wraps a library's functions, and notes what is called."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        """Start a file for this process, whether it was started or forked."""
        name = f"{os.getpid()}-{time.time_ns():x}.jsonl"
        self._path = os.path.join(self._folder, name)
        self._file = -1
        self._calls: dict[object, _Call] = {}
        self._noted = 0
        self._counts: dict[str, int] = {}
        self._counted = 0
        self._where = Where(self._folder)
        self._entries: set[str] = set()
        self._entries_time = 0
        self._num_sms: int | None = None
        self._next_poll = 0.0
        self.on = True

    # -- writing

    def note(self, event: str, **fields: object) -> None:
        """Append an event; the file is opened with the first one."""
        if self._file < 0:
            self._file = os.open(
                self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            self.note("process", pid=os.getpid(), parent=os.getppid(), argv=sys.argv)
        line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
        os.write(self._file, line.encode())

    def count(self, kind: str, name: str) -> None:
        """Count something by name: it is noted when it is new, and its number at the next poll."""
        if self.on:
            self.safely(lambda: self._count(kind, name))

    def _count(self, kind: str, name: str) -> None:
        key = f"{kind} {name}"
        new = key not in self._counts
        self._counts[key] = self._counts.get(key, 0) + 1
        if new:
            self.note(kind, name=name, count=1)
        self._poll_if_due()

    def flush(self) -> None:
        """Write how often each call was made, where that has changed."""
        calls = list(self._calls.values())
        changed = [(call, call.count) for call in calls if call.count != call.written]
        total = sum(self._counts.values())
        if changed:
            self.note("calls", counts=[[call.number, count] for call, count in changed])
        if total != self._counted:
            self._counted = total
            self.note("counts", counts=dict(self._counts))
        for call, count in changed:
            call.written = count

    def stop(self, error: BaseException) -> None:
        """Give up recording in this process, and say so once."""
        if self.on:
            self.on = False
            print(f"[runner record] recording stops in {os.getpid()}: {error!r}", file=sys.stderr)
            with suppress(Exception):
                self.note("stopped", error=repr(error)[:500])

    def safely(self, action: Callable[[], None]) -> None:
        """Do something that must not fail the server: recording stops instead."""
        try:
            action()
        except Exception as error:
            self.stop(error)

    def _poll_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + _POLL_SECONDS
            self._where.poll()
            self.flush()

    # -- the library's functions

    def wrap_library(self, module: Any) -> None:
        """Wrap every public function of a library's module."""
        version = getattr(module, "__version__", None)
        self.note("library", module=module.__name__, file=module.__file__, version=version)
        for part in (module, *_parts(module)):
            for name, function in list(vars(part).items()):
                public = not name.startswith("_") and not isinstance(function, type)
                if public and callable(function) and not hasattr(function, _MARK):
                    setattr(part, name, self._wrap(name, function))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        inside = self._inside

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if not self.on or getattr(inside, "call", False):
                return function(*args, **kwargs)
            inside.call = True
            try:
                try:
                    seen = self._seen(name, args, kwargs)
                except Exception as error:
                    self.stop(error)
                    seen = True
                if seen:
                    return function(*args, **kwargs)
                return self._first(name, function, args, kwargs)
            finally:
                inside.call = False

        setattr(recorded, _MARK, True)
        return recorded

    def _key(self, name: str, args: Any, kwargs: Any) -> object:
        where = self._where.phase
        return name, where, self._num_sms, key_of(args), tuple(kwargs), key_of([*kwargs.values()])

    def _seen(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether this call was noted before, or is none to note."""
        if name == "set_num_sms":
            self._num_sms = int(args[0])
            return True
        self._poll_if_due()
        call = self._calls.get(self._key(name, args, kwargs))
        if call is not None:
            call.count += 1
        return call is not None or not has_tensor([*args, *kwargs.values()])

    def _first(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call for the first time, and note it with the cache entries that it made."""
        error = None
        started, clock = time.time(), time.perf_counter()
        self.safely(self._look_for_entries)
        try:
            return function(*args, **kwargs)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"[:300]
            raise
        finally:
            seconds = time.perf_counter() - clock
            self.safely(lambda: self._note_call(name, args, kwargs, started, seconds, error))

    def _note_call(
        self, name: str, args: Any, kwargs: Any, started: float, seconds: float, error: str | None
    ) -> None:
        with self._lock:
            number = self._noted  # Threads may have made the same first call: both are noted.
            self._noted += 1
            self._calls[self._key(name, args, kwargs)] = _Call(number)
        self.note(
            "call",
            number=number,
            function=name,
            args=describe(args),
            kwargs={key: describe(value) for key, value in kwargs.items()},
            num_sms=self._num_sms,
            started=started,
            seconds=round(seconds, 6),
            entries=self._new_entries(),
            error=error,
            **self._where.now(),
        )

    def _look_for_entries(self) -> None:
        """Know the entries there are, so that those a call makes stand out."""
        self._new_entries()

    def _new_entries(self) -> list[str]:
        """Names of the cache entries that have appeared since the last look."""
        changed, names = entries_of(self._entries_time)
        if names is None:
            return []
        self._entries_time, new = changed, sorted(names - self._entries)
        self._entries |= names
        return new


def _parts(module: Any) -> list[Any]:
    """Submodules of a library that servers call functions of."""
    found = [getattr(module, "utils", None)]
    found.append(getattr(found[0], "layout", None))
    return [part for part in found if part is not None]
