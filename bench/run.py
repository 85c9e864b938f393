"""Measure everything: `python -m bench.run` writes bench/results/<device>.csv, its plots and the README's short table.

Every method is checked against float64 before it is timed, and left out, with the reason, where it is wrong. The
methods of a case take turns in one process, at equal thread counts. Traces and compiled code are made once for a
problem, on the fewest threads, and serve all thread counts; `auto` chooses for each. The file is written after every
case; a later run of some problems or benchmarks replaces their rows.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

import hvp_engine as hvp
from bench import memory, methods, plots, report, results, steps, suite
from bench.interleave import interleave, threads
from bench.problems import PROBLEMS, names_for
from bench.results import Environment, Row
from bench.suite import Case, ProblemSuite
from bench.verification import Verified

BENCHMARKS = ("step", "update", "hvp", "inverse_hvp", "hypergradient", "unrolling", "memory")
LONG, SHORT = 100, 2
"""Products of the solves whose peak memory must not differ."""


class Recorder:
    """Times cases and keeps their rows, on disk too."""

    def __init__(self, file: Path, environment: Environment, device: torch.device, seconds: float, rounds: int):
        self.file, self.environment, self.device = file, environment, device
        self.seconds, self.rounds = seconds, rounds
        self.rows: list[Row] = []
        self.broken: list[str] = []
        self._old = results.read(file) if file.exists() else []

    def time(self, case: Case, thread_count: int) -> None:
        """Time a case and print a line about it."""
        with threads(thread_count):
            samples = interleave(case.works, self.device, self.seconds, self.rounds)
        rows = [
            self.environment.row(case.benchmark, case.problem, name, case.size, thread_count, values)
            for name, values in samples.items()
        ]
        self.add(rows)
        timings = ", ".join(f"{row.method} {report.duration(row.p50)}" for row in rows)
        print(f"{case.benchmark} | {case.problem} | {case.size:,} | {thread_count} threads | {timings}", flush=True)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, and bring the file up to date."""
        self.rows += rows
        results.write(self.file, self.all_rows)

    def note_checks(self, benchmark: str, problem: str, verified: Verified, notes: dict[str, str]) -> None:
        """Rows for what first calls took and for what was left out."""
        rows = [
            self.environment.row(report.SETUPS[benchmark], problem, name, 0, 1, [seconds], note=notes.get(name, ""))
            for name, seconds in verified.setup.items()
            if benchmark in report.SETUPS
        ]
        for name, reason in verified.left_out.items():
            rows.append(self.environment.row(benchmark, problem, name, 0, 1, [], note=reason))
            print(f"{benchmark} | {problem} | left out: {name}: {reason}", flush=True)
        self.broken += [f"{problem}: {text}" for text in verified.broken]
        self.add(rows)

    @property
    def all_rows(self) -> list[Row]:
        """This run's rows, and those of the file that it has not replaced."""
        return results.merged(self._old, self.rows)


def measure_steps(recorder: Recorder, thread_counts: Sequence[int], quick: bool) -> None:
    """The fused step, alone and beside a busy process."""
    for case in suite.step_cases(recorder.device, steps.SIZES[:3] if quick else steps.SIZES):
        for count in thread_counts:
            recorder.time(case, count)
    if recorder.device.type == "cpu":
        with steps.busy_neighbour():
            for case in suite.neighbour_cases(recorder.device):
                recorder.time(case, max(thread_counts))


def measure_problem(recorder: Recorder, name: str, options: argparse.Namespace) -> None:
    """The chosen benchmarks of one problem."""
    wanted, own = options.benchmarks, ProblemSuite(name, recorder.device)
    first = min(options.threads)
    with threads(first), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if {"inverse_hvp", "hvp", "memory"} & set(wanted):
            reports = {f"hvp_engine {engine}": made for engine, made in own.engines.items()}
            verified = own.inverse_hvps
            notes = {method: " / ".join(made.report().splitlines()) for method, made in reports.items()}
            recorder.note_checks("inverse_hvp", name, verified, notes)
        whole = "hypergradient" in wanted and name in suite.HYPERGRADIENT_PROBLEMS
        if whole:
            recorder.note_checks("hypergradient", name, own.hypergradients, {})
            recorder.note_checks("hypergradient", name, own.unrolled, {})
        cases: list[tuple[Callable[[], Case], Sequence[int]]] = []
        if "update" in wanted and name in suite.UPDATE_PROBLEMS:
            cases.append((own.update, options.threads))
        if "hvp" in wanted:
            cases.append((own.hvp, [first]))
        if "inverse_hvp" in wanted:
            for terms in options.terms or (own.problem.terms, *own.problem.sweep):
                counts = options.threads if options.terms or terms == own.problem.terms else [first]
                cases.append((partial(own.inverse_hvp, terms), counts))
        if whole:
            cases.append((own.hypergradient, [first]))
        if "unrolling" in wanted and name == suite.UNROLLED_PROBLEM:
            lengths = suite.UNROLLED_LENGTHS[:4] if options.quick else suite.UNROLLED_LENGTHS
            cases += [(partial(own.unrolling, length), [first]) for length in lengths]
        for make, counts in cases:
            for count in counts:
                recorder.time(make(), count)
        if "memory" in wanted and name in suite.MEMORY_PROBLEMS:
            measure_memory(recorder, own, options.quick)


def measure_memory(recorder: Recorder, own: ProblemSuite, quick: bool) -> None:
    """Peaks of short and long solves by every engine; for one problem, of unrolling, and of fresh processes."""
    name, device, record = own.problem.name, recorder.device, recorder.environment.row
    lengths = (SHORT, 10 if quick or own.problem.terms < 20 else LONG)
    rows = []
    for method, run in own.inverse_hvps.runs.items():
        if methods.is_ours(method) and (device.type == "cuda" or method not in memory.UNSEEN):
            peaks = {length: memory.peak_of(run, length, device) for length in lengths}
            rows += [record("memory", name, method, length, 1, [peak], "bytes") for length, peak in peaks.items()]
            print(f"memory | {name} | {method} | {peaks}", flush=True)
            if device.type == "cuda":
                held = memory.reserved_of(run, lengths[-1], device)
                rows.append(record("reserved memory", name, method, lengths[-1], 1, [held], "bytes"))
                print(f"reserved memory | {name} | {method} | {held:,}", flush=True)
    if name == suite.UNROLLED_PROBLEM:
        for length in suite.UNROLLED_LENGTHS[: 4 if quick else None]:
            for method, run in own.against_unrolling.items():
                peak = memory.peak_of(run, length, device)
                rows.append(record("unrolling memory", name, method, length, 1, [peak], "bytes"))
        if device.type == "cpu":
            for method in memory.IN_FRESH_PROCESSES:
                for length in lengths:
                    peak = memory.peak_of_fresh_process(name, method, length)
                    rows.append(record("resident memory", name, method, length, 1, [peak], "bytes"))
                    print(f"resident memory | {name} | {method} | {length} | {peak:,}", flush=True)
    recorder.add(rows)


def warm_up(device: torch.device) -> None:
    """Import what a first trace imports, so that no method is charged for it."""
    hvp.HessianOperator(lambda w: (w**3).sum(), torch.ones(2, device=device), engine="linearized")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("bench.run", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--problems", nargs="+", choices=list(PROBLEMS), metavar="NAME", help=f"of {', '.join(PROBLEMS)}")
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--terms", nargs="+", type=int, metavar="N", help="products of the solves (default: by problem)")
    add("--threads", nargs="+", type=int, metavar="N", help="thread counts (default: 1 and 2; 1 with a GPU)")
    add("--rounds", type=int, metavar="N", help="samples at most (default: 25; with --quick 2)")
    add("--seconds", type=float, metavar="S", help="for each case, roughly (default: 2; with --quick 0.1)")
    add("--quick", action="store_true", help="a glance; its results go to out/bench")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    add("--out", type=Path, metavar="FOLDER", help="for the results (default: bench/results)")
    options = parser.parse_args(arguments)
    options.threads = options.threads or ([1] if options.device.type == "cuda" else [1, 2])
    options.rounds = options.rounds or (2 if options.quick else 25)
    options.seconds = options.seconds or (0.1 if options.quick else 2.0)
    options.out = options.out or (results.ROOT / "out" / "bench" if options.quick else results.FOLDER)
    options.problems = options.problems or names_for(options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for; 1 if a method of ours gave a wrong result."""
    options = parse(arguments)
    environment = Environment.of(options.device)
    file = options.out / f"{results.slug(environment.device)}.csv"
    recorder = Recorder(file, environment, options.device, options.seconds, options.rounds)
    start = time.perf_counter()
    warm_up(options.device)
    if "step" in options.benchmarks:
        measure_steps(recorder, options.threads, options.quick)
    if set(options.benchmarks) - {"step"}:
        for name in options.problems:
            measure_problem(recorder, name, options)
    written = [file, *plots.draw(recorder.all_rows, options.out, file.stem)]
    if options.out == results.FOLDER:
        with contextlib.suppress(FileNotFoundError):
            written.append(report.update_readme())
    print(report.markdown(recorder.all_rows))
    print(f"\n{time.perf_counter() - start:.0f} s; written: {', '.join(map(str, written))}")
    for text in recorder.broken:
        print(f"NOT TIMED, since it is wrong or fails: {text}", file=sys.stderr)
    return 1 if recorder.broken else 0


if __name__ == "__main__":
    sys.exit(main())
