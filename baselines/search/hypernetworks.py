"""Searches that train a model of the best response along with the hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.estimators.responses import LinearResponse, Response, StructuredResponse
from baselines.search.problem import Kind, Point, Run, SearchResult, TuningProblem
from baselines.search.trials import OptimizerOf, SchedulerOf, unflatten
from hvp_engine._support.arguments import check_count, check_not_negative, check_positive
from hvp_engine._support.isolation import isolated
from hvp_engine.tuning.optimizer_step import Descent, global_norm


@dataclass(frozen=True)
class LinearHypernetwork:
    """Alternate: fit a linear w_phi(lambda + eps) to the training loss, and move lambda along dL_V(w_phi(lambda)).

    Perturbed hyperparameters stay within the problem's bounds. As published, one perturbation serves a whole batch, so
    the gradient of phi is noisy even on all examples, and steps of a fixed size, such as Adam's, do not settle: use a
    smaller learning rate than for the weights alone, or a `weight_scheduler`. (Softmax regression on 1,000 digits, one
    decay: with Adam at 0.02 the validation loss falls to 0.44 but ends at 1.30; at 0.005 it falls to 0.40 and ends at
    0.41.)

    Arguments:
        weight_optimizer: a function that makes an optimizer from phi, a list of tensors.
        hyper_optimizer: the same for lambda.
        scale: standard deviation of the perturbations eps, > 0.
        inner_steps: steps of phi before each step of lambda.
        warmup_steps: steps of phi before the first of these.
        seed: for perturbations and dropout masks.
        weight_scheduler: a function that makes a learning-rate scheduler from phi's optimizer; stepped after each step.
        weight_clip: largest norm of the gradient of phi.

    Cost: one gradient for each step of phi or lambda. Memory: O(P H).

    Errors: `TypeError`/`ValueError` naming the argument.

    Source: Lorraine and Duvenaud, Stochastic Hyperparameter Optimization through Hypernetworks, 2018, Algorithm 3 (the
    local form).

    >>> import torch
    >>> from baselines.search import LinearHypernetwork, TuningProblem
    >>> train = lambda w, h, batch: ((w - batch) ** 2 + h.exp() * w**2).sum() / 2       # w* = batch / (1 + e^h)
    >>> val = lambda w, h, batch: ((w - batch) ** 2).sum() / 2                          # best at e^h = 2
    >>> batches = [torch.tensor([1.0])], [torch.tensor([1 / 3])]
    >>> problem = TuningProblem(train, val, torch.zeros(1), torch.zeros(1), *batches, bounds=(-3.0, 3.0))
    >>> sgd, adam = (lambda t: torch.optim.SGD(t, lr=0.2)), (lambda t: torch.optim.Adam(t, lr=0.1))
    >>> LinearHypernetwork(sgd, adam)(problem, 1000).hyper.exp().round(decimals=1)
    tensor([2.])
    """

    weight_optimizer: OptimizerOf
    hyper_optimizer: OptimizerOf
    scale: float = 0.1
    inner_steps: int = 5
    warmup_steps: int = 0
    seed: int = 0
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        return _Descent(self, LinearResponse, None).run(problem, gradients)


@dataclass(frozen=True)
class SelfTuningNetwork:
    """Alternate: fit the structured w_phi(lambda + eps) to the training loss, and move lambda and the scales of eps.

    phi descends E_eps L_T(w_phi(lambda + eps), lambda + eps); lambda and the scales descend
    E_eps L_V(w_phi(lambda + eps), lambda + eps) - entropy_weight H[eps]. eps is normal with one standard deviation for
    each hyperparameter, and H = sum log(scale) up to a constant. Without the entropy term the scales would shrink until
    the response is fitted at a single point; with a large one they grow until it fits nowhere. Perturbed
    hyperparameters stay within the problem's bounds, and a scale within a quarter of the distance between its bounds:
    the entropy pulls on every scale alike, while a scale's influence on the loss falls with the number of
    hyperparameters, so with many of them nothing else would stop its growth. Far from lambda the loss is steeper in
    phi: there plain gradient descent needs a smaller learning rate, or `weight_clip`.

    As published, every example of a batch has its own perturbation and so its own weights, which gives gradients less
    variance. The losses then have to be means over the examples of a batch (a decay beside the mean is fine), without
    BatchNorm in training mode, and made of operations that `torch.func.vmap` supports; for other losses use
    `perturbations=1`.

    Arguments:
        scale: the initial standard deviation of each perturbation, > 0.
        entropy_weight: tau, >= 0.
        perturbations: how many are drawn for a batch: None for one per example; a number n for one for each of n equal
            parts of the batch, which takes less memory and time.
        the rest: as for :class:`LinearHypernetwork`.

    Cost: one gradient for each step of phi or lambda. Memory: O((P + H) K) for K units, and the weights once for each
    perturbation. (MacKay et al. avoid these copies by two forward passes of their own layers with shared weights; here
    the loss may be any function of the weights.)

    Errors: `TypeError`/`ValueError` naming the argument; whatever vmap raises for a loss that it does not support.

    Source: MacKay, Vicol, Lorraine, Duvenaud, Grosse, Self-Tuning Networks, ICLR 2019, Algorithm 1.
    """

    weight_optimizer: OptimizerOf
    hyper_optimizer: OptimizerOf
    scale: float = 0.5
    entropy_weight: float = 1e-3
    inner_steps: int = 2
    warmup_steps: int = 0
    seed: int = 0
    perturbations: int | None = None
    weight_scheduler: SchedulerOf | None = None
    weight_clip: float | None = None

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult:
        check_not_negative(self.entropy_weight, "entropy_weight")
        parts = self.perturbations
        if parts is not None:
            check_count(parts, "perturbations", what="those of a batch, or None for one of each example")
        return _Descent(self, StructuredResponse, self.entropy_weight, parts).run(problem, gradients)


class _Descent:
    """The alternation that both share. With an entropy weight the scales are tuned too, and lambda is perturbed."""

    def __init__(
        self,
        options: LinearHypernetwork | SelfTuningNetwork,
        response: Callable[[Sequence[Tensor], int], Response],
        entropy_weight: float | None,
        perturbations: int | None = 1,
    ):
        check_positive(options.scale, "scale")
        check_count(options.inner_steps, "inner_steps")
        check_count(options.warmup_steps, "warmup_steps", least=0)
        self.options, self.make_response, self.entropy_weight = options, response, entropy_weight
        self.perturbations = perturbations

    def run(self, problem: TuningProblem, gradients: int) -> SearchResult:
        """Alternate until the budget does not cover another round."""
        options, run = self.options, Run(problem, gradients)
        if gradients < options.warmup_steps + options.inner_steps + 1:
            raise ValueError(
                f"gradients: expected a budget of at least warmup_steps + inner_steps + 1 = "
                f"{options.warmup_steps + options.inner_steps + 1}; got {gradients}"
            )
        with isolated(options.seed, run.device):
            start = torch.cat([h.reshape(-1) for h in run.hyper])
            center = start.clone().requires_grad_()
            log_scale = torch.full_like(start, math.log(options.scale)).requires_grad_()
            response = self.make_response(run.weights, len(start))
            fit = Descent(
                response.parameters,
                options.weight_optimizer,
                options.weight_scheduler,
                options.weight_clip,
                "weight",
                global_norm,
            )
            moving = [center] if self.entropy_weight is None else [center, log_scale]
            move = Descent(moving, options.hyper_optimizer, None, None, "hyper", global_norm)
            steps = options.warmup_steps + options.inner_steps
            while run.spent + steps + 1 <= run.budget:
                for _ in range(steps):
                    _step(fit, self._perturbed("train", run, response, start, center.detach(), log_scale.detach()))
                _step(move, self._objective(run, response, start, center, log_scale))
                self._project(run, center, log_scale)
                steps = options.inner_steps
                if run.look_is_due:
                    run.validate(*_at(run, response, start, center))
            weights, hyper = _at(run, response, start, center)
            result = run.result(weights, hyper, run.validate(weights, hyper))
        if self.entropy_weight is None:
            return result
        scales = unflatten(log_scale.detach().exp(), run.hyper)
        return replace(result, scales=run.hyper_structure.rebuild(scales))

    def _objective(self, run: Run, response: Response, start: Tensor, center: Tensor, log_scale: Tensor) -> Tensor:
        """What a step of lambda (and of the scales) decreases."""
        if self.entropy_weight is None:
            return run.val_loss(response(center - start), unflatten(center, run.hyper))
        loss = self._perturbed("val", run, response, start, center, log_scale)
        return loss - self.entropy_weight * log_scale.sum()

    def _perturbed(
        self,
        kind: Kind,
        run: Run,
        response: Response,
        start: Tensor,
        center: Tensor,
        log_scale: Tensor,
    ) -> Tensor:
        """The loss of the next batch at w_phi(lambda + eps) and lambda + eps, clamped to the bounds."""
        low, high = run.flat_bounds

        def at(noise: Tensor) -> Point:
            point = torch.clamp(center + log_scale.exp() * noise, low, high)
            return response(point - start), unflatten(point, run.hyper)

        return run.perturbed_loss(kind, at, len(center), self.perturbations)

    @torch.no_grad()
    def _project(self, run: Run, center: Tensor, log_scale: Tensor) -> None:
        """Clamp lambda to its bounds, and each scale to a quarter of the distance between them."""
        low, high = run.flat_bounds
        center.clamp_(low, high)
        log_scale.clamp_(max=((high - low) / 4).log())


def _at(run: Run, response: Response, start: Tensor, center: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and hyperparameters without a perturbation."""
    with torch.no_grad():
        return response(center - start), unflatten(center, run.hyper)


def _step(descent: Descent, loss: Tensor) -> None:
    grads = torch.autograd.grad(loss, descent.tensors, materialize_grads=True, allow_unused=True)
    descent.step(loss.detach(), grads)
