"""Run nvcc's stages, as ``--dryrun`` shows them, and split PTX by entry between two of them."""

from __future__ import annotations

import re
import shlex
import string
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_Argv = tuple[str, ...]


class UnusualError(Exception):
    """The fast way cannot build this: nvcc must compile the kernel alone."""


class StageError(UnusualError):
    """A stage refused its input; the text is the stage's own message."""


@dataclass(frozen=True)
class Stages:
    """Command lines of the three stages, which run in any folder.

    They turn ``kernel.cu`` into ``preprocessed``, ``kernel.ptx`` and then ``kernel.cubin``.
    """

    folder: str
    preprocess: _Argv
    front_end: _Argv
    assemble: _Argv
    preprocessed: str
    environment: Mapping[str, str]

    def run(self, stage: _Argv, folder: Path) -> None:
        """Run a stage in ``folder``."""
        here = [word.replace(self.folder, str(folder)) for word in stage]
        program = Path(here[0]).name
        try:
            done = subprocess.run(
                here, capture_output=True, text=True, cwd=folder, env=self.environment, check=False
            )
        except OSError as error:
            raise UnusualError(f"{program}: {error.strerror}") from None
        if done.returncode:
            words = (done.stderr or done.stdout).strip() or f"exit {done.returncode}"
            raise StageError(f"{program}: {words}")


def find_stages(
    nvcc: Path, flags: Sequence[str], scratch: Path, environment: Mapping[str, str]
) -> Stages:
    """Ask nvcc which programs it runs, with which arguments.

    Raises:
        UnusualError: this nvcc works differently, or the flags keep line numbers, which would
            point into the unit instead of the kernel.
    """
    if {"-lineinfo", "-G", "-g"} & set(flags):
        raise UnusualError("the flags keep line numbers")
    folder = scratch / "stages"
    folder.mkdir(parents=True)
    (folder / "kernel.cu").touch()
    try:
        to_ptx, variables = _dry_run(nvcc, flags, folder, "ptx", environment)
        to_cubin, _ = _dry_run(nvcc, flags, folder, "cubin", environment)
        preprocess = _only([argv for argv in to_ptx if "-E" in argv])
        front_end = _only([argv for argv in to_ptx if Path(argv[0]).name == "cicc"])
        assemble = _only([argv for argv in to_cubin if Path(argv[0]).name == "ptxas"])
        text = preprocess[preprocess.index("-o") + 1]
    except ValueError as error:
        raise UnusualError(f"nvcc --dryrun cannot be read: {error}") from None
    if front_end.count(text) != 1 or front_end[-2:] != ("-o", f"{folder}/kernel.ptx"):
        raise UnusualError("cicc does not read the preprocessed file, or writes elsewhere")
    ptx = next((word for word in assemble if word.endswith(".ptx")), "")
    if not ptx or assemble[-2:] != ("-o", f"{folder}/kernel.cubin"):
        raise UnusualError("ptxas does not read PTX, or writes elsewhere")
    return Stages(
        folder=str(folder),
        preprocess=preprocess,
        front_end=front_end,
        assemble=tuple(f"{folder}/kernel.ptx" if word == ptx else word for word in assemble),
        preprocessed=Path(text).name,
        environment={**environment, **variables},
    )


def _dry_run(
    nvcc: Path, flags: Sequence[str], folder: Path, kind: str, environment: Mapping[str, str]
) -> tuple[list[_Argv], dict[str, str]]:
    """Commands and variables that nvcc would use, with temporary files in ``folder``."""
    files = [f"{folder}/kernel.cu", f"-{kind}", "-o", f"{folder}/kernel.{kind}"]
    done = subprocess.run(
        [str(nvcc.absolute()), *files, *flags, "--dryrun"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**environment, "TMPDIR": str(folder)},
    )
    if done.returncode:
        raise UnusualError(f"nvcc --dryrun: {done.stderr.strip() or f'exit {done.returncode}'}")
    commands: list[_Argv] = []
    variables: dict[str, str] = {}
    for line in re.findall(r"^#\$ (.*)$", done.stderr, re.MULTILINE):
        if assigned := re.match(r"(\w+)=(.*)$", line):
            variables[assigned[1]] = assigned[2]
        else:
            commands.append(tuple(shlex.split(string.Template(line).safe_substitute(variables))))
    return commands, variables


def _only(commands: list[_Argv]) -> _Argv:
    if len(commands) != 1:
        raise UnusualError(f"nvcc has {len(commands)} commands where one was expected")
    return commands[0]


_ENTRY = re.compile(r"^(?:\.(?:visible|weak) )*\.entry ([\w$]+)\(", re.MULTILINE)
_OUTSIDE_ENTRIES = re.compile(
    r"\n\s*(?:\.(?:visible|weak|extern) )*"
    r"(?:\.(?:func|entry|alias|section|file|loc|global|const|common|callprototype)\b|call\b)"
)
_DECLARATION = re.compile(
    r"^(?:\.(?:extern|visible|weak) )?\.(?:global|shared) [^=]*? ([\w$]+)(?:\[\d*\])?;$"
)
_DIRECTIVES = ("//", ".version ", ".target ", ".address_size ")


def split_ptx(ptx: str) -> dict[str, str]:
    """One PTX module per entry: the declarations that it needs, then the entry.

    A declaration goes to the entries that name it; one that no entry names goes to all of them,
    as in the PTX of each kernel compiled alone.

    Raises:
        UnusualError: anything besides declarations and entries, such as functions or strings.
    """
    starts = list(_ENTRY.finditer(ptx))
    if not starts:
        raise UnusualError("PTX without an entry")
    bounds = [*(match.start() for match in starts), len(ptx)]
    bodies = {match[1]: ptx[a:b] for match, (a, b) in zip(starts, pairwise(bounds), strict=True)}
    for body in bodies.values():
        if _OUTSIDE_ENTRIES.search(body) or not body.rstrip().endswith("\n}"):
            raise UnusualError("PTX with unknown parts")
    if len(bodies) != len(starts):
        raise UnusualError("PTX with two entries of one name")
    head = [(line, _declared(line)) for line in ptx[: bounds[0]].splitlines()]
    names = {name for _, name in head if name}
    used = {entry: {name for name in names if _uses(body, name)} for entry, body in bodies.items()}
    used_by_any = set().union(*used.values())
    return {
        entry: "\n".join(
            line
            for line, name in head
            if not name or name in used[entry] or name not in used_by_any
        )
        + f"\n\n{body}"
        for entry, body in bodies.items()
    }


def _uses(body: str, name: str) -> bool:
    """Whether the text contains the variable's name as a whole word."""
    # Most texts lack the name altogether; a plain search finds that out a hundred times as fast.
    # PTX has megabytes, and all workers share one interpreter.
    return name in body and re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body) is not None


def _declared(line: str) -> str:
    """The variable that a line before the first entry declares; empty for a plain directive."""
    if not line.strip() or line.startswith(_DIRECTIVES):
        return ""
    match = _DECLARATION.match(line)
    if not match:
        raise UnusualError(f"PTX with {line[:60]!r} before its first entry")
    return match[1]
