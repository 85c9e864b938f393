"""Algorithm 1 in the form of a search, so that it can be compared with the others on the same problem and budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baselines.search.problem import Loss, Run, SearchResult, TuningProblem
from baselines.search.trials import OptimizerOf, SchedulerOf
from hvp_engine._support.arguments import check_count
from hvp_engine._support.isolation import isolated
from hvp_engine.hypergradients.estimator import Estimator
from hvp_engine.tuning import Tuner


@dataclass(frozen=True)
class HypergradientDescent:
    """Alternate training steps and steps along a hypergradient by :class:`hvp_engine.Tuner`.

    Arguments:
        estimator: a function that makes an estimator from (train_loss, val_loss).
        cost: how many gradients one call of it counts as, >= 1: 3 + 2 i for i Hessian-vector products.
        weight_optimizer, hyper_optimizer: functions that make an optimizer from a list of tensors.
        inner_steps: training steps before each hyper step.
        warmup_steps: training steps before the first.
        seed: for dropout masks.
        weight_scheduler: a function that makes a learning-rate scheduler from the weights' optimizer.
        weight_clip: largest norm of the weights' gradient.

    Memory: that of the estimator.

    Errors: `ValueError` for a budget below one round; those of :class:`Tuner`.

    Source: Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2019,
    Algorithm 1.

    >>> import torch, hvp_engine as hvp
    >>> from baselines.search import HypergradientDescent, TuningProblem
    >>> train = lambda w, h, batch: ((w - batch) ** 2 + h.exp() * w**2).sum() / 2       # w* = batch / (1 + e^h)
    >>> val = lambda w, h, batch: ((w - batch) ** 2).sum() / 2                          # best at e^h = 2
    >>> batches = [torch.tensor([1.0])], [torch.tensor([1 / 3])]
    >>> problem = TuningProblem(train, val, torch.zeros(1), torch.zeros(1), *batches, bounds=(-3.0, 3.0))
    >>> sgd, adam = (lambda t: torch.optim.SGD(t, lr=0.2)), (lambda t: torch.optim.Adam(t, lr=0.1))
    >>> estimator = lambda train, val: hvp.Hypergradient(train, val, hvp.Neumann(5))
    >>> search = HypergradientDescent(estimator, 3 + 2 * 5, sgd, adam, inner_steps=10, warmup_steps=50)
    >>> search(problem, 1500).hyper.exp().round(decimals=1)
    tensor([2.])
    """

    estimator: Callable[[Loss, Loss], Estimator]
    cost: int
    weight_optimizer: OptimizerOf
    hyper_optimizer: OptimizerOf
    inner_steps: int = 5
    warmup_steps: int = 0
    seed: int = 0
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        run = Run(problem, gradients)
        check_count(self.cost, "cost", what="the gradients that a call counts as")
        tuner = Tuner(
            run.weight_structure.rebuild(run.weights),
            run.hyper_structure.rebuild(run.hyper),
            problem.train_loss,
            problem.val_loss,
            weight_optimizer=self.weight_optimizer,
            hyper_optimizer=self.hyper_optimizer,
            inner_steps=self.inner_steps,
            warmup_steps=self.warmup_steps,
            weight_scheduler=self.weight_scheduler,
            weight_clip=self.weight_clip,
            bounds=problem.bounds,
            estimator=self.estimator(problem.train_loss, problem.val_loss),
        )
        first = tuner.steps_to_go + self.cost
        if gradients < first:
            raise ValueError(
                f"gradients: expected a budget of at least one round, warmup_steps + inner_steps + cost = {first}; "
                f"got {gradients}"
            )
        with isolated(self.seed, run.device):
            while run.spent + tuner.steps_to_go + self.cost <= gradients:
                run.training_gradients += tuner.steps_to_go + self.cost - 1
                run.validation_gradients += 1
                tuner.fit(problem.train_batches, problem.val_batches, tuner.hyper_steps + 1, progress=False)
                if run.look_is_due:
                    run.validate(run.weights, run.hyper)
            return run.result(run.weights, run.hyper, run.validate(run.weights, run.hyper))
