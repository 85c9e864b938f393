"""Training steps from given weights to a validation loss, and its derivative by reverse and by forward mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hvp_engine._support.flat_vector import detached, norm_of
from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.double_backward import differentiate, filled, gradients, leaves
from hvp_engine.differentiation.missing_derivatives import explained
from hvp_engine.differentiation.problem import Problem
from hvp_engine.errors import GraphError, SecondDerivativeError
from hvp_engine.hypergradients.update_rules import Moved, UpdateRule

Tensors = list[Tensor]
Tangents = Sequence[Tensor | None]


@dataclass(frozen=True)
class End:
    """Weights and validation loss after the last step, training loss and gradient norm before the first; detached."""

    weights: Tensors
    val_loss: Tensor
    train_loss: Tensor
    gradient_norm: Tensor


@dataclass(frozen=True)
class Trajectory:
    """Steps of `rule`, one per problem in `train`, then `val`; steps from number `first` on are differentiated."""

    train: Sequence[Problem]
    val: Problem
    rule: UpdateRule
    first: int

    def step(self, index: int, weights: Tensors, state: Tensors, hyper: Tensors, record: bool) -> Step:
        """Training step number `index`; `record` keeps its graph."""
        problem = self.train[index]
        loss = problem.evaluate(weights, hyper)
        if record and index == self.first:  # checked once: refuses what would be silently wrong
            gradient = gradients(loss, weights, problem.name)
        elif loss.requires_grad:
            found = differentiate(loss, weights, retain_graph=record, create_graph=record)
            if all(part is None for part in found):
                raise _no_graph(problem.name)
            gradient = filled(found, weights)
        else:
            raise _no_graph(problem.name)
        moved = self.rule.step(weights, gradient, state, self._rate(problem, hyper), index + 1)
        return moved, loss.detach(), detached(gradient)

    def _rate(self, problem: Problem, hyper: Tensors) -> float | Tensor:
        rate = self.rule.learning_rate
        if not callable(rate):
            return rate
        assert problem.hyperparameter_structure is not None
        return rate(problem.hyperparameter_structure.rebuild(hyper))


_NO_FORWARD_DERIVATIVE = ("forward AD", "forward mode AD", "ZeroTensors are immutable")
"""torch's messages for an operator without one; the last is that of `mse_loss`, whose second derivative fails."""

Step = tuple[Moved, Tensor, Tensors]
"""Weights and state after a step; the loss and its gradient before it, detached."""


def reverse(trajectory: Trajectory, checkpointing: bool) -> tuple[Tensors, End]:
    """Record the differentiated steps (with `checkpointing` only the states between them) and backpropagate."""
    val = trajectory.val
    hyper = leaves(val.hyperparameters)
    weights, state = leaves(val.weights), trajectory.rule.initial_state(val.weights)
    seen = None
    with explained():
        for index in range(len(trajectory.train)):
            record = index >= trajectory.first
            if record and checkpointing:
                done = checkpoint(trajectory.step, index, weights, state, hyper, True, use_reentrant=False)
            else:
                done = trajectory.step(index, weights, state, hyper, record)
            (weights, state), loss, gradient = done
            seen = (loss, norm_of(gradient)) if seen is None else seen
            del done, gradient
            if not record:
                weights, state = leaves(weights), detached(state)
        val_loss = val.evaluate(weights, hyper)
        if not val_loss.requires_grad:
            raise _no_graph(val.name)
        found = differentiate(val_loss, hyper, retain_graph=False)
    if all(grad is None for grad in found):
        raise _no_path()
    assert seen is not None
    return filled(found, hyper), End(detached(weights), val_loss.detach(), *seen)


def forward(trajectory: Trajectory) -> tuple[Tensors, End]:
    """One pass with a tangent for each element of each hyperparameter."""
    hyper = trajectory.val.hyperparameters
    grads = [torch.zeros_like(h, memory_format=torch.contiguous_format) for h in hyper]
    end, reached = None, False
    for position, grad in enumerate(grads):
        for element in range(grad.numel()):
            unit = torch.zeros_like(grad)
            unit.view(-1)[element] = 1.0
            direction = [unit if place == position else None for place in range(len(hyper))]
            with random_state_kept(grad.device), _forward_explained():
                slope, end = _along(trajectory, direction)
            if slope is not None:
                reached = True
                grad.view(-1)[element] = slope
    if not reached or end is None:
        raise _no_path()
    return grads, end


def _along(trajectory: Trajectory, direction: Tangents) -> tuple[Tensor | None, End]:
    """The slope of the validation loss along `direction` in the hyperparameters; None where there is no path."""
    val = trajectory.val
    hyper = detached(val.hyperparameters)
    weights, state = detached(val.weights), trajectory.rule.initial_state(val.weights)
    tangents: Tangents = [None] * len(weights)
    state_tangents: Tangents = [None] * len(state)
    seen = None
    for index in range(len(trajectory.train)):
        with forward_ad.dual_level():  # a level keeps its tangents alive until it ends: one per step
            moving = _dual(hyper, direction) if index >= trajectory.first else hyper
            (moved, rest), loss, gradient = trajectory.step(
                index, _dual(leaves(weights), tangents), _dual(state, state_tangents), moving, record=False
            )
            weights, tangents = _parts(moved)
            state, state_tangents = _parts(rest)
            seen = (_parts([loss])[0][0], norm_of(_parts(gradient)[0])) if seen is None else seen
    with torch.no_grad(), forward_ad.dual_level():
        (val_loss,), (slope,) = _parts([val.evaluate(_dual(weights, tangents), _dual(hyper, direction))])
    assert seen is not None
    return slope, End(weights, val_loss, *seen)


def _dual(tensors: Sequence[Tensor], tangents: Tangents) -> Tensors:
    pairs = zip(tensors, tangents, strict=True)
    return [tensor if tangent is None else forward_ad.make_dual(tensor, tangent) for tensor, tangent in pairs]


def _parts(tensors: Sequence[Tensor]) -> tuple[Tensors, Tangents]:
    """Values and tangents, detached."""
    pairs = [forward_ad.unpack_dual(tensor) for tensor in tensors]
    return [value.detach() for value, _ in pairs], [None if slope is None else slope.detach() for _, slope in pairs]


@contextlib.contextmanager
def _forward_explained() -> Iterator[None]:
    """Turn torch's error about an operator without a forward derivative into ours."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if not any(sign in str(error) for sign in _NO_FORWARD_DERIVATIVE):
            raise
        raise SecondDerivativeError(
            f"forward mode: {' '.join(str(error).split())[:200]}; remedy: use mode='reverse'"
        ) from error


def _no_graph(name: str) -> GraphError:
    return GraphError(
        f"{name}: expected a loss that depends on the weights; got one without a graph to them: compute it from the "
        "weights it is given, without .detach() or .item()"
    )


def _no_path() -> GraphError:
    return GraphError(
        "hyperparameters: expected at least one that the training steps or the validation loss depend on; got none: "
        "pass the tensors the losses use"
    )
