"""What each part of the CUDA graphs is worth: beside the same work without it, in one process, in turns.

    python -m tools.gpu_graphs [--device cuda|cpu] [--problem NAME] [--only PART ...]

On a CPU the linearized engine takes the place of the graphs, so that only the script is tried.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hvp_engine as hvp
from bench.interleave import synchronize
from bench.problems import Problem, build
from hvp_engine._support.timing import Moment
from hvp_engine.engines import CudaGraphEngine, Engine, LinearizedEngine

ROUNDS = 7


class InParts(CudaGraphEngine):
    """A hypergradient is made of a recording for each of its parts."""

    def foresee(self, *_: Any) -> None:
        """Nothing is."""


class StepsApart(CudaGraphEngine):
    """Hypergradients are graphs; the steps of a tuner around them are not."""

    def recorder(self, device: torch.device) -> None:
        return None


def seconds(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median of each work on the device, in turns, after three calls to set it up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(3 + ROUNDS):
        for name, work in works.items():
            synchronize(device)
            begin = Moment(device)
            work()
            end = Moment(device)
            synchronize(device)
            if turn >= 3:
                times[name].append(end.seconds_since(begin))
    return {name: statistics.median(found) for name, found in times.items()}


def kernels(work: Callable[[], object], device: torch.device) -> str:
    """How many kernels a work runs."""
    if device.type != "cuda":
        return "kernels are counted on a GPU"
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        synchronize(device)
    return f"{sum(event.device_type == DeviceType.CUDA for event in found.events() or [])} kernels"


def compare(title: str, works: dict[str, Callable[[], object]], device: torch.device) -> None:
    """Print what each work takes."""
    found = seconds(works, device)
    least = min(found.values())
    print(title)
    for name, took in found.items():
        print(f"  {name}: {1e3 * took:.3f} ms, {took / least:.2f} of the fastest, {kernels(works[name], device)}")


def operator_of(problem: Problem, engine: Engine) -> hvp.HessianOperator:
    return hvp.HessianOperator(problem.train_loss, problem.weights, problem.hyper, problem.train, engine=engine)


def early_stopping(problem: Problem, graphs: Callable[..., Engine]) -> None:
    """Conjugate gradients with a tolerance; without one they make all products, as a graph of the whole loop did."""
    solver = hvp.ConjugateGradient(100, tol=1e-2, damping=1.0)
    recorded, plain = operator_of(problem, graphs()), operator_of(problem, LinearizedEngine())
    v = dict(zip(problem.weights, problem.vector, strict=True))
    works: dict[str, Callable[[], object]] = {
        "recorded in pieces": lambda: recorded.solve(v, solver),
        "recorded, to its end": lambda: recorded.solve(v, replace(solver, tol=0.0)),
        "without graphs": lambda: plain.solve(v, solver),
    }
    stopped = recorded.solve(v, solver).iterations
    compare(f"conjugate gradients, at most 100 products, tolerance reached after {stopped}", works, problem.device)


def compiled_parts(problem: Problem, graphs: Callable[..., Engine]) -> None:
    """A solve of traced operations, and of compiled ones."""
    solver = hvp.Neumann(20, problem.alpha)
    v = dict(zip(problem.weights, problem.vector, strict=True))
    traced, compiled = operator_of(problem, graphs()), operator_of(problem, graphs(compile_budget_s=300.0))
    works: dict[str, Callable[[], object]] = {
        "traced": lambda: traced.solve(v, solver), "compiled": lambda: compiled.solve(v, solver),
    }  # fmt: skip
    compare("20 terms, recorded", works, problem.device)


def many_right_hand_sides(problem: Problem, graphs: Callable[..., Engine]) -> None:
    """32 solves together, and one after another."""
    solver, operator = hvp.Neumann(20, problem.alpha), operator_of(problem, graphs())
    singles = [
        {name: part * (k + 1) for name, part in zip(problem.weights, problem.vector, strict=True)} for k in range(32)
    ]
    vs = {name: torch.stack([single[name] for single in singles]) for name in problem.weights}
    works: dict[str, Callable[[], object]] = {
        "together": lambda: operator.solve(vs, solver, batched=True),
        "one by one": lambda: [operator.solve(single, solver) for single in singles],
    }
    compare("32 right-hand sides, 20 terms", works, problem.device)


def whole_hypergradients(problem: Problem, graphs: Callable[..., Engine]) -> None:
    """One recording, one for each part, and none."""
    parts: Callable[[], Engine] = InParts if problem.device.type == "cuda" else LinearizedEngine
    works: dict[str, Callable[[], object]] = {}
    for name, engine in (("whole", graphs()), ("in parts", parts()), ("without graphs", LinearizedEngine())):
        made = hvp.Hypergradient(problem.train_loss, problem.val_loss, hvp.Neumann(20, problem.alpha), engine=engine)
        works[name] = lambda made=made: made(problem.weights, problem.hyper, problem.train, problem.val)  # type: ignore[misc]
    compare("a hypergradient, 20 terms", works, problem.device)


def steps_of_a_tuner(problem: Problem, graphs: Callable[..., Engine]) -> None:
    """A round of Algorithm 1: five training steps and a hyper step."""
    on_gpu = problem.device.type == "cuda"
    apart: Callable[[], Engine] = StepsApart if on_gpu else LinearizedEngine
    engines = {"steps replayed": graphs(), "hypergradients alone": apart(), "without graphs": LinearizedEngine()}
    works: dict[str, Callable[[], object]] = {}
    tuners: dict[str, hvp.Tuner] = {}
    for name, engine in engines.items():
        solver = hvp.Neumann(20, problem.alpha)
        tuners[name] = tuner = hvp.Tuner(
            {key: weight.detach().clone() for key, weight in problem.weights.items()},
            {key: decay.detach().clone() for key, decay in problem.hyper.items()},
            problem.train_loss,
            problem.val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-4, capturable=on_gpu),
            hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-3, capturable=on_gpu),
            estimator=hvp.Hypergradient(problem.train_loss, problem.val_loss, solver, engine),
            inner_steps=5,
        )
        works[name] = lambda tuner=tuner: tuner.fit(  # type: ignore[misc]
            [problem.train], [problem.val], tuner.hyper_steps + 1, progress=False
        )
    compare("five training steps and a hyper step, 20 terms", works, problem.device)
    for line in tuners["steps replayed"].report().splitlines():
        print(f"  {line}")


PARTS: dict[str, Callable[[Problem, Callable[..., Engine]], None]] = {
    "stopping": early_stopping,
    "compiled": compiled_parts,
    "batched": many_right_hand_sides,
    "whole": whole_hypergradients,
    "steps": steps_of_a_tuner,
}


def main() -> int:
    """Measure all parts, or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--problem", default="lenet")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    problem = build(options.problem, options.device)

    def graphs(**given: Any) -> Engine:
        return CudaGraphEngine(**given) if options.device.type == "cuda" else LinearizedEngine()

    for part in options.only:
        PARTS[part](problem, graphs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
