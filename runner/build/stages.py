"""nvcc's own stages: which programs it runs, with which arguments, as ``--dryrun`` tells."""

from __future__ import annotations

import re
import shlex
import string
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_Argv = tuple[str, ...]


class UnusualError(Exception):
    """Something that the fast way does not know: the kernel goes the plain way."""


class StageError(UnusualError):
    """A stage refused its input; the text holds its words."""


@dataclass(frozen=True)
class Stages:
    """Arguments of the three stages, made for one folder; another takes its place when they run.

    Attributes:
        folder: the folder that stands in the arguments.
        preprocess: ``kernel.cu`` to preprocessed text.
        front_end: preprocessed text to ``kernel.ptx``.
        assemble: ``kernel.ptx`` to ``kernel.cubin``.
        preprocessed: file name of the preprocessed text.
        environment: variables that the stages need.
    """

    folder: str
    preprocess: _Argv
    front_end: _Argv
    assemble: _Argv
    preprocessed: str
    environment: Mapping[str, str]

    def run(self, stage: _Argv, folder: Path) -> None:
        """Run a stage in ``folder``.

        Raises:
            StageError: it failed.
            UnusualError: it cannot be run.
        """
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


def ask_stages(
    nvcc: Path, flags: Sequence[str], scratch: Path, environment: Mapping[str, str]
) -> Stages:
    """Ask nvcc for its stages.

    Raises:
        UnusualError: this nvcc works in another way, or the flags keep line numbers, which would
            name the unit instead of the kernel.
    """
    if {"-lineinfo", "-G", "-g"} & set(flags):
        raise UnusualError("the flags keep line numbers")
    try:
        return _ask(nvcc.absolute(), flags, scratch, environment)
    except ValueError as error:
        raise UnusualError(f"nvcc --dryrun cannot be read: {error}") from None


def _ask(nvcc: Path, flags: Sequence[str], scratch: Path, environment: Mapping[str, str]) -> Stages:
    folder = scratch / "stages"
    folder.mkdir(parents=True)
    (folder / "kernel.cu").touch()
    to_ptx, variables = _dry_run(nvcc, flags, folder, "ptx", environment)
    to_cubin, _ = _dry_run(nvcc, flags, folder, "cubin", environment)
    preprocess = _only(to_ptx, lambda argv: "-E" in argv)
    front_end = _only(to_ptx, lambda argv: Path(argv[0]).name == "cicc")
    assemble = _only(to_cubin, lambda argv: Path(argv[0]).name == "ptxas")
    text = preprocess[preprocess.index("-o") + 1]
    if front_end.count(text) != 1 or front_end[-2:] != ("-o", f"{folder}/kernel.ptx"):
        raise UnusualError("cicc does not read what was preprocessed, or writes elsewhere")
    between = next((word for word in assemble if word.endswith(".ptx")), "")
    if not between or assemble[-2:] != ("-o", f"{folder}/kernel.cubin"):
        raise UnusualError("ptxas does not read PTX, or writes elsewhere")
    return Stages(
        folder=str(folder),
        preprocess=preprocess,
        front_end=front_end,
        assemble=tuple(f"{folder}/kernel.ptx" if word == between else word for word in assemble),
        preprocessed=Path(text).name,
        environment={**environment, **variables},
    )


def _dry_run(
    nvcc: Path, flags: Sequence[str], folder: Path, kind: str, environment: Mapping[str, str]
) -> tuple[list[_Argv], dict[str, str]]:
    """Commands and variables that nvcc would use; its temporary files would lie in ``folder``."""
    output = folder / f"kernel.{kind}"
    argv = [str(nvcc), str(folder / "kernel.cu"), f"-{kind}", "-o", str(output), *flags, "--dryrun"]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**environment, "TMPDIR": str(folder)},
    )
    if done.returncode:
        words = done.stderr.strip() or f"exit {done.returncode}"
        raise UnusualError(f"nvcc --dryrun: {words}")
    commands: list[_Argv] = []
    variables: dict[str, str] = {}
    for line in done.stderr.splitlines():
        if not line.startswith("#$ "):
            continue
        text = line.removeprefix("#$ ")
        assigned = re.match(r"(\w+)=(.*)$", text)
        if assigned:
            variables[assigned[1]] = assigned[2]
        else:
            commands.append(tuple(shlex.split(string.Template(text).safe_substitute(variables))))
    return commands, variables


def _only(commands: list[_Argv], wanted: Callable[[_Argv], bool]) -> _Argv:
    found = [argv for argv in commands if wanted(argv)]
    if len(found) != 1:
        raise UnusualError(f"nvcc has {len(found)} commands where one was expected")
    return found[0]
