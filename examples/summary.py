"""`SUMMARY.md`: the paper's numbers and ours, a column for each seed, with costs and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.files import write

Result = Mapping[str, Any]


def summarize(out: Path) -> None:
    """Write `SUMMARY.md` from the results of every run in `out`; runs that differ by their seed share a section."""
    groups: dict[str, list[tuple[Path, Result]]] = {}
    for file in sorted(out.glob("*/results.json")):
        group, _, _ = file.parent.name.rpartition("-seed")
        groups.setdefault(group, []).append((file.parent, json.loads(file.read_text())))
    everything = [result for runs in groups.values() for _, result in runs]
    clock, processor = (
        sum(result.get(name) or 0 for result in everything) for name in ("seconds", "processor_seconds")
    )
    together = (
        f"{len(everything)} runs; together {clock / 60:.0f} minutes by the clock, {processor / 60:.0f} of the processor"
    )
    lines = ["# Results", "", f"{together}.", ""]
    for runs in groups.values():
        runs.sort(key=lambda run: run[1]["seed"])
        lines += _section([result for _, result in runs]) + _pictures(runs)
    write(out / "SUMMARY.md", "\n".join(lines).encode())


def _section(results: Sequence[Result]) -> list[str]:
    first = results[0]
    name = ", ".join(part for part in (first["name"], first["dataset"]) if part)
    return [
        f"## {name}: {first['title']} ({first['source']})",
        "",
        *(_circumstances(result) for result in results),
        "",
        *_comparisons(results),
        *(f"- {note}" for note in dict.fromkeys(note for result in results for note in result["notes"])),
        "",
        *_costs(results),
    ]


def _circumstances(result: Result) -> str:
    versions, recipe, processor = result["versions"], result.get("recipe", ""), result.get("processor_seconds")
    return (
        f"Size {result['size']}{f', recipe {recipe}' if recipe else ''}, seed {result['seed']}; {result['device']}, "
        f"{result['threads']} thread(s), torch {versions['torch']}, Python {versions['python']}; "
        f"{result['seconds']:.0f} s{f', {processor:.0f} s of the processor' if processor is not None else ''}.  "
    )


def _comparisons(results: Sequence[Result]) -> list[str]:
    """What was measured, the paper's result, and ours for each seed."""
    papers = {line["what"]: line["paper"] for result in results for line in result["comparisons"]}
    ours = [{line["what"]: line["ours"] for line in result["comparisons"]} for result in results]
    heads = ["ours"] if len(results) == 1 else [f"ours, seed {result['seed']}" for result in results]
    rows = [[what, paper, *(found.get(what, "") for found in ours)] for what, paper in papers.items()]
    return table(["what", "paper", *heads], rows)


def _costs(results: Sequence[Result]) -> list[str]:
    rows = [
        [
            run,
            str(result["seed"]),
            str(cost["hyper_steps"]),
            f"{cost['seconds']:.1f}",
            f"{cost['share_of_hypergradients']:.0%}",
            f"{cost['ratio_to_plain_training']:.2f}",
        ]
        for result in results
        for run, cost in result["costs"].items()
    ]
    head = ["run", "seed", "hyper steps", "seconds", "share of hypergradients", "time / plain training"]
    return table(head, rows) if rows else []


def _pictures(runs: Sequence[tuple[Path, Result]]) -> list[str]:
    """The pictures of the first seed."""
    folder, result = runs[0]
    return [line for picture in result["pictures"] for line in (f"![{picture}]({folder.name}/{picture})", "")]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [" | ".join(cell.replace("|", r"\|") for cell in cells) for cells in rows]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {line} |" for line in lines),
        "",
    ]
