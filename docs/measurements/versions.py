"""Versions of the library against GPUs: how many kernels, how long to plan and to build them.

Run it where the libraries are unpacked; rows are appended to the given file, a JSON object a line:

    python docs/measurements/versions.py plan OUT.jsonl LIBRARY... -- GPU...
    python docs/measurements/versions.py build OUT.jsonl LIBRARY... -- GPU...
    python docs/measurements/versions.py check OUT.jsonl LIBRARY... -- GPU...

``plan`` asks each library anew and then plans from what is known; ``build`` compiles every kernel;
``check`` compiles all of them the plain way too, and compares the machine code. ``table FILE...``
prints the table of docs/planning.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = ["--model", "dsv4", "--tp", "2"]
_BUILT = re.compile(r"(\d+) built.*?; ([\d.]+) s, ([\d.]+) CPU-seconds")


def _run(
    words: list[str], environment: dict[str, str]
) -> tuple[float, subprocess.CompletedProcess[str]]:
    started = time.monotonic()
    command = [sys.executable, "-m", "runner", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return round(time.monotonic() - started, 2), done


def _error(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1][:300] if done.returncode else ""


def plan(library: str, gpu: str) -> dict[str, Any]:
    """Seconds of a first and a second plan, and what was planned."""
    words = ["plan", *MODEL, "--library", library, "--gpu", gpu, "--json", "-"]
    with tempfile.TemporaryDirectory() as folder:
        memo = {"XDG_CACHE_HOME": folder}
        # --check asks the library also where a table ships or rules hold.
        first, asked = _run([*words[:-2], "--check"], memo)
        second, done = _run(words, memo)
    if "could not be called" in asked.stderr:
        return {"error": _error(asked)}
    row: dict[str, Any] = {"plan_s": first, "plan_again_s": second, "error": _error(done)}
    if not done.returncode:
        data = json.loads(done.stdout)
        named = {name: data[name] for name in ("library", "generation", "arch", "source")}
        row |= {**named, "kernels": len(data["kernels"])}
    return row


def build(library: str, gpu: str, *, check: bool = False) -> dict[str, Any]:
    """Seconds to build every kernel, and with ``check`` the plain way as well."""
    with tempfile.TemporaryDirectory() as cache:
        words = ["compile", *MODEL, "--library", library, "--gpu", gpu, "--cache-dir", cache]
        _, done = _run([*words, *["--check"] * check], {})
    ways = [
        {"built": int(built), "wall_s": float(wall), "cpu_s": float(cpu)}
        for built, wall, cpu in _BUILT.findall(done.stdout)
    ]
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith(("failed", "all ", "other machine"))]
    return {
        "ways": ways,
        "plain": [line for line in lines if "the plain way:" in line],
        "said": told,
        "error": _error(done),
    }


def table(paths: list[str]) -> None:
    """Print rows by library and GPU: kernels, seconds to plan and to build, machine code."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (line for path in paths for line in Path(path).read_text().splitlines()):
        row = json.loads(line)
        rows.setdefault((row["folder"], row["gpu"]), {})[row["what"]] = row
    print("| library | GPU | target | kernels | plan s | build s | CPU-s | plain s | code |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (folder, gpu), found in sorted(rows.items()):
        planned, checked = found.get("plan", {}), found.get("check", {})
        built = found.get("build", checked)
        if planned.get("error"):
            print(f"| {folder} | {gpu} | | none: {planned['error'].partition(': ')[2]} | | | | | |")
            continue
        one = (built.get("ways") or [{}])[0]
        plain = checked["ways"][1]["wall_s"] if len(checked.get("ways", ())) > 1 else ""
        equal = "equal" if any(said.startswith("all ") for said in checked.get("said", ())) else ""
        note = "" if built.get("cores", 16) == 16 else f" ({built['cores']} cores)"
        cells = (
            planned.get("library", folder),
            gpu,
            planned.get("arch", ""),
            planned.get("kernels", one.get("built", "")),
            planned.get("plan_s", ""),
            f"{one.get('wall_s', '')}{note}",
            one.get("cpu_s", ""),
            plain,
            equal,
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def main(arguments: list[str]) -> None:
    """Measure every library on every GPU."""
    what, out, *rest = arguments
    if what == "table":
        table([out, *rest])
        return
    at = rest.index("--")
    facts = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for gpu in rest[at + 1 :]:
        for library in rest[:at]:
            row = (
                plan(library, gpu) if what == "plan" else build(library, gpu, check=what == "check")
            )
            line = {"what": what, "folder": Path(library).name, "gpu": gpu, **row, **facts}
            with Path(out).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
