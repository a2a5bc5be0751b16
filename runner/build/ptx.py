"""Cut a unit's PTX into one module per entry."""

from __future__ import annotations

import re
from itertools import pairwise

from runner.build.stages import UnusualError

_ENTRY = re.compile(r"^(?:\.(?:visible|weak) )*\.entry ([\w$]+)\(", re.MULTILINE)
_NOT_AN_ENTRYS_OWN = re.compile(
    r"\n\s*(?:\.(?:visible|weak|extern) )*"
    r"(?:\.(?:func|entry|alias|section|file|loc|global|const|common|callprototype)\b|call\b)"
)
_DECLARATION = re.compile(
    r"^(?:\.(?:extern|visible|weak) )?\.(?:global|shared) [^=]*? ([\w$]+)(?:\[\d*\])?;$"
)
_DIRECTIVES = ("//", ".version ", ".target ", ".address_size ")


def split_ptx(ptx: str) -> dict[str, str]:
    """Modules by entry: the declarations that concern it, then the entry.

    A declaration that some entries name goes with those; one that none names goes with all, as
    it is in the PTX of each kernel alone.

    Raises:
        UnusualError: anything besides declarations and entries, such as functions or strings.
    """
    starts = list(_ENTRY.finditer(ptx))
    if not starts:
        raise UnusualError("PTX without an entry")
    bounds = [*(match.start() for match in starts), len(ptx)]
    bodies = {match[1]: ptx[a:b] for match, (a, b) in zip(starts, pairwise(bounds), strict=True)}
    for body in bodies.values():
        if _NOT_AN_ENTRYS_OWN.search(body) or not body.rstrip().endswith("\n}"):
            raise UnusualError("PTX with more than entries")
    if len(bodies) != len(starts):
        raise UnusualError("PTX with two entries of one name")
    head = [(line, _declared(line)) for line in ptx[: bounds[0]].splitlines()]
    names = {name for _, name in head if name}
    used = {entry: {name for name in names if _names(body, name)} for entry, body in bodies.items()}
    by_any = set().union(*used.values())
    return {
        entry: "\n".join(
            line for line, name in head if not name or name in used[entry] or name not in by_any
        )
        + f"\n\n{body}"
        for entry, body in bodies.items()
    }


def _names(body: str, name: str) -> bool:
    """Whether the text names the variable, and not only one that begins or ends alike.

    Most texts do not have the word at all, and a plain search says so a hundred times as fast as
    the expression does: PTX is megabytes, and all workers wait for one interpreter.
    """
    return name in body and re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body) is not None


def _declared(line: str) -> str:
    """The variable that a line before the first entry declares; empty for a plain directive."""
    if not line.strip() or line.startswith(_DIRECTIVES):
        return ""
    match = _DECLARATION.match(line)
    if not match:
        raise UnusualError(f"PTX with {line[:60]!r} before its first entry")
    return match[1]
