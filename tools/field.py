"""Time and check hypergradients through models of other packages, and print the table of docs/field.md.

    python tools/field.py [--out FILE.csv] [--rounds 5] [--only NAME ...]

Needs the extra `field`. Each model's row is written when it is there, in place of an older one. Times are CPU seconds
of one thread (`time.process_time`), medians of rounds in which the methods take turns; a hypergradient has 20 products.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from field_models import MODELS, FieldModel  # noqa: E402
from field_problems import Problem, difference  # noqa: E402

from bench import field, results, tables  # noqa: E402
from hvp_engine.engines import AutoEngine, create  # noqa: E402

ENGINES = ("recorded", "linearized", "auto")
FIRST_CALLS = 6
"""Calls in which engines build programs and `auto` measures; then the steady state is timed."""
CHECKED, TIMED = (3, 0.02), (20, 1e-3)
"""(products, alpha) of a check and of a timed hypergradient."""


def outcome(model: FieldModel, engine: str) -> tuple[str, str]:
    """Whether an engine is right, in a word or by its error; and what `auto` chose and why."""
    made = create(engine)
    problem = Problem(model, *CHECKED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            error = difference(problem.found(made), problem.truth())
        except Exception as failure:  # whatever it is, the table says it
            return f"{type(failure).__name__}: {first_line(failure)}", ""
    reason = made.report().splitlines()[0] if isinstance(made, AutoEngine) else ""
    if any("is replaced by" in str(warning.message) for warning in caught):
        return "given up by its self-check", reason
    return ("right" if error < model.tolerance else f"differs by {error:.1e}"), reason


def first_line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:160]


def timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each: medians of rounds in which they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            samples[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def measured(name: str, rounds: int) -> field.Row:
    """The row of a model."""
    model = MODELS[name]
    checks = {engine: outcome(model, engine) for engine in ENGINES}
    problem = Problem(model, *TIMED)
    calls: dict[str, Callable[[], object]] = {"plain": problem.plain(model.dtype)}
    calls |= {engine: problem.ours(create(engine)) for engine in ENGINES if "Error" not in checks[engine][0]}
    first = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method, call in calls.items():
            start = time.process_time()
            for _ in range(FIRST_CALLS):
                call()
            first[method] = time.process_time() - start
        milliseconds = timed(calls, rounds)
    return field.Row(
        model=name,
        package=f"{model.package} {version(model.package)}",
        weights=sum(weight.numel() for weight in model.built()[1].values()),
        **{engine: checks[engine][0] for engine in ENGINES},
        chosen=checks["auto"][1],
        **{f"{method}_ms": round(milliseconds.get(method, float("nan")), 2) for method in ("plain", *ENGINES)},
        first_auto_s=round(first.get("auto", float("nan")), 2),
        device=results.device_name(torch.device("cpu")),
        torch=torch.__version__,
        commit=results.commit(),
        date=datetime.date.today().isoformat(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=field.FILE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        if not MODELS[name].installed:
            print(f"{name}: {MODELS[name].package} is not installed", file=sys.stderr)
            continue
        rows = {row.model: row for row in tables.read(arguments.out, field.Row)} | {
            name: measured(name, arguments.rounds)
        }
        tables.write(arguments.out, field.Row, [rows[model] for model in MODELS if model in rows])
        print(name, "done", file=sys.stderr, flush=True)
    print(field.markdown(arguments.out))


if __name__ == "__main__":
    main()
