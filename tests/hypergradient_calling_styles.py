"""One hypergradient in every style of calling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems_with_known_answers import Bilevel
from torch import Tensor

import hvp_engine as hvp


def tape_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    (grad,) = hvp.hypergradient(problem.train_loss(w, h, None), problem.val_loss(w, h, None), w, h, solver)
    return grad


def functional_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    hypergradient = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver)
    return hypergradient(problem.weights if w is None else w, problem.hyper, None, None).grads


def best_response_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, solver)
    problem.val_loss(response, h, None).backward()
    assert w.grad is None
    assert h.grad is not None
    return h.grad


def by_hand(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    """Assembled from approx_inverse_hvp, as in public training scripts."""
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    f = torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)
    v, direct = torch.autograd.grad(problem.val_loss(w, h, None), [w, h])
    p = hvp.approx_inverse_hvp(v, f, w, solver.iterations, solver.alpha, damping=solver.damping)
    (mixed,) = torch.autograd.grad(f, h, p)
    return direct - mixed


STYLES: dict[str, Callable[..., Tensor]] = {
    "tape": tape_style,
    "functional": functional_style,
    "best_response": best_response_style,
    "by hand": by_hand,
}
