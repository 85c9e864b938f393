"""The searches of Tab. 4 for the hyperparameters of a :class:`RegularizedLSTM`, without hypergradients.

Each spends `budget` gradients. Random, grid and Bayesian search divide it into `trials` trainings. The grid has a
single rate for all five, since 2^7 trainings would exceed the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines import search as searches
from examples.regularized_lstm import RATES, RegularizedLSTM, Settings
from examples.training import last_quarter


def search(
    problem: RegularizedLSTM, settings: Settings, name: str, budget: int, seed: int
) -> tuple[int, searches.SearchResult]:
    """How many hyperparameters the search called `name` has, and what it finds starting from the problem's weights."""
    hyper, train_loss = dict(problem.seven), problem.train_loss
    if name == "grid search":
        hyper = {"rate": problem.seven["input"]}

        def train_loss(weights: dict[str, Tensor], hyper: Mapping[str, Tensor], batch: Tensor) -> Tensor:
            return problem.train_loss(weights, dict.fromkeys(RATES, hyper["rate"]), batch)

    every = max(1, len(problem.validation) // settings.search_batches)
    task = searches.TuningProblem(
        train_loss,
        problem.val_loss,
        dict(problem.module.named_parameters()),
        hyper,
        problem.train,
        problem.validation[::every],
        problem.bounds(hyper, settings.rate_bounds, settings.strength_bounds),
    )
    return len(hyper), _method(settings, name, budget, seed)(task, budget)


def _method(settings: Settings, name: str, budget: int, seed: int) -> searches.Search:
    trial_steps = budget // settings.trials
    options = {
        "weight_optimizer": lambda tensors: torch.optim.SGD(tensors, lr=settings.learning_rate),
        "weight_clip": settings.clip,
        "seed": seed,
    }
    trial = options | {"training_steps": trial_steps, "weight_scheduler": last_quarter(trial_steps)}
    make: dict[str, Callable[[], searches.Search]] = {
        "random search": lambda: searches.RandomSearch(**trial),
        "grid search": lambda: searches.GridSearch(points=settings.trials, **trial),
        "Bayesian optimization": lambda: searches.BayesianOptimization(
            startup_trials=max(1, settings.trials // 2), **trial
        ),
        "self-tuning network": lambda: searches.SelfTuningNetwork(
            perturbations=1,  # one for each row would need as many networks as rows
            hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=settings.stn_learning_rate),
            weight_scheduler=last_quarter(2 * budget // 3),
            **options,
        ),
    }
    return make[name]()
