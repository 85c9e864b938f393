"""The lines of the migration table, each against its version's formula, written down here with a dense Hessian."""

from __future__ import annotations

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn
from torch import Tensor

import hvp_engine as hvp

H = matrix_with([0.2, 0.5, 0.9, 1.3, 1.8], seed=1)
B = randn(5, 2, seed=2)
W, HYPER = randn(5, seed=3).requires_grad_(), randn(2, seed=4).requires_grad_()
TRAIN = W @ H @ W / 2 + W @ B @ HYPER + HYPER.square().sum()
VAL = (W - 1).square().sum() / 2 + 3 * HYPER.sum()
V = (W - 1).detach()
(F,) = torch.autograd.grad(TRAIN, W, create_graph=True)
I = torch.eye(5, dtype=DTYPE)  # noqa: E741
DIRECT = torch.full((2,), 3.0, dtype=DTYPE)


def terms(alpha: float, count: int) -> list[Tensor]:
    """(I - alpha H)^j v for j < count."""
    return [torch.linalg.matrix_power(I - alpha * H, power) @ V for power in range(count)]


def ours(solver: object) -> Tensor:
    return hvp.solve(lambda v: H @ v, V, solver).value


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_implicit_hyper_opt() -> None:
    parts = [torch.nn.Parameter(W.detach()[:2]), torch.nn.Parameter(W.detach()[2:].view(3, 1))]
    w = torch.cat([part.reshape(-1) for part in parts])
    f = torch.cat([g.reshape(-1) for g in torch.autograd.grad(w @ H @ w / 2, parts, create_graph=True)])
    counter = total = V
    for _ in range(4):
        product = torch.autograd.grad(f, parts, counter, retain_graph=True)
        counter = counter - 0.3 * torch.cat([part.reshape(-1) for part in product])
        total = total + counter
    found = hvp.approx_inverse_hvp(V, f, torch.nn.ParameterList(parts), 4, 0.3)
    assert isinstance(found, Tensor)
    close(found, 0.3 * total)


def test_betty_with_its_defaults() -> None:
    (found,) = hvp.approx_inverse_hvp(V, F, W, 3, 1.0)
    close(found, sum(terms(1.0, 4), torch.zeros(5, dtype=DTYPE)))


def test_auxilearn() -> None:
    alpha, count = 0.1, 3
    theirs = -B.T @ sum(terms(alpha, count + 1), torch.zeros(5, dtype=DTYPE))
    (found,) = hvp.hypergradient(TRAIN, VAL, W, HYPER, hvp.Neumann(count, alpha))
    close((found - DIRECT) / alpha, theirs)


def test_stocbio() -> None:
    eta, count = 0.4, 6
    powers = terms(eta, count + 1)
    theirs = sum(powers[1:], eta * powers[count])
    last, before = (ours(hvp.Neumann(n, eta)) for n in (count, count - 1))
    close(last / eta - V + last - before, theirs)


def test_imaml() -> None:
    lam, coefficient, damping = 2.0, 1.0, 10.0
    c = lam + damping
    x, r = torch.zeros_like(V), V
    p = r
    for _ in range(10):
        image = (1 + coefficient) * p + H @ p / c
        step = r @ r / (p @ image)
        x, rest = x + step * p, r - step * image
        p, r = rest + (rest @ rest) / (r @ r) * p, rest
        if r @ r < 1e-10:
            break
    solver = hvp.ConjugateGradient(10, tol=0.0, damping=(1 + coefficient) * c, atol=1e-5)
    close(c * ours(solver), x)


def test_pytorch_influence_functions() -> None:
    damp, scale, depth = 0.01, 5.0, 30
    h = V
    for _ in range(depth):
        h = V + (1 - damp) * h - H @ h / scale
    close(scale * ours(hvp.Neumann(depth, 1 / scale, damping=damp * scale)), h)


@pytest.mark.parametrize("dampen", [0.0, 0.02])
def test_pydvl_lissa(dampen: float) -> None:
    regularization, scale, count = 0.1, 10.0, 25
    h = V
    for _ in range(count):
        h = V + (1 - dampen) * h - (H @ h + regularization * h) / scale
    close(ours(hvp.Neumann(count, 1 / scale, damping=regularization + dampen * scale)), h / scale)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-7, 1e-7), (1e-1, 1e-7), (1e-7, 0.2)])
def test_pydvl_conjugate_gradients(rtol: float, atol: float) -> None:
    A, x = H + 0.1 * I, V
    p = r = V - A @ x
    while r.norm() > max(rtol * V.norm(), atol):
        step = r @ r / (p @ A @ p)
        x, rest = x + step * p, r - step * A @ p
        p, r = rest + (rest @ rest) / (r @ r) * p, rest
    solver = hvp.ConjugateGradient(50, tol=rtol, damping=0.1, atol=atol)
    close(hvp.solve(lambda v: H @ v, V, solver, x0=V).value, x)


def test_boat() -> None:
    step, count = 0.3, 5
    (mapped,) = [W - step * F]
    vs = total = V
    for _ in range(count):
        (vs,) = torch.autograd.grad(mapped, W, vs, retain_graph=True)
        total = total + vs
    (indirect,) = torch.autograd.grad(mapped, HYPER, total, retain_graph=True)
    (found,) = hvp.hypergradient(TRAIN, VAL, W, HYPER, hvp.Neumann(count, step))
    close(found, indirect + DIRECT)
