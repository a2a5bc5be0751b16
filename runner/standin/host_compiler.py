"""The C compiler of this machine."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from runner.errors import UserError


@dataclass(frozen=True)
class HostCompiler:
    """A C compiler and the environment that it runs in.

    Attributes:
        command: the program and its first arguments.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def version(self) -> str:
        """What it says of itself."""
        return self._run("--version").stdout

    def build(self, *arguments: str) -> None:
        """Run it once.

        Raises:
            UserError: it failed; the message has its first line.
        """
        done = self._run(*arguments)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            why = said[0] if said else f"exit {done.returncode}"
            raise UserError(f"{self.command[0]} cannot build the stand-in GPU: {why}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            env=dict(self.environment),
            check=False,
        )


def find_host_compiler(environment: Mapping[str, str]) -> HostCompiler:
    """``$CC``, else cc, gcc or clang.

    Raises:
        UserError: there is none.
    """
    try:
        chosen = shlex.split(environment.get("CC", ""))
    except ValueError as error:
        raise UserError(f"CC={environment['CC']} is no command ({error}): unset CC") from None
    for name in (chosen[0],) if chosen else ("cc", "gcc", "clang"):
        program = shutil.which(name, path=environment.get("PATH"))
        if program is not None:
            return HostCompiler((program, *chosen[1:]), environment)
    if chosen:
        raise UserError(f"CC={environment['CC']} is no program: unset CC or name a C compiler")
    raise UserError("the stand-in GPU needs a C compiler: apt-get install gcc")
