"""The hypergradient through a model of the best response that is fitted around the current hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from baselines.estimators.responses import LinearResponse, Response
from hvp_engine._support.arguments import check_count, check_positive
from hvp_engine._support.flat_vector import detached, norm_of
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.problem import Problem
from hvp_engine.hypergradients.estimator import Estimate, Estimator

Loss = Callable[[Any, Any, Any], Tensor]


class FittedResponse(Estimator):
    """dL_V/dlambda + dL_V/dw dw_phi/dlambda, where w_phi minimizes the training loss for hyperparameters around lambda.

    Each call trains phi anew, starting from the given weights and a constant response, by `steps` steps on
    E_eps L_T(w_phi(lambda + eps), lambda + eps), where eps is normal with standard deviation `scale`. The search
    :class:`baselines.search.LinearHypernetwork` keeps phi between hyper steps instead.

    Arguments:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor.
        steps: training steps of phi, each one gradient.
        optimizer: a function that makes an optimizer from phi, a list of tensors.
        scale: standard deviation of the perturbations, > 0.
        response: the form of w_phi, `LinearResponse` or `StructuredResponse`.

    Usable as `Tuner(estimator=...)`; changes nothing of the caller's. Every step draws its own perturbations and
    dropout masks, and so does every call.

    Cost: steps + 1 gradients. Memory: phi, three times with Adam.

    Errors: `TypeError`/`ValueError` naming the argument.

    Source: Lorraine and Duvenaud, Stochastic Hyperparameter Optimization through Hypernetworks, 2018; the
    hypernetworks in Table 1 of Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit
    Differentiation, 2019.

    >>> import torch
    >>> from baselines.estimators import FittedResponse
    >>> train = lambda w, h, batch: ((w - 3 * h) ** 2).sum() / 2           # w* = 3 h
    >>> val = lambda w, h, batch: w.sum()
    >>> fitted = FittedResponse(train, val, 200, lambda phi: torch.optim.SGD(phi, lr=0.3), scale=1.0)
    >>> fitted(torch.zeros(1), torch.tensor(2.0), None, None).grads.round(decimals=3)
    tensor(3.)
    """

    def __init__(
        self,
        train_loss: Loss,
        val_loss: Loss,
        steps: int,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
        *,
        scale: float,
        response: Callable[[Sequence[Tensor], int], Response] = LinearResponse,
    ):
        for name, function in (("train_loss", train_loss), ("val_loss", val_loss), ("optimizer", optimizer)):
            if not callable(function):
                raise TypeError(f"{name}: expected a function; got {type(function).__name__}: define one")
        check_count(steps, "steps", what="the training steps of the response")
        check_positive(scale, "scale")
        self.train_loss, self.val_loss, self.steps = train_loss, val_loss, steps
        self.optimizer, self.scale, self.response = optimizer, scale, response
        self.draws = Draws()

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        weight_list, weight_structure = flatten(weights, "weights")
        hyper_list, hyper_structure = flatten(hyper, "hyper")
        point = (weight_list, weight_structure, hyper_list, hyper_structure)
        train = Problem(self.train_loss, *point, (train_batch,), "train_loss")
        val = Problem(self.val_loss, *point, (val_batch,), "val_loss")
        with isolated(self.draws.next_seed(), weight_list[0].device):
            response, first, norm = self._fit(train)
            plain = [h.detach().requires_grad_() for h in hyper_list]
            change = torch.cat([(h - h.detach()).reshape(-1) for h in plain])
            loss = val.evaluate(response(change), plain)
            found = torch.autograd.grad(loss, plain, materialize_grads=True, allow_unused=True)
        return Estimate(hyper_structure.rebuild(detached(found)), first, loss.detach(), norm)

    def _fit(self, train: Problem) -> tuple[Response, Tensor, Tensor]:
        """The fitted response; the training loss and the norm of its gradient at the given weights."""
        hyper = detached(train.hyperparameters)
        weights = [w.detach().clone().requires_grad_() for w in train.weights]
        first = train.evaluate(weights, hyper)
        norm = norm_of(torch.autograd.grad(first, weights, materialize_grads=True, allow_unused=True))
        response = self.response(weights, sum(h.numel() for h in hyper))
        optimizer = self.optimizer(response.parameters)
        for _ in range(self.steps):
            moves = [self.scale * torch.randn_like(h) for h in hyper]
            moved = [h + move for h, move in zip(hyper, moves, strict=True)]
            loss = train.evaluate(response(torch.cat([move.reshape(-1) for move in moves])), moved)
            found = torch.autograd.grad(loss, response.parameters, materialize_grads=True, allow_unused=True)
            for parameter, grad in zip(response.parameters, found, strict=True):
                parameter.grad = grad
            optimizer.step()
        return response, first.detach(), norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers."""
        return {"draws": self.draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.draws.load_state_dict(state["draws"])
