"""The commands whose output the docs show, and a script that regenerates it.

``python -m tests.golden`` rewrites every golden block and transcript of README and docs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FRESH = "--library sgl-deep-gemm==0.2.5"
"""The default on a machine without an installed library, so that output is the same everywhere."""

COMMANDS = {
    "sim": f"sim {FRESH}",
    "sim-all": f"sim --model dsv4 --pp 4 --tp 2 {FRESH}",
    "sim-dies": f"sim {FRESH} --model dsv4 --pp 1 --tp 2 --nodes 1 --hardware h20 "
    "--host-factor 1.1 --cuda-graphs 1,8,64,256 --warmup full --warmup fast --warmup planned",
    "plan": f"plan {FRESH}",
    "plan-b200": f"plan --gpu b200 {FRESH}",
    "plan-gemm": f"plan --gemm gemm_nt_f8f8bf16:4096:1024 {FRESH}",
    "plan-fast": f"plan --policy fast {FRESH}",
    "plan-stream": "plan --policy fast --without paged_mqa_logits_metadata --stream 37,300,9000 "
    f"{FRESH}",
    "sweep": f"sweep {FRESH} --pp 1,4 --nodes 1,4 --cores 4,64",
    "overlap": "overlap --model dsv4 --pp 1 --tp 8 --ep",
    "overlap-measured": "overlap --no-search --measured docs/measurements/h200x2_steps_decode.json",
    "fidelity-nccl": "compare --hardware h200 docs/measurements/h200x2_nccl.json",
    "fidelity-nodes": "compare --hardware h200 docs/measurements/h200x2_vn.json "
    "docs/measurements/h200x2_vn_layouts.json",
}
"""Arguments of ``runner`` by block name; paths are relative to the repository."""

SCRIPTS = {"published": "docs/measurements/published.py"}
"""Scripts whose output is shown, by block name."""

SHOWN_FROM = {
    "overlap-measured": "Measured",
    "sim-dies": "Policies",
    "plan-stream": "fast: compiles",
}
"""Blocks that start at a given text of the output instead of its first line."""

BLOCK = re.compile(r"<!-- golden: (\S+) -->\n```\n(.*?)\n?```", re.DOTALL)
TRANSCRIPT = re.compile(r"<!-- transcript -->\n```\n(.*?)\n```", re.DOTALL)


def tidy(text: str) -> str:
    """Strip trailing spaces, leading and trailing blank lines, and the line naming this nvcc."""
    lines = (line.rstrip() for line in text.splitlines() if not line.startswith("compiler: "))
    return "\n".join(lines).strip("\n")


def run(arguments: list[str], folder: Path = ROOT) -> str:
    """Output of Python with these arguments: a script, or ``-m runner``."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=folder, env=environment
    )
    return done.stdout


def _block(found: re.Match[str]) -> str:
    name = found[1]
    arguments = [SCRIPTS[name]] if name in SCRIPTS else ["-m", "runner", *COMMANDS[name].split()]
    text = tidy(run(arguments))
    text = text[text.index(SHOWN_FROM.get(name, "")) :]
    return f"<!-- golden: {name} -->\n```\n{text}\n```"


def _transcript(found: re.Match[str]) -> str:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in found[1].splitlines():
            if line.startswith("$ "):
                _, *arguments = shlex.split(line[2:])
                lines += [line, *tidy(run(["-m", "runner", *arguments], Path(folder))).splitlines()]
    text = "\n".join(lines)
    return f"<!-- transcript -->\n```\n{text}\n```"


def main() -> None:
    """Rewrite all golden blocks and transcripts."""
    for path in DOCUMENTS:
        before = path.read_text()
        after = TRANSCRIPT.sub(_transcript, BLOCK.sub(_block, before))
        if after != before:
            path.write_text(after)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
