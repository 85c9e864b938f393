"""What public scripts hand over: flat vectors, None, dicts, modules, numbers of NumPy, autograd's tuple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems_with_known_answers import DTYPE, flat, randn
from torch import Tensor, nn

import hvp_engine as hvp


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


MODULE = net()
WEIGHTS = list(MODULE.parameters())
NAMES = [name for name, _ in MODULE.named_parameters()]
X = randn(9, 4, seed=1)
LOSS = MODULE(X).square().mean() + sum(w.square().sum() for w in WEIGHTS)
F = torch.autograd.grad(LOSS, WEIGHTS, create_graph=True)
JOINED = torch.cat([part.reshape(-1) for part in F])
V = [randn(*w.shape, seed=index) for index, w in enumerate(WEIGHTS)]
EXPECTED = hvp.approx_inverse_hvp(V, F, WEIGHTS, 3, 0.1)


def as_dict(tensors: Sequence[Any], names: Sequence[str] = NAMES) -> dict[str, Any]:
    return dict(zip(names, tensors, strict=True))


def backwards(tensors: Sequence[Any]) -> dict[str, Any]:
    return as_dict(list(tensors)[::-1], NAMES[::-1])


FORMS: dict[str, Callable[[], Any]] = {
    "tuple and list": lambda: hvp.approx_inverse_hvp(tuple(V), list(F), tuple(WEIGHTS), 3, 0.1),
    "iterators": lambda: hvp.approx_inverse_hvp(iter(V), iter(F), MODULE.parameters(), 3, 0.1),
    "module": lambda: hvp.approx_inverse_hvp(V, F, MODULE, 3, 0.1),
    "module and loss": lambda: hvp.approx_inverse_hvp(V, LOSS, MODULE, 3, 0.1),
    "dicts": lambda: hvp.approx_inverse_hvp(as_dict(V), as_dict(F), as_dict(WEIGHTS), 3, 0.1),
    "dicts by key": lambda: hvp.approx_inverse_hvp(backwards(V), backwards(F), as_dict(WEIGHTS), 3, 0.1),
    "dicts and module": lambda: hvp.approx_inverse_hvp(backwards(V), F, MODULE, 3, 0.1),
    "named_parameters": lambda: hvp.approx_inverse_hvp(V, F, dict(MODULE.named_parameters()), 3, 0.1),
    "flat f alone": lambda: hvp.approx_inverse_hvp(V, JOINED, WEIGHTS, 3, 0.1),
    "numpy": lambda: hvp.approx_inverse_hvp(V, F, WEIGHTS, np.int64(3), np.float64(0.1), damping=np.float32(0)),
    "numpy arrays": lambda: hvp.approx_inverse_hvp(V, F, WEIGHTS, np.array(3), np.array([0.1])),
    "tensors": lambda: hvp.approx_inverse_hvp(
        V, F, WEIGHTS, torch.tensor(3), torch.tensor(0.1, dtype=DTYPE, requires_grad=True), damping=torch.zeros(1)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_does_not_matter(form: str) -> None:
    found = FORMS[form]()
    assert isinstance(found, tuple)
    for a, b in zip(found, EXPECTED, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weights", [WEIGHTS, MODULE, as_dict(WEIGHTS)], ids=["list", "module", "dict"])
@pytest.mark.parametrize("f", [F, JOINED, LOSS], ids=["list", "flat", "loss"])
def test_a_flat_vector_comes_back_flat(weights: Any, f: Any) -> None:
    torch.testing.assert_close(hvp.approx_inverse_hvp(flat(V), f, weights, 3, 0.1), flat(EXPECTED))


def test_a_flat_vector_of_one_weight() -> None:
    w = randn(2, 3, seed=1).requires_grad_()
    v = randn(2, 3, seed=2)
    found = hvp.approx_inverse_hvp(v.reshape(-1), w.pow(4).sum(), w, 3, 0.01)
    (expected,) = hvp.approx_inverse_hvp(v, w.pow(4).sum(), [w], 3, 0.01)
    torch.testing.assert_close(found, expected.reshape(-1))
    row = w.detach()[0].requires_grad_()  # its own shape is flat: then the result is a tuple as ever
    assert isinstance(hvp.approx_inverse_hvp(v[0], row.pow(4).sum(), row, 3, 0.01), tuple)


@pytest.mark.parametrize("container", [list, as_dict], ids=["list", "dict"])
def test_none_is_zero(container: Callable[[Sequence[Any]], Any]) -> None:
    """As `allow_unused=True` gives it: for a loss that does not use the last bias."""
    loss = nn.functional.linear(MODULE[:2](X), MODULE[2].weight).square().sum()
    f = torch.autograd.grad(loss, WEIGHTS, create_graph=True, allow_unused=True)
    assert f[3] is None
    found = hvp.approx_inverse_hvp(container([*V[:3], None]), container(f), container(WEIGHTS), 3, 0.01)
    expected = hvp.approx_inverse_hvp(V[:3], f[:3], WEIGHTS[:3], 3, 0.01)
    for a, b in zip(found, [*expected, torch.zeros(2, dtype=DTYPE)], strict=True):
        torch.testing.assert_close(a, b)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "short": (
        lambda: hvp.approx_inverse_hvp(flat(V)[1:], F, WEIGHTS, 3, 0.1),
        ValueError,
        r"^v: expected 4 tensors, one for each of w, or one flat vector of their 23 elements; got 1 of shape \(22,\)",
    ),
    "keys": (
        lambda: hvp.approx_inverse_hvp({**as_dict(V[:3], NAMES[:3]), "bias": V[3]}, F, MODULE, 3, 0.1),
        ValueError,
        r"^v: expected the keys of w; these are in one of them only: '2.bias', 'bias'",
    ),
    "no parameter": (lambda: hvp.approx_inverse_hvp(V, F, nn.Tanh(), 3, 0.1), ValueError, "^w: expected at least one"),
    "all None": (lambda: hvp.approx_inverse_hvp(V, [None] * 4, WEIGHTS, 3, 0.1), hvp.GraphError, "^f: "),
    "nested dict": (
        lambda: hvp.approx_inverse_hvp(V, F, {"layer": as_dict(WEIGHTS)}, 3, 0.1),
        TypeError,
        "^w: expected a flat sequence of tensors; got nested containers",
    ),
    "count of a half": (lambda: hvp.Neumann(torch.tensor(2.5)), TypeError, "^iterations: expected an int"),
    "truth": (lambda: hvp.Neumann(np.bool_(True)), TypeError, "^iterations: expected an int"),
    "true tensor": (lambda: hvp.Neumann(torch.tensor(True)), TypeError, "^iterations: expected an int"),
    "many alphas": (
        lambda: hvp.Neumann(3, torch.ones(2)),
        TypeError,
        '^alpha: expected "auto" or a finite number > 0; got Tensor',
    ),
    "complex": (lambda: hvp.Neumann(3, np.complex64(1)), TypeError, '^alpha: expected "auto" or a finite'),
    "nan": (lambda: hvp.Neumann(3, np.float32("nan")), ValueError, "^alpha: expected a finite number > 0; got nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("number", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_solvers_keep_plain_numbers(number: Callable[[Any], Any]) -> None:
    two, half = number(2), number(0.5)
    solvers: list[Any] = [
        hvp.Neumann(two, half, damping=half),
        hvp.Identity(damping=half),
        hvp.Chebyshev(two, (half, two), damping=half),
        hvp.ConjugateGradient(two, half, half, atol=half),
        hvp.MINRES(two, half, half, atol=half),
        hvp.Nystrom(two, half, half),
        hvp.Exact(max_size=two, damping=half),
        hvp.Budget(error=half, hvps=two, damping=half),
    ]
    for solver in solvers:
        assert solver.damping == 0.5
        for value in vars(solver).values():
            assert not isinstance(value, Tensor | np.ndarray | np.generic)
    assert solvers[0] == hvp.Neumann(2, 0.5, damping=0.5) and hash(solvers[2]) == hash(
        hvp.Chebyshev(2, (0.5, 2), damping=0.5)
    )


PRODUCTS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "a list": (lambda z: torch.autograd.grad(F, WEIGHTS, z, retain_graph=True), V),
    "a tuple for which a list comes": (lambda z: list(torch.autograd.grad(F, WEIGHTS, z, retain_graph=True)), tuple(V)),
    "a tensor": (lambda z: torch.autograd.grad(F[0], WEIGHTS[0], z, retain_graph=True), V[0]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_autograds_tuple_is_put_into_the_container_of_v(name: str) -> None:
    product, v = PRODUCTS[name]
    found = hvp.solve(product, v, hvp.Neumann(3, 0.1)).value
    assert type(found) is type(v)
    weights, f = (WEIGHTS, F) if isinstance(v, list | tuple) else (WEIGHTS[0], F[0])
    expected = hvp.approx_inverse_hvp(v, f, weights, 3, 0.1)
    for a, b in zip([found] if isinstance(found, Tensor) else found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_none_in_a_product_is_zero() -> None:
    w = [randn(3, seed=1).requires_grad_(), randn(2, seed=2).requires_grad_()]
    (f,) = torch.autograd.grad(w[0].pow(4).sum(), w[:1], create_graph=True)
    v = [torch.ones_like(part) for part in w]
    found = hvp.solve(
        lambda z: torch.autograd.grad(f, w, z[0], retain_graph=True, allow_unused=True), v, hvp.Neumann(3, 0.01)
    ).value
    (expected,) = hvp.approx_inverse_hvp(v[0], f, w[0], 3, 0.01)
    torch.testing.assert_close(found, [expected, 0.04 * v[1]])


def test_a_first_guess_from_autograd() -> None:
    product, v = PRODUCTS["a list"]
    from_tuple, from_list = (
        hvp.solve(product, v, hvp.Neumann(3, 0.1), x0=kind(EXPECTED)).value for kind in (tuple, list)
    )
    torch.testing.assert_close(from_tuple, from_list)


def test_a_product_in_another_container_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^operator\(v\): expected the container of v"):
        hvp.solve(lambda z: {"w": z}, V[0], hvp.Neumann(3, 0.1))
    with pytest.raises(ValueError, match=r"^operator\(v\): expected the container of v"):
        hvp.solve(lambda z: (z, z), V[0], hvp.Neumann(3, 0.1))


@pytest.mark.parametrize("style", ["hypergradient", "best_response"])
def test_modules_and_dicts_as_weights_and_hyperparameters(style: str) -> None:
    hyper = nn.Linear(3, 4).double()
    train = MODULE(X[:, :3] @ hyper.weight.T + hyper.bias).square().mean() + sum(w.square().sum() for w in WEIGHTS)
    hypers, solver = list(hyper.parameters()), hvp.Neumann(4, 0.1)
    val = MODULE(X).square().mean()

    def call(weights: Any, hyperparameters: Any) -> Any:
        if style == "hypergradient":
            return hvp.hypergradient(train, val, weights, hyperparameters, solver)
        response = hvp.best_response(train, weights, hyperparameters, solver)
        value = torch.func.functional_call(MODULE, as_dict(response), X).square().mean()
        return torch.autograd.grad(value, hypers)

    expected = call(WEIGHTS, hypers)
    for found in (call(MODULE, hyper), call(as_dict(WEIGHTS), {"weight": hypers[0], "bias": hypers[1]})):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_multiple_of_an_operator_by_a_number_of_numpy() -> None:
    H = hvp.HessianOperator(lambda w: w.pow(4).sum(), V[1])
    torch.testing.assert_close((H * np.float32(0.5)) @ V[1], (0.5 * H) @ V[1])
    with pytest.raises(TypeError):
        H * "2"  # type: ignore[operator]
