"""Random, grid and Bayesian search by Optuna: each trial trains from the start with its own hyperparameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.search.problem import Run, SearchResult, TuningProblem
from hvp_engine._support.arguments import check_count
from hvp_engine._support.isolation import isolated
from hvp_engine._support.torch_compat import pytree
from hvp_engine.errors import DivergenceError, HvpError
from hvp_engine.tuning.optimizer_step import Descent, global_norm

OptimizerOf = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
SchedulerOf = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class RandomSearch:
    """Draw hyperparameters uniformly from the box, train with each draw, and return the best.

    Arguments:
        training_steps: steps of one trial, one gradient each; `gradients // training_steps` trials are made.
        weight_optimizer: a function that makes an optimizer from the list of weights.
        seed: for the draws.
        weight_scheduler: a function that makes a learning-rate scheduler from the optimizer; stepped after each step.
        weight_clip: largest norm of the gradient.

    Cost: `training_steps` gradients for each trial. Memory: O(P + H).

    Errors: `ValueError` for a problem without finite bounds, or a budget below one trial; :class:`HvpError` where
    Optuna is not installed; :class:`DivergenceError` if no trial ends with a finite validation loss.

    Source: Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, JMLR 2012.

    >>> import torch
    >>> from baselines.search import RandomSearch, TuningProblem
    >>> train = lambda w, h, batch: ((w - batch) ** 2 + h.exp() * w**2).sum() / 2       # w* = batch / (1 + e^h)
    >>> val = lambda w, h, batch: ((w - batch) ** 2).sum() / 2                          # best at e^h = 2
    >>> batches = [torch.tensor([1.0])], [torch.tensor([1 / 3])]
    >>> problem = TuningProblem(train, val, torch.zeros(1), torch.zeros(1), *batches, bounds=(-3.0, 3.0))
    >>> result = RandomSearch(20, lambda tensors: torch.optim.SGD(tensors, lr=0.2))(problem, 400)
    >>> result.gradients, result.val_loss < 0.01
    (400, True)
    """

    training_steps: int
    weight_optimizer: OptimizerOf
    seed: int = 0
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        sampler = require_optuna().samplers.RandomSampler(seed=self.seed)
        return _Trials(self, problem, gradients).run(sampler)


@dataclass(frozen=True)
class GridSearch:
    """Train with every point of a regular grid over the box, ends included, and return the best.

    Arguments:
        points: on each axis, >= 2: `points ** H` trials for H hyperparameters, all within the budget.
        the rest: as for :class:`RandomSearch`.

    Cost: as for :class:`RandomSearch`.

    Errors: as for :class:`RandomSearch`; `ValueError` for a grid that the budget does not cover.
    """

    points: int
    training_steps: int
    weight_optimizer: OptimizerOf
    seed: int = 0
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        optuna = require_optuna()
        check_count(self.points, "points", least=2)
        trials = _Trials(self, problem, gradients)
        size = self.points ** len(trials.box)
        if size > trials.count:
            raise ValueError(
                f"points: expected a grid that fits into the budget of {trials.count} trials; got {self.points} points "
                f"for each of {len(trials.box)} hyperparameters, {self.points}^{len(trials.box)} trials: use "
                "RandomSearch"
            )
        axes = {
            name: torch.linspace(low, high, self.points, dtype=torch.float64).tolist()
            for name, (low, high) in trials.box.items()
        }
        trials.count = size
        return trials.run(optuna.samplers.GridSampler(axes, seed=self.seed))


@dataclass(frozen=True)
class BayesianOptimization:
    """Try next where a Gaussian process, fitted to the validation losses so far, expects the most improvement.

    Arguments:
        startup_trials: how many random trials come first, >= 1.
        the rest: as for :class:`RandomSearch`.

    Cost: as for :class:`RandomSearch`, and O(T^3) operations and O(T^2) memory for T trials.

    Errors: as for :class:`RandomSearch`.

    Source: Snoek, Larochelle, Adams, Practical Bayesian Optimization of Machine Learning Algorithms, NeurIPS 2012;
    Optuna's `GPSampler`.
    """

    training_steps: int
    weight_optimizer: OptimizerOf
    seed: int = 0
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None
    startup_trials: int = 10

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        check_count(self.startup_trials, "startup_trials")
        sampler = require_optuna().samplers.GPSampler(seed=self.seed, n_startup_trials=self.startup_trials)
        return _Trials(self, problem, gradients).run(sampler)


class _Trials:
    """The trials of one search; `box` maps the name of every hyperparameter's element to its bounds."""

    def __init__(
        self, options: RandomSearch | GridSearch | BayesianOptimization, problem: TuningProblem, gradients: int
    ):
        self.options, self.search = options, Run(problem, gradients)
        steps = check_count(options.training_steps, "training_steps")
        if gradients < steps:
            raise ValueError(
                f"gradients: expected a budget of at least one trial, training_steps={steps}; got {gradients}"
            )
        self.count = gradients // steps
        self.box = dict(_box(self.search))
        self.best: tuple[float, list[Tensor], list[Tensor]] | None = None

    def run(self, sampler: Any) -> SearchResult:
        """Make `count` trials at the points that the sampler suggests."""
        optuna = require_optuna()
        with _quiet(optuna), isolated(self.options.seed, self.search.device):
            study = optuna.create_study(direction="minimize", sampler=sampler)
            study.optimize(self._trial, n_trials=self.count)
        if self.best is None:
            raise DivergenceError(
                f"{type(sampler).__name__}: expected a finite validation loss after some trial; got none in "
                f"{self.count}: use a smaller learning rate, or narrower bounds"
            )
        loss, weights, hyper = self.best
        return self.search.result(weights, hyper, loss)

    def _trial(self, trial: Any) -> float:
        values = [trial.suggest_float(name, low, high) for name, (low, high) in self.box.items()]
        hyper = unflatten(torch.tensor(values, dtype=torch.float64), self.search.hyper)
        weights = [w.clone().requires_grad_() for w in self.search.weights]
        options = self.options
        descent = Descent(
            weights, options.weight_optimizer, options.weight_scheduler, options.weight_clip, "weight", global_norm
        )
        for _ in range(options.training_steps):
            loss = self.search.train_loss(weights, hyper)
            descent.step(loss.detach(), torch.autograd.grad(loss, weights, allow_unused=True))
        loss_here = self.search.validate(weights, hyper)
        if not math.isfinite(loss_here):
            return math.inf
        if self.best is None or loss_here < self.best[0]:
            self.best = loss_here, weights, hyper
        return loss_here


def unflatten(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The elements of a vector in the shapes and dtypes of `like`."""
    parts = values.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape).to(tensor) for part, tensor in zip(parts, like, strict=True)]


def _box(run: Run) -> Iterator[tuple[str, tuple[float, float]]]:
    tree = run.hyper_structure.rebuild(run.hyper)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    for name, tensor, low, high in zip(names, run.hyper, run.bounds.low, run.bounds.high, strict=True):
        if low is None or high is None or not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(
                f"bounds: expected finite bounds of every hyperparameter to draw from; got none for hyper{name}: "
                "pass TuningProblem(bounds=(low, high))"
            )
        pairs = zip(
            low.expand_as(tensor).reshape(-1).tolist(), high.expand_as(tensor).reshape(-1).tolist(), strict=True
        )
        for element, pair in enumerate(pairs):
            yield f"hyper{name}[{element}]", pair


def require_optuna() -> Any:
    """The module, or an error that says how to install it."""
    try:
        import optuna
    except ImportError as error:
        raise HvpError(f"the search needs Optuna ({error}): `pip install optuna scipy`") from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from printing a line for every trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
