"""Losses whose first derivative is finite where the second is not: the message says so, and its remedy works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor

import hvp_engine as hvp

ZERO = torch.zeros(3, dtype=DTYPE)
V = randn(3, seed=1)

SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda w: (w - 1).square().sum() + w.norm(),
    "vector_norm": lambda w: (w - 1).square().sum() + torch.linalg.vector_norm(w),
    "power": lambda w: (w - 1).square().sum() + w.abs().pow(1.5).sum(),
}
FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda w: (w - 1).square().sum() + w.square().sum().sqrt(),
    "root": lambda w: (w - 1).square().sum() + w.abs().sqrt().sum(),
}


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("solver", [hvp.Neumann(5), hvp.Neumann(5, 0.1), hvp.ConjugateGradient(5)], ids=repr)
@pytest.mark.parametrize("name", [*SECOND, *FIRST])
def test_the_message_says_so(name: str, solver: Any, engine: str) -> None:
    loss = {**SECOND, **FIRST}[name]
    H = hvp.HessianOperator(loss, ZERO, engine=engine)
    what = (
        "some operator in the loss has no finite second derivative at this point" if name in SECOND else "its gradient"
    )
    with pytest.raises(
        (hvp.NonFiniteError, hvp.DivergenceError), match=f"expected finite products; .*{what}.*norm, sqrt"
    ):
        H.solve(V, solver)


def test_tape_style() -> None:
    w = ZERO.clone().requires_grad_()
    with pytest.raises(hvp.NonFiniteError, match="no finite second derivative at this point, as of norm.*1e-12"):
        hvp.approx_inverse_hvp(V, SECOND["norm"](w), w, 5, "auto")


def test_the_remedy_works() -> None:
    H = hvp.HessianOperator(lambda w: (w - 1).square().sum() + (w.square().sum() + 1e-12).sqrt(), ZERO)
    solution = H.solve(V, hvp.ConjugateGradient(10))
    torch.testing.assert_close(solution.value, V / (2 + 1e6))


def test_bad_weights_are_not_blamed_on_an_operator() -> None:
    w = torch.full((3,), float("nan"), dtype=DTYPE)
    with pytest.raises(hvp.NonFiniteError, match="the loss is nan at these weights: check the inputs and weights"):
        hvp.HessianOperator(SECOND["norm"], w, engine="eager").solve(V, hvp.Neumann(5))
