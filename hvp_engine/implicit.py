"""Hypergradients by the implicit function theorem, three ways to call one core.

dL_V*/dlambda = dL_V/dlambda - (d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 dL_V/dw      (Algorithm 2)

* :func:`approx_inverse_hvp`, :func:`hypergradient`: on losses that autograd has recorded already;
* :func:`best_response`: an `autograd.Function` that hands out w*(lambda) and puts the formula into `backward`;
* :class:`Hypergradient`: on loss functions; linearizes by the engine of your choice, reuses what it can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from hvp_engine import engines
from hvp_engine.engines.eager import EagerEngine, leaves
from hvp_engine.engines.tape import Tape, differentiate, filled, gradients
from hvp_engine.errors import GraphError, SecondDerivativeError
from hvp_engine.estimation import Estimate
from hvp_engine.isolation import Draws, isolated
from hvp_engine.linearization import Linearization, Problem
from hvp_engine.precision import float32_arithmetic
from hvp_engine.solution import Solution
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import check_solver
from hvp_engine.solving import solve_flat
from hvp_engine.spectrum import Spectrum
from hvp_engine.stationarity import Stationarity, unfinished_change
from hvp_engine.trees import as_list, check_like, check_scalar, flatten
from hvp_engine.vectors import Layout, detached, norm_of

TensorOrTensors = Tensor | Sequence[Tensor]


def approx_inverse_hvp(
    v: TensorOrTensors,
    f: TensorOrTensors,
    w: TensorOrTensors,
    iterations: int,
    alpha: float | Literal["auto"],
    *,
    damping: float = 0.0,
) -> tuple[Tensor, ...]:
    """[df/dw + damping I]^-1 v, approximately: alpha * sum_{j=0..iterations} (I - alpha (df/dw + damping I))^j v.

    Arguments:
        v: the vector, a tensor or a sequence like `w`.
        f: dL_T/dw with its graph (`create_graph=True`), a sequence like `w`; or the 0-dim loss L_T itself.
        w: the weights, a tensor or a sequence of tensors on one device, the ones `f` was computed from.
        iterations: Hessian-vector products, i; the sum has i + 1 terms. 0 gives alpha * v.
        alpha: the step, 0 < alpha < 2 / lambda_max for convergence; "auto" estimates it by 8 more products.
        damping: added to the diagonal of the Hessian, >= 0.

    Returns a tuple like `w`, detached. The graph of `f` is kept.

    Cost: `iterations` Hessian-vector products (8 more for "auto"); two flat copies of the weights.

    Errors: `TypeError`/`ValueError` naming the argument; :class:`GraphError` for an `f` without a graph;
    :class:`SecondDerivativeError`; :class:`DivergenceError` naming an alpha that would work.

    Source: Algorithm 3 of Lorraine, Vicol, Duvenaud 2019, with the final factor alpha that its box omits.

    >>> import torch, hvp_engine as hvp
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = (w ** 2 * torch.tensor([1.0, 0.5])).sum()              # H = diag(2, 1)
    >>> hvp.approx_inverse_hvp(torch.ones(2), loss, w, iterations=50, alpha=0.5)
    (tensor([0.5000, 1.0000]),)
    """
    solver = Neumann(iterations, alpha, damping=damping)
    weights = as_list(w, "w")
    vector = as_list(v, "v")
    check_like(vector, Layout.of(weights), "v", "w")
    tape = Tape(_gradient_of(f, weights), weights, loss=f if _is_loss(f) else None, name="f")
    if not tape.reaches_weights:
        raise GraphError(
            "f: expected gradients that depend on w; got a graph that reaches none of w: pass the tensors that "
            "the forward used (of a loss linear in w the Hessian is zero and has no inverse)"
        )
    value, _ = solve_flat(tape, detached(vector), solver, EagerEngine(), Spectrum())
    return tuple(value)


def hypergradient(
    train_loss: Tensor,
    val_loss: Tensor,
    weights: TensorOrTensors,
    hyperparameters: TensorOrTensors,
    solver: Solver | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """dL_V/dlambda - (d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 dL_V/dw at the weights the losses were computed at.

    Arguments:
        train_loss, val_loss: scalar tensors with their graphs; both graphs are kept.
        weights: a tensor or sequence, at (approximately) a minimum of the training loss.
        hyperparameters: a tensor or sequence of tensors that require grad.
        solver: how to invert the Hessian; default `Neumann(20)`, alpha estimated.
        create_graph: not supported; True raises.

    Returns a tuple like `hyperparameters`, detached; zeros for one that neither loss uses.

    Cost: two gradients, the solver's products, one mixed product.

    Errors: :class:`GraphError` for a loss without a graph, or if no hyperparameter is reachable; else as
    :func:`approx_inverse_hvp`.

    Source: Algorithm 2 and Theorem 1 (implicit function theorem) of Lorraine, Vicol, Duvenaud 2019.

    >>> import torch, hvp_engine as hvp
    >>> decay = torch.tensor(1.0, requires_grad=True)
    >>> w = torch.tensor([0.5, 1.0], requires_grad=True)         # w* = target / (1 + decay), target = (1, 2)
    >>> train = ((w - torch.tensor([1.0, 2.0])) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> hvp.hypergradient(train, (w ** 2).sum() / 2, w, decay, hvp.Neumann(60))
    (tensor(-0.6250),)
    """
    if create_graph:
        raise _no_second_derivative("hypergradient")
    solver = Neumann(20) if solver is None else solver
    check_solver(solver)
    weight_list, hyper_list = as_list(weights, "weights"), as_list(hyperparameters, "hyperparameters")
    check_scalar(train_loss, "train_loss")
    check_scalar(val_loss, "val_loss")
    if not val_loss.requires_grad:
        raise GraphError(
            "val_loss: expected a loss with an autograd graph; got a tensor that does not require grad: compute it "
            "from the weights with grad mode on"
        )
    _require_grad(hyper_list)
    everything = [*weight_list, *hyper_list]
    found = differentiate(val_loss, everything)
    count = len(weight_list)
    vector = filled(found[:count], weight_list)
    tape = Tape(gradients(train_loss, weight_list, "train_loss"), weight_list, hyper_list, train_loss, "train_loss")
    grads, _ = _implicit(tape, vector, found[count:], hyper_list, solver, EagerEngine(), Spectrum())
    return tuple(grads)


def best_response(
    train_loss: Tensor,
    weights: TensorOrTensors,
    hyperparameters: TensorOrTensors,
    solver: Solver | None = None,
) -> tuple[Tensor, ...]:
    """The weights as the function w*(lambda) that the training loss makes them: identity forward, IFT backward.

    backward of a gradient g is -(d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 g; so a validation loss of the result
    gives the hyperparameters both the direct and the indirect term.

    Arguments: as :func:`hypergradient`.

    Returns a tuple like `weights`, sharing memory with them, connected to the hyperparameters only.

    Errors: as :func:`hypergradient`; a backward with `create_graph=True` raises :class:`SecondDerivativeError`,
    since the result promises first derivatives only.

    >>> import torch, hvp_engine as hvp
    >>> decay = torch.tensor(1.0, requires_grad=True)
    >>> w = torch.tensor([0.5, 1.0], requires_grad=True)
    >>> train = ((w - torch.tensor([1.0, 2.0])) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> (ws,) = hvp.best_response(train, w, decay, hvp.Neumann(60))
    >>> ((ws ** 2).sum() / 2).backward()
    >>> decay.grad, w.grad
    (tensor(-0.6250), None)
    """
    solver = Neumann(20) if solver is None else solver
    check_solver(solver)
    weight_list, hyper_list = as_list(weights, "weights"), as_list(hyperparameters, "hyperparameters")
    check_scalar(train_loss, "train_loss")
    _require_grad(hyper_list)
    tape = Tape(gradients(train_loss, weight_list, "train_loss"), weight_list, hyper_list, train_loss, "train_loss")
    return _BestResponse.apply(tape, solver, *hyper_list)


class _BestResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, solver: Solver, *hyperparameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.solver, ctx.hyperparameters = tape, solver, hyperparameters
        return tuple(w.detach() for w in tape.weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise _no_second_derivative("best_response")
        none = [None] * len(ctx.hyperparameters)
        grads, _ = _implicit(ctx.tape, grad_outputs, none, ctx.hyperparameters, ctx.solver, EagerEngine(), Spectrum())
        return None, None, *grads


@dataclass(frozen=True)
class HypergradientResult(Estimate):
    """What a :class:`Hypergradient` call returns.

    Attributes:
        grads: dL_V*/dlambda, in the container of the hyperparameters, detached.
        train_loss, val_loss: 0-dim tensors, detached.
        gradient_norm: ||dL_T/dw|| as a 0-dim float64 tensor: zero where the theorem applies exactly.
        unfinished: -(H^-1 dL_V/dw) . dL_T/dw as a 0-dim float64 tensor: by how much the validation loss would
            change if training went on to its end, to first order.
        solution: the solve of H x = dL_V/dw; its value is in the container of the weights.
    """

    unfinished: Tensor
    solution: Solution


class Hypergradient:
    """dL_V*/dlambda as a function of (weights, hyperparameters, training batch, validation batch).

    Arguments:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor. They must be functions of their
            arguments: an engine may trace them once and reuse the trace.
        solver: how to invert the training loss's Hessian.
        engine: how products are executed: "auto", or a name from `hvp_engine.engines`.

    Calling it takes `(weights, hyper, train_batch, val_batch)`: weights and hyper any tree of real floating
    tensors (a module stands for its named parameters), batches anything. It returns a :class:`HypergradientResult`
    and leaves everything of the caller's as it was: tensors, `.grad`, buffers, random state.

    Cost of a call: one gradient of each loss, the solver's products, one mixed product. Memory: the graph of the
    training gradient and the solver's vectors, whatever the number of products.

    Errors: as :func:`hypergradient`. A warning, once, if the weights are far from stationary, so that the implicit
    function theorem does not apply: the result's `unfinished` is more than half of the validation loss. Calls
    1, 2, 4, 8, ... look, since a look waits for the device.

    >>> import torch, hvp_engine as hvp
    >>> target = torch.tensor([1.0, 2.0])
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: (w ** 2).sum() / 2
    >>> hg = hvp.Hypergradient(train, val, solver=hvp.Neumann(60))
    >>> hg(target / 2, torch.tensor(1.0), target, None).grads
    tensor(-0.6250)
    """

    def __init__(
        self,
        train_loss: Callable[[Any, Any, Any], Tensor],
        val_loss: Callable[[Any, Any, Any], Tensor],
        solver: Solver | None = None,
        engine: str | engines.Engine = "auto",
    ):
        for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name}: expected a function of (weights, hyper, batch); got {type(loss).__name__}; "
                    "for losses computed already use hvp.hypergradient"
                )
        self.train_loss, self.val_loss = train_loss, val_loss
        self.solver: Solver = Neumann(20) if solver is None else solver
        check_solver(self.solver)
        self.engine = engines.create(engine)
        self.spectrum = Spectrum()
        self.draws = Draws()
        self._stationarity = Stationarity()

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> HypergradientResult:
        weight_list, weight_structure = flatten(weights, "weights")
        hyper_list, hyper_structure = flatten(hyper, "hyper")

        def problem(loss: Callable[..., Tensor], batch: Any, name: str) -> Problem:
            return Problem(loss, weight_list, weight_structure, hyper_list, hyper_structure, (batch,), name)

        with isolated(self.draws.next_seed(), weight_list[0].device):
            val_loss, vector, direct = _direct(problem(self.val_loss, val_batch, "val_loss"))
            linearization = self.engine.linearize(problem(self.train_loss, train_batch, "train_loss"))
            grads, solution = _implicit(
                linearization, vector, direct, hyper_list, self.solver, self.engine, self.spectrum
            )
        assert linearization.loss is not None
        result = HypergradientResult(
            grads=hyper_structure.rebuild(grads),
            train_loss=linearization.loss,
            val_loss=val_loss,
            gradient_norm=norm_of(linearization.gradient),
            unfinished=unfinished_change(solution.value, linearization.gradient),
            solution=replace(solution, value=weight_structure.rebuild(solution.value)),
        )
        if solution.iterations:  # else it is no step of training
            self._stationarity.look(result.unfinished, val_loss, result.gradient_norm)
        return result

    def report(self) -> str:
        """What the engine did and why, and how precise float32 is."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lines = [f"engine {self.engine.name}", self.engine.report()]
        return "\n".join([*lines, f"float32 products on {device}: {float32_arithmetic(device)}"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers."""
        return {
            "draws": self.draws.state_dict(),
            "spectrum": self.spectrum.state_dict(),
            "engine": self.engine.state_dict() if hasattr(self.engine, "state_dict") else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.draws.load_state_dict(state["draws"])
        self.spectrum.load_state_dict(state["spectrum"])
        if hasattr(self.engine, "load_state_dict"):
            self.engine.load_state_dict(state["engine"])


def _direct(problem: Problem) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The validation loss, dL_V/dw, and dL_V/dlambda (None where there is no path)."""
    weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
    loss = problem.evaluate(weights, hyperparameters)
    if not loss.requires_grad:
        raise GraphError(
            f"{problem.name}: expected a loss that depends on weights or hyperparameters; got one without a graph"
        )
    found = differentiate(loss, [*weights, *hyperparameters], retain_graph=False)
    count = len(weights)
    return loss.detach(), filled(found[:count], weights), found[count:]


def _implicit(
    linearization: Linearization,
    vector: Sequence[Tensor],
    direct: Sequence[Tensor | None],
    hyperparameters: Sequence[Tensor],
    solver: Solver,
    engine: engines.Engine,
    spectrum: Spectrum,
) -> tuple[list[Tensor], Solution]:
    """direct - mixed(H^-1 vector) for each hyperparameter; the core that all ways of calling share."""
    name = "dL_V/dw, the gradient of val_loss"
    value, solution = solve_flat(linearization, detached(vector), solver, engine, spectrum, name)
    indirect = linearization.mixed(value)
    if all(term is None for term in [*direct, *indirect]):
        raise GraphError(
            "hyperparameters: expected at least one that the training gradient or the validation loss depends on; "
            "got none: pass the tensors the losses use (a setting of the optimizer, such as its learning rate, does "
            "not change the loss surface and has no implicit gradient)"
        )
    if all(term is None for term in indirect):
        warnings.warn(
            "no hyperparameter reaches the training gradient: the hypergradient is the direct term alone",
            stacklevel=3,
        )
    grads = []
    for hyperparameter, first, second in zip(hyperparameters, direct, indirect, strict=True):
        total = torch.zeros_like(hyperparameter) if first is None else first.detach().clone()
        grads.append(total if second is None else total.sub_(second.detach()))
    return grads, replace(solution, value=value)


def _is_loss(f: Any) -> TypeGuard[Tensor]:
    return isinstance(f, Tensor) and f.dim() == 0


def _gradient_of(f: TensorOrTensors, weights: list[Tensor]) -> list[Tensor]:
    """The gradient with its graph, from the gradient or the loss that the caller passed."""
    if _is_loss(f):
        check_scalar(f, "f")
        return gradients(f, weights, "f")
    gradient = as_list(f, "f")
    check_like(gradient, Layout.of(weights), "f", "w")
    if not any(g.requires_grad for g in gradient):
        raise GraphError(
            "f: expected gradients with an autograd graph; got tensors that do not require grad: compute them by "
            "torch.autograd.grad(loss, w, create_graph=True)"
        )
    return gradient


def _require_grad(hyperparameters: Sequence[Tensor]) -> None:
    if not any(hyperparameter.requires_grad for hyperparameter in hyperparameters):
        raise GraphError("hyperparameters: expected tensors that require grad; got none that does")


def _no_second_derivative(name: str) -> SecondDerivativeError:
    return SecondDerivativeError(
        f"{name} gives first derivatives only; create_graph=True asked for a derivative of its result: "
        "leave create_graph out, or differentiate an unrolled training loop instead"
    )
