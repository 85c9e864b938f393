"""Fig. 3: the error of a hypergradient for each way to invert the Hessian, against the exact inverse.

A linear network on the Boston housing data has one decay for each weight, in float64, at its exact minimum w*. There

    H = 2/n X^T X + diag(exp lambda),   w* = H^-1 2/n X^T y,   dL_V*/dlambda = -exp(lambda) w* H^-1 dL_V/dw

is exact, computed by a dense solve outside the package. The paper's left plot has the products of the Neumann series
and of conjugate gradients; its right plot has hyper steps, with a separate descent for each way to invert. Raw inputs
are the hard case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import hvp_engine as hvp
from examples import datasets
from examples.experiment import Experiment, Run
from hvp_engine.demo.preparation import standardize

FIXED_ALPHA = 1e-3
"""The step that is also tried on raw inputs."""


@dataclass(frozen=True)
class Settings:
    log_decay: float = -7.0
    products: tuple[int, ...] = tuple(range(31))
    hyper_steps: int = 100
    hyper_learning_rate: float = 2e-2


class Problem:
    """The mean squared error of a linear network with bias; half of the rows train it and half validate."""

    def __init__(self, folder: Any, seed: int, standardized: bool, device: torch.device):
        table = datasets.boston(folder)
        order = torch.randperm(len(table.targets), generator=torch.Generator().manual_seed(seed))
        halves = order.split((len(order) + 1) // 2)
        features = [table.features[half] for half in halves]
        targets = [table.targets[half] for half in halves]
        if standardized:
            features, targets = list(standardize(*features)), list(standardize(*targets))
        inputs = [torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1).to(device) for x in features]
        self.train, self.validation = zip(inputs, (y.to(device) for y in targets), strict=True)

    @staticmethod
    def val_loss(weights: Tensor, log_decays: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error."""
        inputs, targets = batch
        return (inputs @ weights - targets).square().mean()

    def train_loss(self, weights: Tensor, log_decays: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error + 1/2 sum_i exp(log_decay_i) w_i^2."""
        return self.val_loss(weights, log_decays, batch) + (log_decays.exp() * weights.square()).sum() / 2

    def hessian(self, log_decays: Tensor) -> Tensor:
        """The Hessian of the training loss."""
        inputs, _ = self.train
        return 2 / len(inputs) * inputs.T @ inputs + log_decays.exp().diag()

    def minimum(self, log_decays: Tensor) -> Tensor:
        """w*."""
        inputs, targets = self.train
        return torch.linalg.solve(self.hessian(log_decays), 2 / len(inputs) * inputs.T @ targets)

    def truth(self, log_decays: Tensor) -> Tensor:
        """dL_V*/dlambda."""
        weights = self.minimum(log_decays)
        inputs, targets = self.validation
        gradient = 2 / len(inputs) * inputs.T @ (inputs @ weights - targets)
        return -log_decays.exp() * weights * torch.linalg.solve(self.hessian(log_decays), gradient)

    def start(self, log_decay: float) -> Tensor:
        """Equal log-decays."""
        return torch.full_like(self.train[0][0], log_decay)

    def condition(self, log_decays: Tensor) -> float:
        """The condition number of the Hessian."""
        return float(torch.linalg.cond(self.hessian(log_decays)))

    def hypergradient(self, solver: Any) -> hvp.Hypergradient:
        return hvp.Hypergradient(self.train_loss, self.val_loss, solver=solver)

    def estimate(self, hypergradient: hvp.Hypergradient, log_decays: Tensor) -> Tensor:
        """The hypergradient at w*; NaN where the solver says that it diverged."""
        try:
            return hypergradient(self.minimum(log_decays), log_decays, self.train, self.validation).grads
        except hvp.DivergenceError:
            return torch.full_like(log_decays, torch.nan)


def errors(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    """Cosine similarity, and distance relative to the norm of the exact hypergradient."""
    cosine = torch.nn.functional.cosine_similarity(estimate, truth, dim=0)
    return {"cosine": float(cosine), "distance": float((estimate - truth).norm() / truth.norm())}


def by_products(problem: Problem, settings: Settings, fixed_alpha: bool, bar: Any) -> list[dict[str, Any]]:
    """Errors by the number of products."""
    log_decays = problem.start(settings.log_decay)
    truth = problem.truth(log_decays)
    rows = []
    for count in settings.products:
        solvers = {"Neumann": hvp.Neumann(count), "CG": hvp.ConjugateGradient(count, tol=0.0)}
        if fixed_alpha:
            solvers[f"Neumann, alpha {FIXED_ALPHA:g}"] = hvp.Neumann(count, alpha=FIXED_ALPHA)
        for name, solver in solvers.items():
            found = errors(problem.estimate(problem.hypergradient(solver), log_decays), truth)
            rows.append({"solver": name, "products": count} | found)
        bar.update()
    return rows


def by_hyper_steps(problem: Problem, settings: Settings, bar: Any) -> list[dict[str, Any]]:
    """Errors during descents of the validation loss, each along its own hypergradients, always at w*."""
    solvers = {f"{count} Neumann": hvp.Neumann(count) for count in (0, 1, 5, 20)} | {"20 CG": hvp.ConjugateGradient(20)}
    rows = []
    for name, solver in solvers.items():
        hypergradient = problem.hypergradient(solver)
        log_decays = problem.start(settings.log_decay)
        optimizer = torch.optim.RMSprop([log_decays], lr=settings.hyper_learning_rate)
        for step in range(settings.hyper_steps):
            truth, estimate = problem.truth(log_decays), problem.estimate(hypergradient, log_decays)
            loss = float(problem.val_loss(problem.minimum(log_decays), log_decays, problem.validation))
            rows.append({"solver": name, "hyper_step": step, "val_loss": loss} | errors(estimate, truth))
            log_decays.grad = estimate
            optimizer.step()
            bar.update()
            bar.set_postfix(val=f"{loss:.4f}", refresh=False)
    return rows


def run(run: Run, settings: Settings) -> None:
    standardized, raw = (
        Problem(run.options.data, run.options.seed, scaled, run.options.device) for scaled in (True, False)
    )
    with run.progress("errors by products", 2 * len(settings.products)) as bar:
        curves = {
            "standardized": by_products(standardized, settings, False, bar),
            "raw": by_products(raw, settings, True, bar),
        }
    with run.progress("errors by hyper steps", 5 * settings.hyper_steps) as bar:
        curves["hyper_steps"] = by_hyper_steps(standardized, settings, bar)
    for name, rows in curves.items():
        run.table(name, rows)
    conditions = {
        "standardized": standardized.condition(standardized.start(settings.log_decay)),
        "raw": raw.condition(raw.start(settings.log_decay)),
    }
    run.picture("inversion_error", draw(curves, conditions))
    for name, condition in conditions.items():
        run.compare(f"{name} inputs: condition", f"{condition:.3g}")
        for count in sorted({1, 5, 20, settings.products[-1]} & set(settings.products)):
            found = [
                f"{row['solver']} {row['cosine']:.4f}, {row['distance']:.1e}"
                if math.isfinite(row["distance"])
                else f"{row['solver']} diverged"
                for row in curves[name]
                if row["products"] == count
            ]
            what = f"{name} inputs, {count} HVPs: cosine, relative distance"
            run.compare(what, "; ".join(found))
    for solver in dict.fromkeys(row["solver"] for row in curves["hyper_steps"]):
        found = [row for row in curves["hyper_steps"] if row["solver"] == solver]
        first, last = found[0], found[-1]
        run.compare(
            f"{solver}, first and last of {len(found)} hyper steps: cosine; relative distance; validation loss",
            "; ".join(f"{first[key]:.4g}, {last[key]:.4g}" for key in ("cosine", "distance", "val_loss")),
        )
    _judge(run, curves)


def _judge(run: Run, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Check the paper's claim: Neumann often has the greater cosine, CG the smaller distance."""
    for name in ("standardized", "raw"):
        neumann, cg = ([row for row in curves[name] if row["solver"] == solver] for solver in ("Neumann", "CG"))
        pairs = [pair for pair in zip(neumann, cg, strict=True) if pair[0]["products"] > 0]
        cosine = sum(a["cosine"] > b["cosine"] + 1e-9 for a, b in pairs)
        distance = sum(b["distance"] < a["distance"] for a, b in pairs)
        run.compare(f"{name}: Neumann has the greater cosine", f"at {cosine} of {len(pairs)} counts", "often")
        run.compare(f"{name}: CG has the smaller distance", f"at {distance} of {len(pairs)} counts", "yes")
    run.note(
        "The conjugate gradients of the paper's public code were faulty; these agree with the dense inverse to "
        "rounding once they have made about as many products as there are weights (raw inputs: twice as many)."
    )


def draw(curves: dict[str, list[dict[str, Any]]], conditions: dict[str, float]) -> Figure:
    """Draw cosine above and distance below, by products (standardized, raw) and by hyper steps."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    columns = (
        ("standardized", "products", "products with the Hessian"),
        ("raw", "products", "products with the Hessian"),
        ("hyper_steps", "hyper_step", "hyper steps"),
    )
    for column, (name, x, label) in enumerate(columns):
        for number, solver in enumerate(dict.fromkeys(row["solver"] for row in curves[name])):
            rows = [row for row in curves[name] if row["solver"] == solver]
            steps = [row[x] for row in rows]
            style = {"color": f"C{number}", "lw": 1.6, "label": solver, "marker": "o" if x == "products" else None}
            axes[0, column].plot(steps, [row["cosine"] for row in rows], ms=3, **style)
            axes[1, column].semilogy(steps, [max(row["distance"], 1e-16) for row in rows], ms=3, **style)
        title = f"{name} inputs, condition {conditions[name]:.2g}" if name in conditions else "standardized inputs"
        axes[0, column].set(title=title, ylabel="cosine similarity")
        axes[1, column].set(xlabel=label, ylabel="relative distance")
        if name == "hyper_steps":  # far from zero, but for conjugate gradients
            axes[1, column].set(yscale="linear", ylim=(-0.05, 1.3))
        axes[0, column].legend(frameon=False, fontsize=8)
        for axis in axes[:, column]:
            axis.grid(alpha=0.25)
    figure.suptitle("Hypergradients of a linear network on Boston housing, against the exact inverse Hessian")
    return figure


EXPERIMENT = Experiment(
    name="inversion_error",
    source="Fig. 3",
    title="hypergradient error by products and by hyper steps",
    run=run,
    sizes={"small": Settings(), "paper": Settings(hyper_steps=1000)},
)
