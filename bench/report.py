"""The tables of the benchmark, from results files.

`python -m bench.report [FILE ...]` prints them all, as the documentation's page of results has them, and puts the short
one into README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench import results
from bench.methods import LIST_LOOPS, is_ours
from bench.problems import PROBLEMS
from bench.results import Row
from bench.steps import WORDS

README = results.ROOT / "README.md"
AUTO = "hvp_engine auto"
UNROLLED = ("unrolling", "higher")


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.01234), duration(2.5e-6), duration(None)
    ('12.3 ms', '2.5 us', '-')
    """
    if seconds is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def size_of(count: float) -> str:
    """
    >>> size_of(2_500_000)
    '2.5 MB'
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


class Table:
    """Medians by method, of the rows of one case."""

    def __init__(self, rows: Iterable[Row]):
        self.medians = {row.method: row.p50 for row in rows if row.p50 is not None}

    def best(self, ours: bool) -> tuple[str, float] | None:
        """The fastest method that is ours, or that is not."""
        found = [(value, name) for name, value in self.medians.items() if is_ours(name) == ours]
        return (min(found)[1], min(found)[0]) if found else None

    @property
    def list_loop(self) -> float | None:
        """The faster of the two plain list loops."""
        return min((self.medians[name] for name in LIST_LOOPS if name in self.medians), default=None)

    def ratio(self, slower: float | None, faster: str) -> str:
        """How many times faster `faster` is."""
        value = self.medians.get(faster)
        return "-" if slower is None or value is None else f"{slower / value:.2f}x"


def case(rows: Iterable[Row], benchmark: str, problem: str, size: int, threads: int) -> Table:
    """The rows of one case."""
    key = (benchmark, problem, size, threads)
    return Table(row for row in rows if (row.benchmark, row.problem, row.size, row.threads) == key)


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def solves(rows: Sequence[Row], benchmark: str, title: str) -> str:
    """Time of a solve or a hypergradient: ours beside the list loop and the fastest method that is not ours."""
    head = ["problem", "HVPs", "threads", "list loop", "fastest other", "eager", "auto", "best of ours",
            "auto, against fastest other"]  # fmt: skip
    body = []
    for problem, recipe in PROBLEMS.items():
        for threads in sorted({row.threads for row in rows if row.benchmark == benchmark and row.size}):
            table = case(rows, benchmark, problem, recipe.terms, threads)
            # Unrolling computes something else unless the weights are at a minimum; it has a plot of its own.
            table.medians = {k: v for k, v in table.medians.items() if k not in UNROLLED}
            other, own = table.best(ours=False), table.best(ours=True)
            if other is None or own is None:
                continue
            body.append([
                problem, str(recipe.terms), str(threads), duration(table.list_loop),
                f"{duration(other[1])} ({other[0]})", duration(table.medians.get("hvp_engine eager")),
                duration(table.medians.get(AUTO)), f"{duration(own[1])} ({own[0].removeprefix('hvp_engine ')})",
                table.ratio(other[1], AUTO),
            ])  # fmt: skip
    return f"{title}\n\n{grid(head, body)}" if body else ""


def terms(rows: Sequence[Row]) -> str:
    """One term against one gradient."""
    body = []
    for problem in PROBLEMS:
        for threads in sorted({row.threads for row in rows if row.benchmark == "hvp"}):
            table = case(rows, "hvp", problem, 1, threads)
            gradient, own = table.medians.get("gradient"), table.best(ours=True)
            if gradient is None or own is None:
                continue
            eager, auto = (table.medians.get(name) for name in ("hvp_engine eager", AUTO))
            body.append([
                problem, str(threads), duration(gradient), duration(eager), duration(auto),
                "-" if auto is None else f"{auto / gradient:.2f}",
                f"{own[1] / gradient:.2f} ({own[0].removeprefix('hvp_engine ')})",
            ])  # fmt: skip
    head = ["problem", "threads", "one gradient", "one term, eager", "auto", "auto in gradients", "best in gradients"]
    return f"One term of a solve (product and update) against one eager gradient.\n\n{grid(head, body)}" if body else ""


def fused_steps(rows: Sequence[Row]) -> str:
    """The fused step against two `_foreach_add_`, and its bandwidth against `add_`."""
    body = []
    for row in rows:
        if row.benchmark.startswith("step") and row.method == "neumann_step" and row.p50 is not None:
            table = case(rows, row.benchmark, row.problem, row.size, row.threads)
            bandwidth = {
                name: f"{4e-9 * WORDS[name] * row.size / seconds:.1f}" for name, seconds in table.medians.items()
            }
            body.append([
                row.benchmark, f"{row.size:,}", row.problem, str(row.threads), duration(row.p50),
                duration(table.medians.get("two _foreach_add_")),
                table.ratio(table.medians.get("two _foreach_add_"), "neumann_step"),
                bandwidth["neumann_step"], bandwidth.get("add_", "-"), bandwidth.get("copy_", "-"),
            ])  # fmt: skip
    head = ["", "weights", "in", "threads", "neumann_step", "two _foreach_add_", "times faster", "GB/s", "add_ GB/s",
            "copy_ GB/s"]  # fmt: skip
    return f"The fused step by itself.\n\n{grid(head, body)}" if body else ""


def updates(rows: Sequence[Row]) -> str:
    """The update part of a solve, against the list loop in both forms."""
    body = []
    for row in rows:
        if row.benchmark == "update" and row.method == "hvp_engine step" and row.p50 is not None:
            table = case(rows, "update", row.problem, row.size, row.threads)
            loops = [table.medians.get(name) for name in LIST_LOOPS]
            body.append([
                row.problem, str(row.threads), *map(duration, loops), duration(row.p50),
                *(table.ratio(loop, row.method) for loop in loops),
            ])  # fmt: skip
    head = ["problem", "threads", *LIST_LOOPS, "fused step", *(f"faster than {name}" for name in LIST_LOOPS)]
    return f"The update alone, measured inside a solve.\n\n{grid(head, body)}" if body else ""


def peaks(rows: Sequence[Row]) -> str:
    """Peak memory of long and short solves, and against eager."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row.benchmark in ("memory", "resident memory") and row.p50 is not None:
            found.setdefault((row.benchmark, row.problem, row.method), {})[row.size] = row.p50
    body = []
    for (benchmark, problem, method), by_size in found.items():
        short, long = min(by_size), max(by_size)
        eager = found.get((benchmark, problem, "hvp_engine eager"), {}).get(long)
        of_tensors = benchmark == "memory"
        body.append([
            problem, "tensors" if of_tensors else "fresh process", method,
            f"{size_of(by_size[short])} ({short})", f"{size_of(by_size[long])} ({long})",
            f"{by_size[long] / by_size[short]:.3f}" if of_tensors else "-",
            f"{by_size[long] / eager:.2f}" if eager and of_tensors else "-",
        ])  # fmt: skip
    head = ["problem", "of", "method", "short solve (HVPs)", "long solve (HVPs)", "long / short", "long / eager"]
    note = "What a fresh process reports is growth of its resident set after a solve of one product."
    return f"Peak memory. {note}\n\n{grid(head, body)}" if body else ""


def left_out(rows: Sequence[Row]) -> str:
    """Who was not timed, and why."""
    lines = [f"- {row.problem}, {row.benchmark}: {row.method}: {row.note}" for row in rows if row.p50 is None]
    return "Left out, since wrong or not able to:\n\n" + "\n".join(sorted(set(lines))) if lines else ""


def set_ups(rows: Sequence[Row]) -> str:
    """What tracing and compiling cost once."""
    body = [
        [row.problem, row.method, duration(row.p50), row.note.replace("|", "/")]
        for row in rows
        if row.benchmark == "setup" and row.p50 is not None and is_ours(row.method) and row.p50 > 0.5
    ]
    return (
        f"First calls (trace, compile, measure).\n\n{grid(['problem', 'method', 'seconds', ''], body)}" if body else ""
    )


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each device, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.device, []).append(row)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """All tables, those of each device under a heading with where the numbers come from."""
    return "\n\n".join(_of_device(device, own) for device, own in by_device(rows).items())


def _of_device(device: str, rows: Sequence[Row]) -> str:
    runs = sorted({(row.date, row.commit, row.torch_version) for row in rows})
    parts = [
        f"### {device}",
        "Medians of interleaved samples, measured with "
        + "; ".join(f"torch {version} at commit {commit} on {date}" for date, commit, version in runs)
        + ".",
        solves(rows, "inverse_hvp", "Inverse-Hessian-vector product, gradient included."),
        solves(rows, "hypergradient", "Whole hypergradient."),
        terms(rows),
        updates(rows),
        fused_steps(rows),
        peaks(rows),
        set_ups(rows),
        left_out(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(rows: Sequence[Row]) -> str:
    """The README's tables: a hypergradient and a solve of each problem on each device, `auto` against the fastest
    other; and memory."""
    head = ["problem", "HVPs", "device", "date", "fastest other", "hvp_engine", "faster", "break-even"]
    text = (
        'On one CPU thread or one GPU, `engine="auto"` against the fastest of plain loops and other packages, jitted '
        "JAX among them; medians of interleaved samples. Break-even: after so many calls what the first ones took "
        "longer than the other's is repaid."
    )
    titles = {"hypergradient": "Whole hypergradients", "inverse_hvp": "Inverse-Hessian-vector products, with gradient"}
    for benchmark, title in titles.items():
        body = [line for device, own in by_device(rows).items() for line in _compared(device, own, benchmark)]
        text += f"\n\n{title}:\n\n{grid(head, body)}" if body else ""
    sizes: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row.benchmark == "memory" and row.p50 is not None and is_ours(row.method):
            sizes.setdefault((row.device, row.problem, row.method), {})[row.size] = row.p50
    if sizes:
        growth = max(found[max(found)] / found[min(found)] for found in sizes.values())
        short, long = min(map(min, sizes.values())), max(map(max, sizes.values()))
        text += f"\n\nPeak memory of a solve of {long} products against one of {short}: {growth:.2f}x at most."
    return text


SETUPS = {"inverse_hvp": "setup", "hypergradient": "setup, hypergradient"}
"""What results call the first calls of a benchmark: until the final choice, where there is one."""


def _break_even(rows: Sequence[Row], benchmark: str, problem: str, other: tuple[str, float], own: float) -> str:
    """Calls after which a set-up is repaid."""
    seconds = case(rows, SETUPS[benchmark], problem, 0, 1).medians
    if AUTO not in seconds or own >= other[1]:
        return "-"
    return f"{max(0.0, seconds[AUTO] - seconds.get(other[0], 0.0)) / (other[1] - own):.0f} calls"


def _compared(device: str, rows: Sequence[Row], benchmark: str) -> Iterator[list[str]]:
    """A line for each problem, of the fewest threads."""
    for problem, recipe in PROBLEMS.items():
        key = (benchmark, problem, recipe.terms)
        own = [row for row in rows if (row.benchmark, row.problem, row.size) == key and row.p50 is not None]
        table = case(own, *key, min((row.threads for row in own), default=0))
        table.medians = {name: value for name, value in table.medians.items() if name not in UNROLLED}
        other = table.best(ours=False)
        if other is not None and AUTO in table.medians:
            yield [
                problem, str(recipe.terms), device, max(row.date for row in own), f"{duration(other[1])} ({other[0]})",
                duration(table.medians[AUTO]), table.ratio(other[1], AUTO),
                _break_even(rows, benchmark, problem, other, table.medians[AUTO]),
            ]  # fmt: skip


def put(text: str, name: str, readme: Path = README) -> Path:
    """Replace what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->` of the README.

    Errors: `FileNotFoundError` where there is no README, `ValueError` where it has no markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = readme.read_text()
    if begin not in content or end not in content:
        raise ValueError(f"{readme.name}: expected the markers {begin} and {end}")
    head, tail = content.split(begin, 1)[0], content.split(end, 1)[1]
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
    return readme


def everything() -> list[Row]:
    """The rows of every device's committed results."""
    return [row for file in results.device_files() for row in results.read(file)]


def update_readme(readme: Path = README) -> Path:
    """Put the short table of all committed results into the README; errors as :func:`put`."""
    return put(summary(everything()), "bench", readme)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    print(markdown([row for file in files for row in results.read(file)] if files else everything()))
    update_readme()
