"""The demo's table in the README: `make demo ARGS="--out bench/results"`, then `python -m bench.demo`."""

from __future__ import annotations

from pathlib import Path

from bench.report import README, put
from bench.results import FOLDER
from hvp_engine.demo import report

RESULTS = FOLDER / "demo.json"


def block(results: Path = RESULTS) -> str:
    """The table as the demo printed it, in Markdown."""
    return f"```text{report.table(report.read(results))}\n```"


if __name__ == "__main__":
    print(block())
    put(block(), "demo", README)
