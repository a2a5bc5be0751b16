"""A unit: several kernels of one header in one source, and which of its entries is whose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from runner.build.stages import UnusualError
from runner.kernels.kernel import Kernel

_FUNCTION = "__instantiate_kernel"
_BOOLEANS = {"true": 1, "false": 0}

Signature = tuple[str, tuple[int, ...]]
"""A template's name and its literal arguments: what finds a kernel among a unit's entries."""


@dataclass(frozen=True)
class Job:
    """One kernel to build under a key; ``source`` is its whole generated text."""

    key: str
    kernel: Kernel
    source: str


def unit_text(jobs: Sequence[Job]) -> str:
    """What follows the header's text: every kernel's instantiation, each with its own function."""
    return "".join(_instantiation(job, number) for number, job in enumerate(jobs))


def _instantiation(job: Job, number: int) -> str:
    before, include, text = job.source.partition(f"#include <{job.kernel.header}>")
    if not include or "#" in before + text or text.count(_FUNCTION) != 1:
        raise UnusualError("not a source of one include and one instantiation")
    return text.replace(_FUNCTION, f"{_FUNCTION}_{number}") + "\n"


@lru_cache(maxsize=4096)
def signature(kernel: Kernel) -> Signature:
    """The kernel's template and literal arguments."""
    words = [word.strip() for word in ",".join(kernel.arguments).split(",")]
    values = (_BOOLEANS.get(word, int(word) if word.isdigit() else None) for word in words)
    literals = tuple(value for value in values if value is not None)
    return kernel.entry.rsplit("::", 1)[-1], literals


def entry_signature(mangled: str) -> Signature:
    """The same of an entry's mangled name.

    Raises:
        UnusualError: not the name of a template's instance.
    """
    position = 3 if mangled.startswith("_ZN") else 2
    name = ""
    while match := re.match(r"(\d+)", mangled[position:]):
        start = position + len(match[1])
        position = start + int(match[1])
        name = mangled[start:position]
    if mangled[position : position + 1] != "I":
        raise UnusualError(f"entry {mangled} is no instance of a template")
    literals = re.findall(r"L[a-z](\d+)E", mangled[position:])
    return name, tuple(int(word) for word in literals)


def match_entries(jobs: Sequence[Job], entries: Sequence[str]) -> dict[str, Job]:
    """The kernel of each entry; an entry may have more arguments than were written (defaults).

    Raises:
        UnusualError: not exactly one entry for each kernel.
    """
    signatures = {entry: entry_signature(entry) for entry in entries}
    found: dict[str, Job] = {}
    for job in jobs:
        name, literals = signature(job.kernel)
        mine = [
            entry
            for entry, (its_name, its_literals) in signatures.items()
            if its_name == name and its_literals[: len(literals)] == literals
        ]
        if len(mine) != 1 or mine[0] in found:
            raise UnusualError("a unit's entries cannot be told apart")
        found[mine[0]] = job
    if len(found) != len(entries):
        raise UnusualError("a unit has entries that are not its kernels")
    return found
