"""Errors of truncated Neumann series in low precision, against the same sums in float64.

    python -m bench.precision [--quick] [--out FILE.csv]

Weights in float32, bfloat16 or float16 (the solver's own vectors are float32), both forms of the series, and a plain
list loop whose vectors have the weights' precision, on random positive definite matrices of known condition and on
two networks on digits. The truth of a row is the sum in float64 of the problem as rounded: its error is that of
the arithmetic, not of the input.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from bench import tables
from bench.report import grid
from bench.results import FOLDER, Environment
from examples import datasets

Tensors = list[Tensor]
Product = Callable[[Tensors], Tensors]

FORMS = ("accumulate", "horner")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ITERATIONS = (5, 20, 100)
CONDITIONS = (10.0, 1e3, 1e5)
SIZE = 256
SEEDS = 5
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Row:
    """One form of the series on one problem: relative errors in the 2-norm, over the seeds."""

    problem: str
    condition: float
    dtype: str
    iterations: int
    method: str
    median: float
    worst: float
    seeds: int
    device: str
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class Problem:
    """loss(weights) at `weights`, a right-hand side and a step that converges; all float64."""

    name: str
    loss: Callable[..., Tensor]
    weights: Tensors
    inputs: Tensors
    v: Tensors
    condition: float
    largest: float

    def rounded(self, dtype: torch.dtype, to: torch.dtype) -> tuple[Tensors, Tensors, Tensors]:
        """Weights, inputs and right-hand side rounded to `dtype`, as tensors of dtype `to`."""
        weights, inputs, v = ([t.to(dtype).to(to) for t in ts] for ts in (self.weights, self.inputs, self.v))
        return weights, inputs, v


def quadratic(condition: float, seed: int) -> Problem:
    """w^T A w / 2 with eigenvalues from 1 down to 1 / condition, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), SIZE, dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.T
    w, v = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    return Problem(
        "random matrix", lambda w, a: w[0] @ (a @ w[0]) / 2, [w], [(matrix + matrix.T) / 2], [v], condition, 1.0
    )


def network(hidden: int | None, seed: int) -> Problem:
    """Cross-entropy on 500 digits of 7 x 7 pixels with decay 0.02, at weights after some training."""
    generator = torch.Generator().manual_seed(seed)
    digits = datasets.digits()
    chosen = torch.randperm(len(digits), generator=generator)[:700]
    x = avg_pool2d(digits.images[chosen], 4).flatten(1).double()
    x, labels = (x - x.mean()) / x.std(), digits.labels[chosen]
    sizes = [49, 10] if hidden is None else [49, hidden, 10]
    module = nn.Sequential(
        *(layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh()))
    )[:-1]
    net = hvp.functional(module)
    names = [name for name, _ in module.named_parameters()]
    weights = [
        (torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
        for p in module.parameters()
    ]

    def loss(w: Tensors, x: Tensor) -> Tensor:
        scores = net(dict(zip(names, w, strict=True)), x)
        return cross_entropy(scores, labels[: len(x)]) + 0.01 * sum(t.square().sum() for t in w)

    def val_loss(w: Tensors) -> Tensor:
        return cross_entropy(net(dict(zip(names, w, strict=True)), x[500:]), labels[500:])

    for _ in range(300):
        leaves = [w.requires_grad_() for w in weights]
        weights = [
            (w - 0.3 * g).detach()
            for w, g in zip(leaves, torch.autograd.grad(loss(leaves, x[:500]), leaves), strict=True)
        ]
    leaves = [w.requires_grad_() for w in weights]
    v = list(torch.autograd.grad(val_loss(leaves), leaves))
    inputs = [x[:500]]
    solution = hvp.HessianOperator(loss, weights, *inputs, engine="eager").solve(v, hvp.Neumann(1))
    name = "logistic regression" if hidden is None else f"network 49-{hidden}-10"
    return Problem(name, loss, [w.detach() for w in weights], inputs, v, float("nan"), 1.2 * solution.lambda_max)


def truth(problem: Problem, dtype: torch.dtype, iterations: int) -> Tensor:
    """The sum in float64 for the problem as rounded to `dtype`."""
    weights, inputs, v = problem.rounded(dtype, torch.float64)
    return _flat(plain(product_of(problem.loss, weights, inputs), v, iterations, 1 / problem.largest, "accumulate"))


def product_of(loss: Callable[..., Tensor], weights: Tensors, inputs: Tensors) -> Product:
    """v -> H v by plain double backward over a retained graph."""
    leaves = [w.detach().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves, *inputs), leaves, create_graph=True)
    return lambda v: list(torch.autograd.grad(gradient, leaves, v, retain_graph=True))


def plain(product: Product, v: Tensors, iterations: int, alpha: float, form: str) -> Tensors:
    """The list loop that training scripts have, in the precision of `v`."""
    term, total = list(v), list(v)
    for _ in range(iterations):
        if form == "accumulate":
            term = [t - alpha * p for t, p in zip(term, product(term), strict=True)]
            total = [s + t for s, t in zip(total, term, strict=True)]
        else:
            total = [s + t - alpha * p for s, t, p in zip(total, v, product(total), strict=True)]
    return [alpha * s for s in total]


def ours(problem: Problem, dtype: torch.dtype, iterations: int, form: str, scale: float = 1.0) -> Tensor:
    """By this package; with the loss scaled, the Hessian is, and the result is scaled back."""
    weights, inputs, v = problem.rounded(dtype, dtype)
    operator = hvp.HessianOperator(lambda w, *i: scale * problem.loss(w, *i), weights, *inputs, engine="eager")
    solver = hvp.Neumann(iterations, 1 / (scale * problem.largest), form=form)
    try:
        return scale * _flat(operator.solve([t.float() for t in v], solver).value)
    except hvp.DivergenceError:  # float16 ends at 65,504
        return torch.full((sum(t.numel() for t in v),), float("inf"), dtype=torch.float64)


def by_plain_torch(problem: Problem, dtype: torch.dtype, iterations: int, form: str) -> Tensor:
    weights, inputs, v = problem.rounded(dtype, dtype)
    return _flat(plain(product_of(problem.loss, weights, inputs), v, iterations, 1 / problem.largest, form))


def errors(problem: Problem, dtype: torch.dtype, iterations: int) -> dict[str, float]:
    """Relative error of every method."""
    exact = truth(problem, dtype, iterations)
    found = {form: ours(problem, dtype, iterations, form) for form in FORMS}
    found |= {f"plain torch, {form}": by_plain_torch(problem, dtype, iterations, form) for form in FORMS}
    if dtype == torch.float16:
        found |= {
            f"{form}, loss x {LOSS_SCALE:g}": ours(problem, dtype, iterations, form, LOSS_SCALE) for form in FORMS
        }
    return {name: float((value - exact).norm() / exact.norm()) for name, value in found.items()}


def measure(makers: Iterable[Callable[[int], Problem]], iterations: Sequence[int], seeds: int) -> list[Row]:
    """All rows, of medians over `seeds` random problems of each kind."""
    environment = Environment.of(torch.device("cpu"))
    rows = []
    for make in makers:
        problems = [make(seed) for seed in range(seeds)]
        for dtype in DTYPES:
            for count in iterations:
                samples = [errors(problem, dtype, count) for problem in problems]
                for method in samples[0]:
                    values = [sample[method] for sample in samples]
                    rows.append(
                        Row(
                            problems[0].name,
                            problems[0].condition,
                            str(dtype).removeprefix("torch."),
                            count,
                            method,
                            statistics.median(values),
                            max(values),
                            seeds,
                            environment.device,
                            torch.__version__,
                            environment.commit,
                            environment.date,
                        )
                    )
    return rows


def write(file: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV, all at once or not at all."""
    tables.write(file, Row, rows, ".3e")


def table(rows: Sequence[Row]) -> str:
    """One line for each problem, dtype and number of iterations, one column for each method."""
    methods = list(dict.fromkeys(row.method for row in rows))
    cases: dict[tuple[str, float, str, int], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((f"{row.problem} {row.condition:.0e}", 0.0, row.dtype, row.iterations), {})[row.method] = (
            row.median
        )
    lines = [f"{'problem':<30}{'dtype':<10}{'products':>9}" + "".join(f"{method:>26}" for method in methods)]
    for (problem, _, dtype, count), found in cases.items():
        cells = [f"{found[method]:>26.1e}" if method in found else f"{'':>26}" for method in methods]
        lines.append(f"{problem.removesuffix(' nan'):<30}{dtype:<10}{count:>9}" + "".join(cells))
    return "\n".join(lines)


def markdown(file: Path = FOLDER / "precision.csv", iterations: int = max(ITERATIONS)) -> str:
    """The medians of a results file at one number of products, and where they come from, in Markdown."""
    with file.open(newline="") as lines:
        records = [record for record in csv.DictReader(lines) if int(record["iterations"]) == iterations]
    methods = ["horner", "accumulate", "plain torch, horner", "plain torch, accumulate"]
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        condition = float(record["condition"])
        problem = record["problem"] + (f", condition {condition:,.0f}" if condition == condition else "")
        cases.setdefault((problem, record["dtype"]), {})[record["method"]] = record["median"]
    body = [[*case, *(f"{float(found[method]):.1e}" for method in methods)] for case, found in cases.items()]
    (place,) = {(record["device"], record["torch"], record["date"]) for record in records}
    text = f"{iterations} products; {{}}, torch {{}}, {{}}; medians of {records[0]['seeds']} problems.".format(*place)
    return f"{text}\n\n{grid(['problem', 'weights in', *methods], body)}"


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two problems")
    parser.add_argument("--out", type=Path, default=FOLDER / "precision.csv")
    options = parser.parse_args(arguments)
    makers: list[Callable[[int], Problem]] = [
        lambda seed, condition=condition: quadratic(condition, seed)  # type: ignore[misc]
        for condition in (CONDITIONS[:1] if options.quick else CONDITIONS)
    ]
    makers += [lambda seed: network(None, seed)]
    if not options.quick:
        makers += [lambda seed: network(32, seed)]
    rows = measure(makers, ITERATIONS[:2] if options.quick else ITERATIONS, 1 if options.quick else SEEDS)
    print(table(rows))
    write(options.out, rows)
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
