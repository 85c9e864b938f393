"""Real problems, trained to their minimum in float64, whose hypergradient is known: to compare methods on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from baselines.methods import Setting
from baselines.search import TuningProblem
from bench.problems import Batch, Tensors
from examples import datasets
from hvp_engine._support.pytree import flatten
from hvp_engine.demo.preparation import standardize
from hvp_engine.diagnostics.hypergradient_check.refitting import Pair, minimize, reference_hypergradient
from hvp_engine.differentiation.problem import Problem
from hvp_engine.solvers.preconditioning import Preconditioner

DTYPE = torch.float64
EXACT_LIMIT = 4000
"""Weights above which no dense inverse is made."""

LINEAR_LIMIT = 30_000_000
"""Numbers above which no linear hypernetwork is made."""

FORWARD_LIMIT = 100
"""Hyperparameters above which forward mode and Gaussian processes are left out."""


@dataclass(frozen=True)
class Comparison:
    """A training loss with one log decay for each weight, and its minimum.

    Attributes:
        name: a key of :data:`PROBLEMS`.
        net: `net(weights, inputs)` -> outputs.
        data_loss: of (outputs, targets).
        start, early, minimum: weights untrained, after some training, and at w*.
        hyper: log decays like the weights.
        train, val: full batches.
        rate: a step that converges, 1 / lambda_max at the minimum.
        condition: lambda_max / lambda_min there, where it is known.
        preconditioner: the Hessian's diagonal at w*, inverted, by 10 random probes.
        reference: dL_V*/dlambda at w*, in float64.
        residual: of the solve behind it.
    """

    name: str
    net: Callable[[Tensors, Tensor], Tensor]
    data_loss: Callable[[Tensor, Tensor], Tensor]
    start: Tensors
    early: Tensors
    minimum: Tensors
    hyper: Tensors
    train: Batch
    val: Batch
    rate: float
    condition: float | None
    preconditioner: Preconditioner | None
    reference: Tensor
    residual: float

    @property
    def weight_count(self) -> int:
        return sum(w.numel() for w in self.minimum.values())

    def model(self, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        return self.net(weights, batch[0])

    def loss_of_outputs(self, outputs: Tensor, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        """The data term and sum(e^h w^2) / 2; one h may stand for all."""
        decays = [(hyper.get(n, hyper.get("all")).exp() * w.square()).sum() for n, w in weights.items()]
        return self.data_loss(outputs, batch[1]) + torch.stack(decays).sum() / 2

    def train_loss(self, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        return self.loss_of_outputs(self.model(weights, hyper, batch), weights, hyper, batch)

    def val_loss(self, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        return self.data_loss(self.net(weights, batch[0]), batch[1])

    def setting(self) -> Setting:
        """What the registry makes methods from."""
        return Setting(
            self.train_loss, self.val_loss, self.rate, self.model, self.loss_of_outputs, self.preconditioner, scale=0.5
        )

    def search_problem(self, one_decay: bool) -> TuningProblem:
        """The same problem from untrained weights, with one log decay for all weights, or one for each."""
        hyper = {"all": torch.tensor(-3.0, dtype=DTYPE)} if one_decay else self.hyper
        return TuningProblem(
            self.train_loss, self.val_loss, self.start, hyper, [self.train], [self.val], bounds=(-9.0, 3.0)
        )


@dataclass(frozen=True)
class Recipe:
    """How to make a problem: data in float64, a module, the log decay, and steps of Adam to the early weights."""

    data: Callable[[], tuple[Batch, Batch]]
    module: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    log_decay: float
    early_steps: int = 30
    early_rate: float = 0.02


def _boston(raw: bool) -> tuple[Batch, Batch]:
    table = datasets.boston()
    order = torch.randperm(len(table.targets), generator=torch.Generator().manual_seed(0))
    features, targets = table.features[order], table.targets[order, None]
    train, val = slice(0, 300), slice(300, None)
    x_train, x_val = features[train], features[val]
    if not raw:
        x_train, x_val = standardize(x_train, x_val)
        (targets,) = standardize(targets)
    return (x_train, targets[train]), (x_val, targets[val])


def _digits(pool: int) -> tuple[Batch, Batch]:
    digits = datasets.digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:2000]
    images, labels = F.avg_pool2d(digits.images[order], pool).to(DTYPE), digits.labels[order]
    train, val = standardize(images[:1000], images[1000:], dims=(0, 1, 2, 3))
    return (train, labels[:1000]), (val, labels[1000:])


def _half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2  # F.mse_loss has no second derivative in forward mode


PROBLEMS = {
    "boston": Recipe(lambda: _boston(raw=False), lambda: nn.Linear(13, 1), _half_square, -7.0),
    "boston-raw": Recipe(lambda: _boston(raw=True), lambda: nn.Linear(13, 1), _half_square, -7.0),
    "mnist-logistic": Recipe(
        lambda: _digits(1), lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), F.cross_entropy, -4.0
    ),
    "mnist-mlp": Recipe(
        lambda: _digits(2),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 12), nn.Tanh(), nn.Linear(12, 10)),
        F.cross_entropy, -4.0, early_steps=60,
    ),
    "mnist-conv": Recipe(
        lambda: _digits(2),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10)),
        F.cross_entropy, -4.0, early_steps=60,
    ),
}  # fmt: skip


def untrained(name: str, examples: int | None = None) -> Comparison:
    """The problem `name` before training: all weights are those of the start, and there is no reference.

    With `examples` it has the first so many to train and to validate on.
    """
    recipe = PROBLEMS[name]
    train, val = ((inputs[:examples], targets[:examples]) for inputs, targets in recipe.data())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = recipe.module().to(DTYPE)
    start = {n: w.detach() for n, w in module.named_parameters()}
    hyper = {n: torch.full_like(w, recipe.log_decay) for n, w in start.items()}
    return Comparison(
        name, hvp.functional(module), recipe.loss, start, start, start, hyper, train, val, 1.0, None, None,
        torch.zeros(0), 0.0,
    )  # fmt: skip


@cache
def build(name: str, examples: int | None = None) -> Comparison:
    """The problem `name`, trained to its minimum in float64; the same numbers at every call."""
    recipe, blank = PROBLEMS[name], untrained(name, examples)
    early = _trained(blank, lambda w: torch.optim.Adam(w, lr=recipe.early_rate), recipe.early_steps)
    near = _trained(replace(blank, start=early), lambda w: torch.optim.LBFGS(w, max_iter=500, history_size=50), 1)
    pair = _pair(blank, near)
    pair = pair.at(minimize(pair))
    minimum = dict(zip(blank.start, pair.weights, strict=True))
    operator = hvp.HessianOperator(blank.train_loss, minimum, blank.hyper, blank.train, engine="eager")
    preconditioner = hvp.JacobiPreconditioner(operator)
    largest, condition = _extremes(operator, blank.weight_count)
    if condition is not None:
        reference, residual = _dense_reference(operator, pair)
    else:
        reference, solve = reference_hypergradient(pair)
        residual = solve.residuals[-1]
    return replace(
        blank, early=early, minimum=minimum, rate=1 / largest, condition=condition, preconditioner=preconditioner,
        reference=reference, residual=residual,
    )  # fmt: skip


def _trained(problem: Comparison, optimizer_of: Any, steps: int) -> Tensors:
    weights = {n: w.clone().requires_grad_() for n, w in problem.start.items()}
    optimizer = optimizer_of(list(weights.values()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.train_loss(weights, problem.hyper, problem.train)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return {n: w.detach() for n, w in weights.items()}


def _pair(problem: Comparison, weights: Tensors) -> Pair:
    point = (*flatten(dict(weights), "weights"), *flatten(dict(problem.hyper), "hyper"))
    return Pair(
        Problem(problem.train_loss, *point, (problem.train,), "train_loss"),
        Problem(problem.val_loss, *point, (problem.val,), "val_loss"),
        seed=0,
    )


def _extremes(operator: hvp.HessianOperator, size: int) -> tuple[float, float | None]:
    """lambda_max, and the condition number where the matrix is small enough to look at."""
    if size <= EXACT_LIMIT:
        values = torch.linalg.eigvalsh(operator.dense())
        return float(values[-1]), float(values[-1] / values[0])
    v = {n: torch.ones_like(g) for n, g in operator.gradient.items()}
    for _ in range(60):  # power iteration: from below, so a margin of 2 % keeps the step safe
        v = operator @ v
        norm = torch.linalg.vector_norm(torch.cat([t.reshape(-1) for t in v.values()]))
        v = {n: t / norm for n, t in v.items()}
    return 1.02 * float(norm), None


def _dense_reference(operator: hvp.HessianOperator, pair: Pair) -> tuple[Tensor, float]:
    """The theorem with a dense solve by LU, and the relative residual of that."""
    v, direct = pair.gradient(pair.val)
    matrix = operator.dense()
    x = torch.linalg.solve(matrix, v)
    residual = torch.linalg.vector_norm(matrix @ x - v) / torch.linalg.vector_norm(v)
    parts = [p.reshape(w.shape) for p, w in zip(x.split([w.numel() for w in pair.weights]), pair.weights, strict=True)]
    mixed = pair.linearization().mixed(parts)
    indirect = [torch.zeros_like(h) if m is None else m for m, h in zip(mixed, pair.hyper, strict=True)]
    return direct - torch.cat([m.reshape(-1) for m in indirect]), float(residual)
