"""An influence matrix by blocks of right-hand sides, against pyDVL's blocks and against solves side by side.

    python -m bench.influence [--out FILE.csv]

A 64-32-10 network with 2,410 weights, trained for 100 steps on 500 digits of 8 x 8 pixels; 50 test digits; damping
1e-2. Every method gets the fewest iterations that bring the matrix within 1e-1, 1e-2 and 1e-3 of one from the dense
float64 Hessian, by the Frobenius norm, and is then timed: process CPU time on one thread, methods in turn. What has
been traced stays; the Hessian is linearized anew each time. pyDVL needs an environment of its own, since it needs numpy
below 2: `pip install "pydvl[influence]"`; without it, its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hvp_engine as hvp
from bench import tables
from bench.report import grid
from bench.results import FOLDER, Environment, version
from hvp_engine.demo.images import digits
from hvp_engine.solvers.base import IterativeSolve, LinearSystem, Prepared

FILE = FOLDER / "influence.csv"
DAMPING, ERRORS, MOST = 1e-2, (1e-1, 1e-2, 1e-3), 60
Method = Callable[[int], Tensor]
"""Iterations -> the matrix (training examples, test examples)."""


@dataclass(frozen=True)
class Row:
    """A method at an accuracy: the iterations that it needs, the error it then has, milliseconds of CPU time."""

    method: str
    wanted: float
    iterations: int
    error: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    package: str
    device: str
    torch: str
    commit: str
    date: str


class Problem:
    """The trained network, and its examples."""

    def __init__(self, dtype: torch.dtype = torch.float32, steps: int = 100):
        data = digits().take(torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:550])
        x = adaptive_avg_pool2d(data.images, 8).flatten(1)
        self.train, self.test = (x[:500].to(dtype), data.labels[:500]), (x[500:].to(dtype), data.labels[500:])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(self.module(x[:500]), data.labels[:500]).backward()
            optimizer.step()
        self.module.to(dtype)
        self._net = hvp.functional(self.module)
        self.weights = {name: weight.detach() for name, weight in self.module.named_parameters()}
        self._engine = hvp.engines.LinearizedEngine()

    def loss(self, weights: Any, batch: Any) -> Tensor:
        """The mean over a batch."""
        return cross_entropy(self._net(weights, batch[0]), batch[1])

    def matrix(self, solver: Any) -> Tensor:
        """By our solver for all test examples."""
        hessian = hvp.HessianOperator(self.loss, self.weights, self.train, engine=self._engine)
        return hvp.influence_matrix(hessian, self.loss, self.loss, self.weights, self.train, self.test, solver).matrix


class SideBySide(hvp.ConjugateGradient):
    """Conjugate gradients that share products, one batched product for each step, but no Krylov space."""

    def prepare(self, system: LinearSystem) -> Prepared:
        return IterativeSolve(self, system)


def pydvl(problem: Problem) -> Method:
    """`CgInfluence` in blocks; its signs are the opposite of ours, and its rows are test examples."""
    from pydvl.influence.torch import CgInfluence

    loader = DataLoader(TensorDataset(*problem.train), batch_size=len(problem.train[1]))

    def method(iterations: int) -> Tensor:
        model = CgInfluence(
            problem.module, cross_entropy, regularization=DAMPING, maxiter=iterations, solve_simultaneously=True,
            warn_on_max_iteration=False,
        )  # fmt: skip
        return -model.fit(loader).influences(*problem.test, *problem.train).T

    return method


def fewest(method: Method, truth: Tensor, wanted: float, least: int) -> tuple[int, float]:
    """The iterations that are enough, `least` or more, and the error that they leave."""
    for iterations in range(least, MOST + 1):
        error = float((method(iterations).double() - truth).norm() / truth.norm())
        if error <= wanted:
            return iterations, error
    raise RuntimeError(f"{MOST} iterations leave an error of {error:.2g}, and {wanted:.2g} was wanted")


def measure(rounds: int) -> list[Row]:
    """The rows of all methods."""
    problem = Problem()
    truth = Problem(torch.float64).matrix(hvp.Exact(damping=DAMPING))
    methods: dict[str, Method] = {
        "hvp_engine": lambda iterations: problem.matrix(hvp.ConjugateGradient(iterations, 0.0, DAMPING)),
        "hvp_engine, side by side": lambda iterations: problem.matrix(SideBySide(iterations, 0.0, DAMPING)),
    }
    if importlib.util.find_spec("pydvl") is not None:
        methods["pydvl"] = pydvl(problem)
    environment, rows = Environment.of(torch.device("cpu")), []
    needed = dict.fromkeys(methods, (1, 1.0))
    for wanted in ERRORS:
        needed = {name: fewest(method, truth, wanted, needed[name][0]) for name, method in methods.items()}
        samples: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds):
            for name, method in methods.items():
                start = time.process_time()
                method(needed[name][0])
                samples[name].append(1e3 * (time.process_time() - start))
        for name, (iterations, error) in needed.items():
            p20, _, _, p80 = statistics.quantiles(samples[name], n=5)
            package = "pydvl" if name == "pydvl" else "hvp_engine"
            rows.append(Row(
                name, wanted, iterations, error, p20, statistics.median(samples[name]), p80, rounds,
                f"{package} {version(package)}", environment.device, environment.torch_version, environment.commit,
                environment.date,
            ))  # fmt: skip
    return rows


def markdown(rows: list[Row] | None = None) -> str:
    """A table, of the committed results by default."""
    rows = tables.read(FILE, Row) if rows is None else rows
    if not rows:
        return "No results have been committed yet."
    head = ["error of the matrix", "method", "iterations", "CPU time"]
    body = [[f"{row.wanted:g}", row.method, str(row.iterations), f"{row.p50_ms:.0f} ms"] for row in rows]
    last = rows[-1]
    made = f"{last.device}, torch {last.torch}, {', '.join(sorted({row.package for row in rows}))}; {last.date}."
    return f"{grid(head, body)}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE, help="for the results (default: bench/results/influence.csv)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of each method")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = measure(options.rounds)
    tables.write(options.out, Row, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
