"""The table of docs/rehearsing.md, from the recordings in docs/measurements/rehearsals."""

import json
from pathlib import Path

FOLDER = Path(__file__).with_name("rehearsals")
START = ("start", "load", "warm-up", "capture")
HEAD = (
    "| set-up | ready s | GiB | entries: start, load, warm-up, capture | after ready "
    "| after the fix |"
)


def row(path: Path) -> str:
    """One line of the table."""
    data = json.loads(path.read_text())
    made = {phase: set() for phase in START}
    later = set()
    for call in data["calls"]:
        for phase, seen in call["phases"].items():
            made.get(phase, later).update(seen["entries"])
    after = data.get("after_fix")
    fixed = "-" if after is None else f"{len(after['entries'])} of {after['kernels']} kernels"
    memory = max(data["peak_bytes"].values()) / 2**30
    command = " ".join(data["command"][1:]).replace("--load-format dummy --skip-tokenizer-init", "")
    set_up = f"{data['server']}, {data['gpu']}: `{command.strip()}`"
    entries = ", ".join(str(len(made[phase])) for phase in START)
    return f"| {set_up} | {data['ready']:.0f} | {memory:.1f} | {entries} | {len(later)} | {fixed} |"


if __name__ == "__main__":
    print(HEAD)
    print("| --- " * 6 + "|")
    for path in sorted(FOLDER.glob("*.json")):
        print(row(path))
