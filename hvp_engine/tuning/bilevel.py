"""The problem that Algorithm 1 solves, and its two steps: a training step and a hyper step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.pytree import check_scalar, flatten, trainable
from hvp_engine._support.random_state import RandomState
from hvp_engine._support.torch_compat import pytree
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed import DataParallel, averaged
from hvp_engine.errors import DivergenceError, GraphError
from hvp_engine.hypergradients.estimator import Estimate, EstimatorLike, as_estimator
from hvp_engine.hypergradients.implicit import Hypergradient
from hvp_engine.solvers import Solver
from hvp_engine.tuning.bounds import Bounds
from hvp_engine.tuning.checkpoint import compact
from hvp_engine.tuning.optimizer_step import Descent, Grads, OptimizerLike, SchedulerLike
from hvp_engine.tuning.processes import processes_of
from hvp_engine.tuning.replayed_gradient import ReplayedGradient

Loss = Callable[[Any, Any, Any], Tensor]

Moves = tuple[OptimizerLike, SchedulerLike | None, float | None]
"""How tensors move: by which optimizer, scheduler, and clipping to which norm."""

_MAX_FAILURES = 10
"""The run stops at this many failed hypergradients in a row."""


class Variables:
    """The tensors of a tree or module, which are updated in place.

    Attributes:
        tensors, names: the leaves, and their names in checkpoints.
        structure: how to rebuild the tree.
    """

    def __init__(self, given: Any, name: str):
        tree = trainable(given)
        self.tensors, self.structure = flatten(tree, name, sharded=True)
        self.names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
        self._buffers = given.named_buffers if isinstance(given, torch.nn.Module) else lambda: ()
        for index, tensor in enumerate(self.tensors):
            if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
                raise ValueError(
                    f"{name}[{index}]: expected memory for every element, to be updated in place; got an expanded "
                    f"tensor with strides {tensor.stride()}: use .clone(memory_format=torch.contiguous_format)"
                )

    def tree(self) -> Any:
        """The tree of the tensors themselves."""
        return self.structure.rebuild(self.tensors)

    def buffers(self, prefix: str) -> dict[str, Tensor]:
        """The buffers of the module; none for a tree."""
        return {f"{prefix}.{name}": buffer for name, buffer in self._buffers()}

    def state_dict(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """One value for each tensor, by name, not copied."""
        return {name: compact(value) for name, value in zip(self.names, values, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, values: Sequence[Tensor], state: Mapping[str, Tensor]) -> None:
        """Copy what was saved into `values`."""
        for name, value in zip(self.names, values, strict=True):
            value.copy_(state[name])


class BilevelProblem:
    """Weights and hyperparameters with their losses and optimizers, and the two steps of Algorithm 1.

    :class:`hvp_engine.Tuner` decides when to make which step.

    Arguments:
        module, hyper, train_loss, bounds: as of the tuner.
        estimator: from :func:`estimator_for`.
        weight_moves, hyper_moves: how the two sides move.

    Attributes:
        weights, hyper: the :class:`Variables`.
        weight_side, hyper_side: their optimizers.
        estimator, given_estimator: computes hypergradients; and as it was given, maybe a plain callable.
        failures: hypergradients in a row that have failed.
        initial_weights, initial_buffers: copies on the CPU, made at construction.
        processes: the processes that evaluate the losses together.
    """

    def __init__(
        self,
        module: Any,
        hyper: Any,
        train_loss: Loss,
        estimator: EstimatorLike,
        weight_moves: Moves,
        hyper_moves: Moves,
        bounds: Any,
    ):
        self.weights, self.hyper = Variables(module, "module"), Variables(hyper, "hyper")
        weights, hypers, hyper_structure = self.weights.tensors, self.hyper.tensors, self.hyper.structure
        for index, tensor in enumerate(hypers):
            if any(tensor is weight for weight in weights):
                raise ValueError(
                    f"hyper[{index}]: expected a tensor that is no weight, since both optimizers would move it; got "
                    "one that module has as well: keep it outside, or pass a dict of the other parameters as module"
                )
        self.given_estimator, self.estimator = estimator, as_estimator(estimator)
        self.processes = processes_of(train_loss, weights[0].device)
        self._weight_norm = self.processes.norm_of(weights, self.weights.structure.shards)
        self._hyper_norm = self.processes.norm_of(hypers, hyper_structure.shards)
        limits = None if bounds is None else Bounds(bounds, hypers, hyper_structure)
        self.weight_side = Descent(weights, *weight_moves, "weight", self._weight_norm)
        self.hyper_side = Descent(hypers, *hyper_moves, "hyper", self._hyper_norm, limits)
        if self.hyper_side.needs_closure:
            raise TypeError(
                "hyper_optimizer: expected an optimizer that takes one gradient a step; got "
                f"{type(self.hyper_side.optimizer).__name__}: a hypergradient is valid only where the weights are "
                "trained"
            )
        self._point = weights, self.weights.structure, hypers, hyper_structure
        self._train_loss = train_loss
        self._device = weights[0].device
        self._replayed: ReplayedGradient | None = None
        recorder = self.estimator.recorder(self._device)
        if recorder is not None and not isinstance(train_loss, DataParallel):
            self._replayed = ReplayedGradient(recorder)
            self.weight_side.replay_by(recorder), self.hyper_side.replay_by(recorder)
        self.failures = 0
        self.initial_weights = [weight.detach().to("cpu", copy=True) for weight in weights]
        self.initial_buffers = {name: buffer.to("cpu", copy=True) for name, buffer in self.buffers().items()}

    def train_step(self, batches: Sequence[Any], tolerance: float | None = None) -> tuple[Tensor, bool]:
        """A step of the weight optimizer, unless ||dL_T/dw|| <= `tolerance`; the loss, and whether a step was made."""
        loss, grads = self._gradient(batches)
        if tolerance is not None and float(self._weight_norm(grads)) <= tolerance:
            return loss, False
        self.weight_side.step(loss, grads, lambda: self._gradient(batches))
        return loss, True

    def hyper_step(self, train_batch: Any, val_batch: Any) -> tuple[Estimate | None, dict[str, Any]]:
        """A step of the hyper optimizer: the estimate, and its figures for the record.

        A hypergradient that failed or is not finite never reaches the optimizer. The step is left out with a warning;
        after too many failures in a row :class:`DivergenceError` is raised.
        """
        try:
            estimate = self.estimator(self.weights.tree(), self.hyper.tree(), train_batch, val_batch)
            grads, structure = flatten(estimate.grads, "grads", sharded=True)
            if structure != self.hyper.structure:
                raise ValueError(
                    f"estimator: expected grads in the container of hyper, {self.hyper.structure.spec}; got "
                    f"{structure.spec}"
                )
            figures = _figures(estimate, self._hyper_norm(grads))
            if not math.isfinite(figures["hypergradient_norm"]):
                raise DivergenceError("hypergradient: expected finite values; got NaN or Inf in the mixed product")
        except DivergenceError as error:
            self.failures += 1
            if self.failures >= _MAX_FAILURES:
                raise
            warnings.warn(f"hyper step left out: {error}", stacklevel=4)
            return None, {}
        self.failures = 0
        self.hyper_side.step(estimate.val_loss, grads)
        return estimate, figures

    def _gradient(self, batches: Sequence[Any]) -> tuple[Tensor, Grads]:
        """The training loss and dL_T/dw, averaged over `batches`: by a graph, where there is one."""
        if self._replayed is None:
            return self._training_gradient(batches)
        problem = Problem(self._train_loss, *self._point, (batches,), "train_loss")
        return self._replayed(problem, self._training_gradient, lambda: list(self.buffers().values()))

    @torch.enable_grad()
    def _training_gradient(self, batches: Sequence[Any]) -> tuple[Tensor, Grads]:
        """The same without a graph."""
        tensors = self.weights.tensors
        total = torch.zeros((), device=tensors[0].device)
        sums: list[Tensor | None] = [None] * len(tensors)
        hyper = self.hyper.structure.rebuild([h.detach() for h in self.hyper.tensors])
        for batch in batches:
            weights = [w.detach().requires_grad_() for w in tensors]
            loss = self._train_loss(self.weights.structure.rebuild(weights), hyper, batch)
            check_scalar(loss, "train_loss")
            if not loss.requires_grad:
                raise GraphError("train_loss: expected a loss that depends on the weights; got one without a graph")
            loss = loss.reshape(()) if len(batches) == 1 else loss.reshape(()) / len(batches)
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            total = total + loss.detach()
            sums = [_sum(old, new) for old, new in zip(sums, grads, strict=True)]
        return total, sums

    @property
    def moves(self) -> tuple[int, int]:
        """Steps begun by the two optimizers. While they stay the same, a step can be taken back to a position."""
        return self.weight_side.steps, self.hyper_side.steps

    def report(self) -> str:
        """How hypergradients are executed, and the steps around them if their engine makes recordings."""
        parts = (self.estimator, self._replayed, self.weight_side.replayed, self.hyper_side.replayed)
        return "\n".join([text for text in [part.report() for part in parts if part is not None] if text])

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the module, and of the hyperparameters if they are a module's."""
        return self.weights.buffers("module") | self.hyper.buffers("hyper")

    @torch.no_grad()
    def restart(self) -> None:
        """Put weights, their module's buffers and their optimizer back to where they began."""
        for weight, initial in zip(self.weights.tensors, self.initial_weights, strict=True):
            weight.copy_(initial)
        for name, buffer in self.weights.buffers("module").items():
            buffer.copy_(self.initial_buffers[name])
        self.weight_side.reset()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, not copied, and plain values: what changes only with an optimizer's step."""
        return {
            "weights": self.weights.state_dict(self.weights.tensors),
            "hyper": self.hyper.state_dict(self.hyper.tensors),
            "initial_weights": self.weights.state_dict(self.initial_weights),
            "initial_buffers": self.initial_buffers,
            "weight_side": self.weight_side.state_dict(),
            "hyper_side": self.hyper_side.state_dict(),
            "estimator_type": type(self.given_estimator).__name__,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.weights.load_state_dict(self.weights.tensors, state["weights"])
        self.hyper.load_state_dict(self.hyper.tensors, state["hyper"])
        self.weights.load_state_dict(self.initial_weights, state["initial_weights"])
        for name, initial in self.initial_buffers.items():
            initial.copy_(state["initial_buffers"][name])
        self.weight_side.load_state_dict(state["weight_side"])
        self.hyper_side.load_state_dict(state["hyper_side"])
        for name, buffer in self.buffers().items():
            buffer.copy_(state["buffers"][name])
        self.failures = state["counters"]["failures"]
        self.estimator.load_state_dict(state["estimator"])
        RandomState.from_state_dict(state["random"]).restore(self._device)

    def position(self) -> dict[str, Any]:
        """What changes in a step before an optimizer moves anything."""
        return {
            "random": RandomState.now(self._device).state_dict,
            "estimator": self.estimator.state_dict(),
            "buffers": {name: buffer.clone() for name, buffer in self.buffers().items()},
        }


def estimator_for(
    given: EstimatorLike | None, losses: tuple[Loss, Loss], batches: tuple[int, int], solver: Solver | None, engine: str
) -> EstimatorLike:
    """The given estimator, or the hypergradient of the training and the validation loss, each averaged over batches."""
    if given is None:
        train, val = map(_averaged, losses, batches)
        return Hypergradient(train, val, solver=solver, engine=engine)
    if solver is not None:
        raise ValueError("solver: expected None beside an estimator, which has its own; got both")
    return given


def _averaged(loss: Loss, batches: int) -> Loss:
    """`loss` averaged over a list of batches; what is not callable is left for :class:`Hypergradient` to refuse."""
    return averaged(loss) if batches > 1 and callable(loss) else loss


def _figures(estimate: Estimate, hypergradient_norm: Tensor) -> dict[str, Any]:
    """The figures of an estimate for a record; those on the device are read with one transfer."""
    unknown, solution = torch.full_like(hypergradient_norm, math.nan), estimate.solution
    tensors = {
        "train_loss": estimate.train_loss,
        "val_loss": estimate.val_loss,
        "gradient_norm": estimate.gradient_norm,
        "hypergradient_norm": hypergradient_norm,
        "unfinished": unknown if estimate.unfinished is None else estimate.unfinished,
    }
    values = torch.stack([tensor.detach().to(unknown).reshape(()) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True)) | {
        "residual_norm": math.nan if solution is None else solution.residual_norm,
        "status": "" if solution is None else solution.status.name,
        "alpha": None if solution is None else solution.alpha,
    }


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
