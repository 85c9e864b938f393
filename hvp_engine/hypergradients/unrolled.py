"""Unrolled differentiation: the hypergradient through steps of training, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from hvp_engine._support.arguments import check_count
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.problem import Problem
from hvp_engine.hypergradients.estimator import Estimate, Estimator, check_functions
from hvp_engine.hypergradients.trajectory import Trajectory, forward, reverse
from hvp_engine.hypergradients.update_rules import UpdateRule

Mode = Literal["reverse", "forward"]


@dataclass(frozen=True)
class UnrolledEstimate(Estimate):
    """What an :class:`Unrolled` call returns.

    Attributes:
        grads: dL_V(lambda, w_i(lambda))/dlambda, in the container of the hyperparameters, detached.
        train_loss: at the given weights, on the first batch; 0-dim, detached.
        val_loss: at the weights after the last step; 0-dim, detached.
        gradient_norm: ||dL_T/dw|| at the given weights, a 0-dim float64 tensor.
        weights: w_i, in the container of the weights, detached: a training loop may continue from there.
    """

    weights: Any


class Unrolled(Estimator):
    """The hypergradient through i training steps from the given weights: dL_V(lambda, w_i(lambda))/dlambda.

    dL_V/dlambda - dL_V/dw sum_{i-L < j <= i} [prod_{j < k <= i} (I - eta H(w_{k-1}))] eta d2L_T/dw dlambda^T(w_{j-1})
    for SGD with learning rate eta, where L = i without truncation. From a minimum w* it equals the Neumann
    series of i - 1 products (alpha = eta).

    Arguments:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor.
        steps: i >= 1.
        rule: how a step moves the weights: `SGD(eta)`, `SGD(eta, momentum=0.9)`, `Adam(eta)`, starting without
            momentum. Its learning rate may depend on the hyperparameters, unlike in implicit differentiation.
        truncation: L in 1..i: only the last L steps are differentiated; None for all.
        mode: "reverse", or "forward" for few hyperparameters.
        checkpointing: rematerialization: keep only the states between steps, and rerun each step in the backward pass.
        batch_per_step: `train_batch` is a sequence with one batch for each step (`Tuner(train_batches=steps)` passes
            one); otherwise all steps use the same batch.

    Usable as `Tuner(estimator=...)`. It changes none of the caller's weights, hyperparameters, `.grad`, buffers and
    random state. Every step draws its own dropout masks, as in training. All passes of one call (rerun steps,
    directions of forward mode) draw the same masks; the next call draws others.

    Cost, for P weights and H hyperparameters (with truncation read L for i):

    * reverse: i recorded gradients, and about 2 more each for the backward pass; memory O(P i + H), all steps' graphs.
    * reverse with checkpointing: about twice that time; memory: one step's graph, and for each step one or two copies
    of
      the weights and of the rule's state.
    * forward: H passes of i steps, each about three gradients; memory O(P + H) for any i. (Carrying all H tangents at
      once would take one pass and O(P H).)

    Errors: `TypeError`/`ValueError` naming the argument; :class:`GraphError` for losses without a graph to weights or
    hyperparameters; :class:`SecondDerivativeError` for an operator without a second derivative (in forward mode:
    without a forward derivative).

    Source: Domke, Generic Methods for Optimization-Based Modeling, AISTATS 2012; Maclaurin, Duvenaud and Adams,
    Gradient-based Hyperparameter Optimization through Reversible Learning, ICML 2015. Both modes: Franceschi, Donini,
    Frasconi and Pontil, Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017. Truncation: Shaban,
    Cheng, Hatch and Boots, Truncated Back-propagation for Bilevel Optimization, AISTATS 2019.

    >>> import torch, hvp_engine as hvp
    >>> from hvp_engine.hypergradients import SGD, Unrolled
    >>> target = torch.tensor([1.0, 2.0])
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: (w ** 2).sum() / 2
    >>> Unrolled(train, val, 60, SGD(0.25))(target / 2, torch.tensor(1.0), target, None).grads
    tensor(-0.6250)
    """

    def __init__(
        self,
        train_loss: Callable[[Any, Any, Any], Tensor],
        val_loss: Callable[[Any, Any, Any], Tensor],
        steps: int,
        rule: UpdateRule,
        *,
        truncation: int | None = None,
        mode: Mode = "reverse",
        checkpointing: bool = False,
        batch_per_step: bool = False,
    ):
        check_functions(": define one", train_loss=train_loss, val_loss=val_loss)
        steps = check_count(steps, "steps", what="the training steps to unroll")
        truncation = steps if truncation is None else truncation
        truncation = check_count(truncation, "truncation", what="the last steps to differentiate")
        if truncation > steps:
            raise ValueError(f"truncation: expected at most steps={steps}; got {truncation}: unroll more steps")
        if isinstance(rule, type) or not isinstance(rule, UpdateRule):
            raise TypeError(f"rule: expected an update rule such as SGD(0.1); got {rule!r}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected 'reverse' or 'forward'; got {mode!r}")
        if checkpointing and mode == "forward":
            raise ValueError("checkpointing: expected False in forward mode, which keeps no graph; got True")
        self.train_loss, self.val_loss, self.steps, self.rule = train_loss, val_loss, steps, rule
        self.truncation, self.mode = truncation, mode
        self.checkpointing, self.batch_per_step = checkpointing, batch_per_step
        self.draws = Draws()

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> UnrolledEstimate:
        weight_list, weight_structure = flatten(weights, "weights")
        hyper_list, hyper_structure = flatten(hyper, "hyper")
        point = (weight_list, weight_structure, hyper_list, hyper_structure)
        train = [Problem(self.train_loss, *point, (batch,), "train_loss") for batch in self._batches(train_batch)]
        val = Problem(self.val_loss, *point, (val_batch,), "val_loss")
        trajectory = Trajectory(train, val, self.rule, self.steps - self.truncation)
        with isolated(self.draws.next_seed(), weight_list[0].device):
            if self.mode == "reverse":
                grads, end = reverse(trajectory, self.checkpointing)
            else:
                grads, end = forward(trajectory)
        return UnrolledEstimate(
            grads=hyper_structure.rebuild(grads),
            train_loss=end.train_loss,
            val_loss=end.val_loss,
            gradient_norm=end.gradient_norm,
            weights=weight_structure.rebuild(end.weights),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws.load_state_dict(state["draws"])

    def _batches(self, train_batch: Any) -> Sequence[Any]:
        if not self.batch_per_step:
            return [train_batch] * self.steps
        if not isinstance(train_batch, Sequence) or len(train_batch) != self.steps:
            got = f"{len(train_batch)}" if isinstance(train_batch, Sequence) else type(train_batch).__name__
            raise ValueError(
                f"train_batch: expected a sequence of {self.steps} batches, one for each step; got {got}: pass "
                "Tuner(train_batches=steps), or batch_per_step=False for one batch"
            )
        return train_batch
