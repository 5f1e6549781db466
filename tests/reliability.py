"""Figures that tests measure for docs/reliability.md: `record` writes them, this module prints the table.

KVSIEVE_RELIABILITY=figures.jsonl pytest -m "slow or figures" && python -m tests.reliability figures.jsonl
"""

import json
import os
import sys
from pathlib import Path


def record(name: str, value: object) -> None:
    """Append a figure to the file that $KVSIEVE_RELIABILITY names; without it, do nothing."""
    path = os.environ.get("KVSIEVE_RELIABILITY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")


def table(path: Path) -> str:
    """The figures as Markdown, in the order in which their names came; the last value of a name counts."""
    figures: dict[str, object] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        figure = json.loads(line)
        figures[figure["name"]] = figure["value"]
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join(["| what was tried | result |", "| --- | ---: |", *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
