"""Implicit differentiation of losses that autograd has recorded already: drop-ins for an existing training script.

* :func:`approx_inverse_hvp`, :func:`hypergradient`: plain functions of recorded losses;
* :func:`best_response`: an `autograd.Function` that hands out w*(lambda) and puts the formula into `backward`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import detached, joined
from hvp_engine._support.pytree import check_scalar
from hvp_engine._support.tensor_lists import Tensors, as_list, as_list_like, is_flat_for
from hvp_engine._support.torch_compat import is_batched
from hvp_engine.differentiation.double_backward import Tape, check_reached, differentiate, filled, gradients
from hvp_engine.differentiation.gradient import DIRECT_ALONE
from hvp_engine.differentiation.missing_derivatives import other_leaves
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.errors import GraphError, SecondDerivativeError
from hvp_engine.hypergradients.implicit import implicit_gradient
from hvp_engine.hypergradients.short_series import TapeSystem, plain_series
from hvp_engine.hypergradients.stale_graphs import refused_if_stale
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import check_solver

OptionalTensors = Tensors | Sequence[Tensor | None] | Mapping[Any, Tensor | None]

Products = Literal["recorded", "eager"]
"""Who makes the products: a program that the gradient's graph is turned into, or autograd every time."""


def approx_inverse_hvp(
    v: OptionalTensors,
    f: OptionalTensors,
    w: Tensors,
    iterations: int,
    alpha: float | Literal["auto"],
    *,
    damping: float = 0.0,
    engine: Products = "recorded",
) -> Tensor | tuple[Tensor, ...]:
    """[df/dw + damping I]^-1 v, approximately: alpha * sum_{j=0..iterations} (I - alpha (df/dw + damping I))^j v.

    Arguments:
        v: the vector, in a sequence like `w`, or in a dict with the keys of `w`; None in it, as from
            `allow_unused=True`, is zero. Or one flat vector, the elements of all weights one after another.
        f: dL_T/dw with its graph (`create_graph=True`), in any of the forms of `v`; or the 0-dim loss L_T itself.
        w: the weights that `f` was computed from, on one device: a tensor, a sequence or a dict of tensors, or a
            module, for its parameters that require grad.
        iterations: Hessian-vector products, i; the sum has i + 1 terms. 0 gives alpha * v.
        alpha: the step, 0 < alpha < 2 / lambda_max for convergence; "auto" estimates it by 8 more products.
        damping: added to the diagonal of the Hessian, >= 0.
        engine: "recorded" turns the graph of `f` into a program the second time that it sees one of its kind, and from
            the third time on runs that in place of autograd, with the same numbers up to rounding, where it is faster;
            "eager" leaves all products to autograd, which takes less memory where the forward was checkpointed.

    Returns a tuple like `w`, in the order of its dict or module, detached; a flat vector where `v` is one. The graph of
    `f` is kept.

    Cost: `iterations` Hessian-vector products (8 more for "auto"); two flat copies of the weights.

    Errors: `TypeError`/`ValueError` naming the argument; :class:`GraphError` for an `f` without a graph and a `v` of
    None alone; :class:`SecondDerivativeError`; :class:`DivergenceError` naming an alpha that would work.

    Source: Algorithm 3 of Lorraine, Vicol, Duvenaud 2019, with the final factor alpha that its box omits.

    >>> import torch, hvp_engine as hvp
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = (w ** 2 * torch.tensor([1.0, 0.5])).sum()              # H = diag(2, 1)
    >>> hvp.approx_inverse_hvp(torch.ones(2), loss, w, iterations=50, alpha=0.5)
    (tensor([0.5000, 1.0000]),)
    """
    solver = _series(iterations, alpha, damping)
    weights = as_list(w, "w")
    vector = as_list_like(v, weights, w, "v", "w")
    with refused_if_stale("f"):
        tape = _kind(engine)(_gradient_of(f, weights, w), weights, loss=f if _is_loss(f) else None, name="f")
    if not tape.facts.reaches_weights:
        raise GraphError(
            "f: expected gradients that depend on w; got a graph that reaches none of w: pass the tensors that "
            "the forward used (of a loss linear in w the Hessian is zero and has no inverse)"
        )
    vector = detached(vector)
    with refused_if_stale("f"):
        found = plain_series(tape, vector, solver)
        value, _ = TapeSystem(tape).general(vector, solver) if found is None else found
    return joined(value) if is_flat_for(v, weights, w) else tuple(value)


def hypergradient(
    train_loss: Tensor,
    val_loss: Tensor,
    weights: Tensors,
    hyperparameters: Tensors,
    solver: Solver | None = None,
    *,
    create_graph: bool = False,
    engine: Products = "recorded",
) -> tuple[Tensor, ...]:
    """dL_V/dlambda - (d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 dL_V/dw at the weights the losses were computed at.

    Arguments:
        train_loss, val_loss: scalar tensors with their graphs; both graphs are kept.
        weights: a tensor, a sequence or a dict of tensors, or a module (for its parameters that require grad), at
            (approximately) a minimum of the training loss.
        hyperparameters: tensors that require grad, in any of these forms.
        solver: how to invert the Hessian; default `Neumann(20)`, alpha estimated.
        create_graph: not supported; True raises.
        engine: as of :func:`approx_inverse_hvp`.

    Returns a tuple like `hyperparameters`, in the order of their dict or module, detached; zeros for one that neither
    loss uses.

    Cost: two gradients, the solver's products, one mixed product.

    Errors: :class:`GraphError` for a loss without a graph or of other weights, or if no hyperparameter is reachable
    although a loss depends on something beside the weights (if it does not, zeros are right, and a warning says so);
    else as :func:`approx_inverse_hvp`.

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
    kind = _kind(engine)
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
    active = _active(weight_list)
    with refused_if_stale("val_loss"):
        found = differentiate(val_loss, [*active, *hyper_list])
    count = len(active)
    if all(derivative is None for derivative in found[:count]):
        if other_leaves([val_loss], hyper_list):
            check_reached(found[:count], "val_loss")
        warnings.warn(f"val_loss does not depend on the weights: {DIRECT_ALONE}", stacklevel=2)
    vector = filled(found[:count], active)
    with refused_if_stale("train_loss"):
        tape = kind(gradients(train_loss, active, "train_loss"), active, hyper_list, train_loss, "train_loss")
    unused = not tape.facts.reaches_hyperparameters and all(direct is None for direct in found[count:])
    if unused and not other_leaves([train_loss, val_loss], weight_list):
        warnings.warn(
            "hyperparameters: neither loss depends on any of them, or on anything but the weights: the "
            "hypergradient is zero; compute the losses from the hyperparameters, without .detach() or .item()",
            stacklevel=2,
        )
        return tuple(torch.zeros_like(hyperparameter) for hyperparameter in hyper_list)
    with refused_if_stale("train_loss"):
        grads, _, _ = implicit_gradient(TapeSystem(tape), vector, found[count:], hyper_list, solver)
    return tuple(grads)


def best_response(
    train_loss: Tensor,
    weights: Tensors,
    hyperparameters: Tensors,
    solver: Solver | None = None,
    *,
    engine: Products = "recorded",
) -> tuple[Tensor, ...]:
    """The weights as a function w*(lambda): the identity forward, the implicit function theorem backward.

    Its backward pass takes a gradient g to -(d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 g, so `.backward()` of a validation
    loss computed from the result gives the hyperparameters both the direct and the indirect term.

    Arguments: as :func:`hypergradient`.

    Returns a tuple like `weights`, which shares memory with them and depends on the hyperparameters only.

    Cost: one gradient of the training loss at once; the solver's products and one mixed product in each backward pass.
    Memory: the graph of that gradient, kept as long as the result, and the solver's vectors.

    Errors: as :func:`hypergradient`; a backward pass with `create_graph=True` raises :class:`SecondDerivativeError`,
    since the result has first derivatives only.

    Source: Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2019,
    Theorem 1; as a function with its own backward pass: Blondel et al., Efficient and Modular Implicit
    Differentiation, NeurIPS 2022.

    >>> import torch, hvp_engine as hvp
    >>> decay = torch.tensor(1.0, requires_grad=True)
    >>> w = torch.tensor([0.5, 1.0], requires_grad=True)
    >>> train = ((w - torch.tensor([1.0, 2.0])) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> (ws,) = hvp.best_response(train, w, decay, hvp.Neumann(60))
    >>> ((ws ** 2).sum() / 2).backward()
    >>> decay.grad, w.grad
    (tensor(-0.6250), None)
    """
    kind = _kind(engine)
    solver = Neumann(20) if solver is None else solver
    check_solver(solver)
    weight_list, hyper_list = as_list(weights, "weights"), as_list(hyperparameters, "hyperparameters")
    check_scalar(train_loss, "train_loss")
    _require_grad(hyper_list)
    active = _active(weight_list)
    with refused_if_stale("train_loss"):
        tape = kind(gradients(train_loss, active, "train_loss"), active, hyper_list, train_loss, "train_loss")
    with torch.enable_grad():  # under torch.no_grad, too, what is computed from the result depends on it
        return _BestResponse.apply(tape, weight_list, solver, *hyper_list)


class _BestResponse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tape: Tape, weights: Sequence[Tensor], solver: Solver, *hyperparameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tape, ctx.solver, ctx.hyperparameters = tape, solver, hyperparameters
        ctx.active = [weight.requires_grad for weight in weights]
        return tuple(weight.detach() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise _no_second_derivative("best_response")
        if any(map(is_batched, grad_outputs)):
            raise GraphError(
                "best_response: expected one gradient at a time; got a batch of them (is_grads_batched or a transform "
                "of torch.func): loop over them, or call hvp.response_jacobian, which solves for all of them at once"
            )
        none = [None] * len(ctx.hyperparameters)
        vector = [g for g, active in zip(grad_outputs, ctx.active, strict=True) if active]
        with refused_if_stale("train_loss"):
            grads, _, _ = implicit_gradient(TapeSystem(ctx.tape), vector, none, ctx.hyperparameters, ctx.solver)
        return None, None, None, *grads


def _kind(engine: str) -> type[Tape]:
    """The linearization whose products the engine of this name makes."""
    kinds: dict[str, type[Tape]] = {"recorded": RecordedLinearization, "eager": Tape}
    if not isinstance(engine, str) or engine not in kinds:
        raise ValueError(
            f"engine: expected 'recorded' or 'eager' for a loss that autograd has recorded already; got {engine!r}: "
            "the other engines need the loss as a function (hvp.Hypergradient, hvp.HessianOperator)"
        )
    return kinds[engine]


def _series(iterations: int, alpha: float | Literal["auto"], damping: float) -> Neumann:
    """The solver; one made before, where these are plain numbers."""
    plain = type(iterations) is int and type(alpha) in (float, str) and type(damping) is float
    return (_same_series if plain else Neumann)(iterations, alpha, damping=damping)


@lru_cache(64)
def _same_series(iterations: int, alpha: float | Literal["auto"], damping: float) -> Neumann:
    return Neumann(iterations, alpha, damping=damping)


def _is_loss(f: Any) -> TypeGuard[Tensor]:
    return isinstance(f, Tensor) and f.dim() == 0


def _gradient_of(f: OptionalTensors, weights: list[Tensor], given: Tensors) -> list[Tensor] | Tensor:
    """The gradient with its graph, from the gradient or the loss that the caller passed; flat as it came, if it can."""
    if _is_loss(f):
        check_scalar(f, "f")
        return gradients(f, weights, "f")
    gradient: list[Tensor] | Tensor
    if is_flat_for(f, weights, given) and all(f.dtype is w.dtype and f.device == w.device for w in weights):
        gradient, has_graph = f, f.requires_grad
    else:
        gradient = as_list_like(f, weights, given, "f", "w")
        has_graph = any(g.requires_grad for g in gradient)
    if not has_graph:
        raise GraphError(
            "f: expected gradients with an autograd graph; got tensors that do not require grad: compute them by "
            "torch.autograd.grad(loss, w, create_graph=True)"
        )
    return gradient


def _active(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights that are not frozen: those do not respond, and would make the Hessian singular."""
    return [weight for weight in weights if weight.requires_grad] or list(weights)


def _require_grad(hyperparameters: Sequence[Tensor]) -> None:
    if not any(hyperparameter.requires_grad for hyperparameter in hyperparameters):
        raise GraphError("hyperparameters: expected tensors that require grad; got none that does")


def _no_second_derivative(name: str) -> SecondDerivativeError:
    return SecondDerivativeError(
        f"{name} gives first derivatives only; create_graph=True asked for a derivative of its result: "
        "leave create_graph out, or differentiate an unrolled training loop instead"
    )
