"""The machine that will run against the one that a cache was built for: what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.environ import Environ
from runner.jit.compiler import release_of, signature_of
from runner.jit.keys import INCLUDE, Recipe, first_recipe, with_variables
from runner.jit.library import Library
from runner.jit.store.manifest import Manifest


@dataclass(frozen=True)
class Machine:
    """Where a server will look its kernels up.

    Attributes:
        library: its DeepGEMM.
        root: the folder of that library there.
        version_text: what ``nvcc --version`` prints there.
        environ: the variables that the server has.
        arch: what its GPU's kernels are compiled for, None where the GPU is not known.
        num_sms: SMs of its GPU, None where it is not known.
    """

    library: Library
    root: Path
    version_text: str
    environ: Environ
    arch: str | None = None
    num_sms: int | None = None

    def recipe(self, built: Manifest) -> Recipe:
        """How the library compiles there, given how it compiled where the cache was built for."""
        if built.generation == 2:
            there = Recipe(2, tuple(built.flags.split(" ")), built.extra_signature)
            return with_variables(there, self.environ)
        recipe = first_recipe(self.environ)
        if built.arch == recipe.arch:
            return recipe
        flags = built.flags.split(" ")
        return Recipe(1, tuple(f"-I{INCLUDE}" if flag[:2] == "-I" else flag for flag in flags))

    def differences(self, built: Manifest) -> Iterator[str]:
        """What keeps a server there from hitting a cache, each with what to do, in one line."""
        if built.library != self.library.title:
            yield (
                f"other library: built for {built.library}, and {self.library.title} looks for "
                "other kernels: build with that one (runner compile --library)"
            )
            return
        signature = signature_of(self.version_text, built.generation)
        if signature != built.signature:
            yield (
                f"other compiler: built for {compiler_words(built.signature)}, here it is "
                f"{compiler_words(signature)}: runner cache relocate, or build with what nvcc "
                "--version prints there (runner compile --compiler-text)"
            )
        yield from self._flags(built)
        if self.arch is not None and self.arch != built.arch:
            yield f"other GPU: built for {built.arch}, this one needs {self.arch}: runner compile"
        elif self.num_sms is not None and built.num_sms not in (0, self.num_sms):
            yield (
                f"other GPU: built for {built.num_sms} SMs, this one has {self.num_sms}: runner "
                "compile --gpu or --num-sms"
            )

    def _flags(self, built: Manifest) -> Iterator[str]:
        include = str(self.root / "include")
        theirs = built.flags.split(" ")
        ours = [flag.replace(INCLUDE, include) for flag in self.recipe(built).flags]
        ours = [flag for flag in ours if flag not in ("--include-path", include)]
        if built.generation == 1:
            paths = [_include_of(flags) for flags in (theirs, ours)]
            if paths[0] != paths[1]:
                yield (
                    f"other install path: built for {paths[0]}, here it is {paths[1]}: runner "
                    "cache relocate --target-root"
                )
            theirs, ours = (
                [f for f in flags if not f.startswith("-I")] for flags in (theirs, ours)
            )
        if theirs != ours:
            changed = sorted(set(theirs) ^ set(ours))
            yield (
                f"other compiler flags ({', '.join(changed)}): DG_JIT_* variables differ; set them "
                "as they were when it was built, or build it with them set"
            )


def _include_of(flags: list[str]) -> str:
    return next((flag.removeprefix("-I") for flag in flags if flag.startswith("-I")), "")


def compiler_words(signature: str) -> str:
    """A compiler's signature in a few words: the second generation's has several lines."""
    release = "nvcc {}.{}".format(*release_of(signature))
    when = [line for line in signature.splitlines() if line.startswith("Built on")]
    return f"{release} ({when[0]})" if when else release
