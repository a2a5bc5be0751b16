"""Units: several kernels of one header in one source, and how to tell their entries apart."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

from runner.build.estimates import front_end_seconds, makespan
from runner.build.stages import UnusualError
from runner.kernels.kernel import Kernel

Unit = list[Kernel]
Signature = tuple[str, tuple[int, ...]]
"""A template's name and its literal arguments, which match a unit's entries to its kernels."""

_BUDGETS = [0.25 * 1.5**step for step in range(-2, 12)]
_FUNCTION = "__instantiate_kernel"
_BOOLEANS = {"true": 1, "false": 0}


def split_into_units(kernels: Sequence[Kernel], workers: int) -> list[Unit]:
    """Split kernels into units of one header each, sized for the smallest expected makespan."""
    by_header: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_header[kernel.header].append(kernel)
    choices = []
    for budget in _BUDGETS:
        units = [unit for same in by_header.values() for unit in _units_of(same, budget)]
        choices.append((makespan(units, workers), len(units), units))
    return min(choices, key=lambda choice: choice[:2])[2]


def _units_of(kernels: Sequence[Kernel], budget: float) -> list[Unit]:
    """Split kernels of one header evenly into units of about ``budget`` seconds.

    Kernels with the same signature never share a unit: their entries could not be told apart.
    """
    same_signature = Counter(map(signature, kernels))
    total = sum(map(front_end_seconds, kernels))
    count = max(1, min(len(kernels), ceil(total / budget)), *same_signature.values())
    units: list[Unit] = [[] for _ in range(count)]
    taken: list[set[Signature]] = [set() for _ in units]
    lightest = [(0.0, index) for index in range(count)]
    for kernel in sorted(kernels, key=lambda kernel: -front_end_seconds(kernel)):
        full = []
        while signature(kernel) in taken[lightest[0][1]]:
            full.append(heapq.heappop(lightest))
        load, index = lightest[0]
        units[index].append(kernel)
        taken[index].add(signature(kernel))
        heapq.heapreplace(lightest, (load + front_end_seconds(kernel), index))
        for item in full:
            heapq.heappush(lightest, item)
    return [unit for unit in units if unit]


def unit_text(unit: Sequence[Kernel]) -> str:
    """The instantiations of a unit's kernels, to append to the header's text.

    Raises:
        UnusualError: a source is not one include and one instantiation.
    """
    texts = []
    for number, kernel in enumerate(unit):
        before, include, text = kernel.body.partition(f"#include <{kernel.header}>")
        if not include or "#" in before + text or text.count(_FUNCTION) != 1:
            raise UnusualError("not a source of one include and one instantiation")
        texts.append(text.replace(_FUNCTION, f"{_FUNCTION}_{number}") + "\n")
    return "".join(texts)


def match_entries(unit: Sequence[Kernel], entries: Sequence[str]) -> dict[str, Kernel]:
    """Find each entry's kernel; an entry may have more arguments than its source (defaults).

    Raises:
        UnusualError: a kernel does not have exactly one entry.
    """
    signatures = {entry: entry_signature(entry) for entry in entries}
    found: dict[str, Kernel] = {}
    for kernel in unit:
        name, literals = signature(kernel)
        own = [
            entry
            for entry, (its_name, its_literals) in signatures.items()
            if its_name == name and its_literals[: len(literals)] == literals
        ]
        if len(own) != 1 or own[0] in found:
            raise UnusualError("a unit's entries cannot be told apart")
        found[own[0]] = kernel
    if len(found) != len(entries):
        raise UnusualError("a unit has entries of other kernels")
    return found


@lru_cache(maxsize=4096)
def signature(kernel: Kernel) -> Signature:
    """The kernel's template and literal arguments."""
    words = [word.strip() for word in ",".join(kernel.arguments).split(",")]
    values = (_BOOLEANS.get(word, int(word) if word.isdigit() else None) for word in words)
    literals = tuple(value for value in values if value is not None)
    return kernel.entry.rsplit("::", 1)[-1], literals


def entry_signature(mangled: str) -> Signature:
    """The template and literal arguments in an entry's mangled name.

    Raises:
        UnusualError: the name is not a template instance's.
    """
    position = 3 if mangled.startswith("_ZN") else 2
    name = ""
    while match := re.match(r"(\d+)", mangled[position:]):
        start = position + len(match[1])
        position = start + int(match[1])
        name = mangled[start:position]
    if mangled[position : position + 1] != "I":
        raise UnusualError(f"entry {mangled} is not an instance of a template")
    literals = re.findall(r"L[a-z](\d+)E", mangled[position:])
    return name, tuple(int(word) for word in literals)
