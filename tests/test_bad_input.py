"""What the caller gets wrong: an error that names the argument, and nothing of the caller's changed.

Where the losses are computed already: test_bad_input_tape.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE
from refused_calls import World
from torch import Tensor, nn

import hvp_engine as hvp

LINEAR = nn.Linear(2, 2)


@pytest.fixture
def world() -> World:
    return World()


FUNCTIONAL: dict[str, tuple[Callable[[World], dict[str, Any]], type[Exception], str]] = {
    "train_loss not callable": (lambda a: {"train_loss": a.loss}, TypeError, r"^train_loss: expected a function"),
    "val_loss not callable": (lambda a: {"val_loss": 3}, TypeError, r"^val_loss: expected a function.*got int"),
    "train_loss vector": (
        lambda a: {"train_loss": lambda w, h, b: w[0] * h},
        ValueError,
        r"^train_loss: .*scalar.*\(3,\)",
    ),
    "train_loss number": (lambda a: {"train_loss": lambda w, h, b: 2.0}, TypeError, r"^train_loss: .*got float"),
    "train_loss integer": (
        lambda a: {"train_loss": lambda w, h, b: torch.tensor(2)},
        TypeError,
        r"^train_loss: expected a floating dtype; got torch.int64",
    ),
    "train_loss constant": (
        lambda a: {"train_loss": lambda w, h, b: torch.tensor(2.0)},
        hvp.GraphError,
        r"^train_loss: expected a loss with an autograd graph",
    ),
    "train_loss of hyper only": (
        lambda a: {"train_loss": lambda w, h, b: h**2},
        hvp.GraphError,
        r"^train_loss: .*none",
    ),
    "train_loss nan": (
        lambda a: {"train_loss": lambda w, h, b: a.train(w, h, b) * math.nan},
        hvp.NonFiniteError,
        r"^train_loss: expected finite products; the loss is nan",
    ),
    "val_loss vector": (lambda a: {"val_loss": lambda w, h, b: w[0]}, ValueError, r"^val_loss: .*scalar.*\(3,\)"),
    "val_loss constant": (lambda a: {"val_loss": lambda w, h, b: torch.tensor(2.0)}, hvp.GraphError, r"^val_loss: "),
    "val_loss nan": (
        lambda a: {"val_loss": lambda w, h, b: a.val(w, h, b) * math.nan},
        hvp.NonFiniteError,
        r"val_loss: expected finite values",
    ),
    "no hyperparameter": (
        lambda a: {"train_loss": lambda w, h, b: a.train(w, a.h.detach(), b), "val_loss": lambda w, h, b: w[0].sum()},
        hvp.GraphError,
        r"^hyperparameters: expected at least one",
    ),
    "val_loss of others": (
        lambda a: {"val_loss": lambda w, h, b: World().value + h},
        hvp.GraphError,
        r"^val_loss: .*reaches none of the 2 weights: .*hvp.functional",
    ),
    "engine class": (
        lambda a: {"engine": hvp.engines.EagerEngine},
        TypeError,
        r"^engine: expected a name, .* got the class EagerEngine itself",
    ),
    "engine none": (lambda a: {"engine": None}, TypeError, r"^engine: expected a name, .* got NoneType"),
    "engine": (lambda a: {"engine": "warp"}, ValueError, r"^engine: expected one of .*'eager'.*; got 'warp'"),
    "weights empty": (
        lambda a: {"weights": []},
        ValueError,
        r"^weights: expected at least one tensor; got an empty list",
    ),
    "weights number": (lambda a: {"weights": [a.w[0], 1.0]}, TypeError, r"^weights\[1\]: expected a tensor; got float"),
    "weights integer": (lambda a: {"weights": [a.w[0].long(), a.w[1]]}, TypeError, r"^weights\[0\]: .*torch.int64"),
    "weights without any": (lambda a: {"weights": nn.ReLU()}, ValueError, r"^weights: expected at least one tensor"),
    "hyper empty": (lambda a: {"hyper": {}}, ValueError, r"^hyper: expected at least one tensor; got an empty dict"),
    "hyper number": (lambda a: {"hyper": 0.1}, TypeError, r"^hyper: .*got float: pass torch.tensor\(0.1\)"),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("alpha", [0.01, "auto"])
def test_hypergradient_object(name: str, alpha: float | str, world: World) -> None:
    changed, error, message = FUNCTIONAL[name]
    arguments: dict[str, Any] = {"train_loss": world.train, "val_loss": world.val, "weights": world.w, "hyper": world.h}
    arguments |= {"engine": "eager", **changed(world)}

    def call() -> None:
        weights, hyper = arguments.pop("weights"), arguments.pop("hyper")
        hvp.Hypergradient(**arguments, solver=hvp.Neumann(3, alpha=alpha))(weights, hyper, None, None)

    world.refuses(error, message, call)


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_a_validation_loss_of_hyperparameters_alone(engine: str, world: World) -> None:
    """It has a direct term, and a warning; with other weights than those it was given it is refused every time."""
    hypergradient = hvp.Hypergradient(world.train, lambda w, h, b: h.square(), hvp.Neumann(3, 0.01), engine)
    with pytest.warns(UserWarning, match="^val_loss does not depend on the weights: the hypergradient is the direct"):
        assert float(hypergradient(world.w, world.h, None, None).grads) == pytest.approx(0.4)
    others = [w.detach().clone().requires_grad_() for w in world.w]
    hypergradient = hvp.Hypergradient(world.train, lambda w, h, b: world.val(others, h, b), engine=engine)
    for _ in range(3):
        with pytest.raises(hvp.GraphError, match="^val_loss: .*reaches none"):
            hypergradient(world.w, world.h, None, None)


SOLVERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "iterations": (lambda: hvp.Neumann(-3), ValueError, r"^iterations: expected .*>= 0; got -3"),
    "iterations type": (lambda: hvp.Neumann("20"), TypeError, r"^iterations: expected an int >= 0; got '20'"),
    "alpha word": (
        lambda: hvp.Neumann(3, alpha="Auto"),
        TypeError,
        r"^alpha: expected \"auto\" or a finite number > 0; got 'Auto'",
    ),
    "rho word": (lambda: hvp.Nystrom(3, rho="Auto"), TypeError, r"^rho: expected \"auto\" or .*; got 'Auto'"),
    "damping word": (
        lambda: hvp.Budget(hvps=3, damping="on"),
        TypeError,
        r"^damping: expected \"auto\" or .*; got 'on'",
    ),
    "bounds word": (lambda: hvp.Chebyshev(3, bounds="Auto"), TypeError, r"^bounds: expected 'auto' or .*; got 'Auto'"),
    "preconditioner class": (
        lambda: hvp.ConjugateGradient(3, preconditioner=hvp.JacobiPreconditioner),
        TypeError,
        r"^preconditioner: .*; got the class JacobiPreconditioner itself",
    ),
    "alpha": (lambda: hvp.Neumann(3, alpha=-1), ValueError, r"^alpha: expected a finite number > 0; got -1"),
    "alpha type": (lambda: hvp.Neumann(3, alpha=torch.tensor([0.1, 0.2])), TypeError, r"^alpha: .*got Tensor"),
    "form": (
        lambda: hvp.Neumann(3, form="nested"),
        ValueError,
        r"^form: expected 'accumulate' or 'horner'; got 'nested'",
    ),
    "damping": (lambda: hvp.Neumann(3, damping=-0.5), ValueError, r"^damping: expected a finite number >= 0; got -0.5"),
    "identity damping": (lambda: hvp.Identity(damping=math.inf), ValueError, r"^damping: .*got inf"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_validate_at_construction(name: str) -> None:
    build, error, message = SOLVERS[name]
    with pytest.raises(error, match=message):
        build()


OPERATORS: dict[str, tuple[Callable[[World], Any], type[Exception], str]] = {
    "operator": (
        lambda a: hvp.solve(3, a.v, hvp.Neumann(2)),
        TypeError,
        r"^operator: expected an operator or a callable",
    ),
    "solver number": (
        lambda a: hvp.solve(lambda v: v, a.v, 20),
        TypeError,
        r"^solver: expected a solver such as .*got int",
    ),
    "solver class": (
        lambda a: hvp.solve(lambda v: v, a.v, hvp.Neumann),
        TypeError,
        r"^solver: expected a solver such as",
    ),
    "solver none": (lambda a: hvp.solve(lambda v: v, a.v, None), TypeError, r"^solver: .*got NoneType"),
    "v empty": (lambda a: hvp.solve(lambda v: v, [], hvp.Neumann(2)), ValueError, r"^v: expected at least one tensor"),
    "v shape": (
        lambda a: hvp.HessianOperator(lambda w: a.train(w, a.h, 0), a.w).solve(a.v[::-1], hvp.Neumann(2)),
        ValueError,
        r"^v\[0\]: expected shape \(3,\) as weights\[0\]",
    ),
    "matmul shape": (
        lambda a: hvp.HessianOperator(lambda w: a.train(w, a.h, 0), a.w) @ a.v[::-1],
        ValueError,
        r"^v\[0\]: expected shape \(3,\) as weights\[0\]",
    ),
    "matmul length": (
        lambda a: hvp.HessianOperator(lambda w: a.train(w, a.h, 0), a.w) @ a.v[0],
        ValueError,
        r"^v: expected 2 tensors",
    ),
    "loss vector": (lambda a: hvp.HessianOperator(lambda w: w[0], a.w), ValueError, r"^loss: expected a scalar tensor"),
    "loss constant": (
        lambda a: hvp.HessianOperator(lambda w: torch.tensor(1.0), a.w),
        hvp.GraphError,
        r"^loss: expected a loss with an autograd graph",
    ),
    "loss nan": (
        lambda a: hvp.HessianOperator(lambda w: a.train(w, a.h, 0) * math.nan, a.w).solve(a.v, hvp.Neumann(2)),
        hvp.NonFiniteError,
        r"the loss is nan at these weights",
    ),
    "weights": (lambda a: hvp.HessianOperator(lambda w: w, []), ValueError, r"^weights: expected at least one tensor"),
    "engine": (
        lambda a: hvp.HessianOperator(lambda w: a.train(w, a.h, 0), a.w, engine="gpu"),
        ValueError,
        r"^engine: expected one of .*; got 'gpu'",
    ),
    "module": (lambda a: hvp.functional(lambda x: x), TypeError, r"^module: expected a torch.nn.Module; got function"),
    "functional weights": (
        lambda a: hvp.functional(LINEAR)([a.v[1]], a.v[1]),
        TypeError,
        r"^weights: expected a dict from parameter names to tensors; got list",
    ),
    "functional name": (
        lambda a: hvp.functional(LINEAR)({"wieght": a.v[1]}, a.v[1]),
        ValueError,
        r"^weights: expected names of the module's parameters; got 'wieght': known are bias, weight",
    ),
    "backend": (
        lambda a: hvp.use_backend("fortran").__enter__(),
        ValueError,
        r"^backend: expected 'auto' or one of .*'reference'.*; got 'fortran'",
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_solve(name: str, world: World) -> None:
    call, error, message = OPERATORS[name]
    world.refuses(error, message, lambda: call(world))


def test_backend_that_cannot_run_here_says_why(world: World) -> None:
    def call() -> None:
        with hvp.use_backend("cuda"):
            hvp.approx_inverse_hvp(world.v, world.loss, world.w, 2, 0.1)

    world.refuses(hvp.BackendError, "backend 'cuda' is not available on device cpu: .*doctor", call)
    hvp.approx_inverse_hvp(world.v, world.loss, world.w, 2, 0.1)  # and the choice does not stick


TUNER: dict[str, tuple[Callable[[World], dict[str, Any]], type[Exception], str]] = {
    "inner_steps zero": (lambda a: {"inner_steps": 0}, ValueError, r"^inner_steps: expected an int >= 1; got 0"),
    "inner_steps float": (lambda a: {"inner_steps": 1.5}, TypeError, r"^inner_steps: expected an int >= 1; got float"),
    "module": (lambda a: {"module": nn.ReLU()}, ValueError, r"^module: expected at least one tensor"),
    "hyper": (lambda a: {"hyper": []}, ValueError, r"^hyper: expected at least one tensor"),
    "engine": (lambda a: {"engine": "warp"}, ValueError, r"^engine: expected one of .*; got 'warp'"),
    "train_loss": (lambda a: {"train_loss": a.loss}, TypeError, r"^train_loss: expected a function"),
    "weight_optimizer": (
        lambda a: {"weight_optimizer": lambda tensors: 3},
        TypeError,
        r"^weight_optimizer: expected a torch optimizer or a function that makes one; got int",
    ),
    "hyper_optimizer": (
        lambda a: {"hyper_optimizer": torch.optim.SGD(a.w, lr=0.1)},
        ValueError,
        r"^hyper_optimizer: expected an optimizer over the tuner's tensors; got one over none",
    ),
}


@pytest.mark.parametrize("name", TUNER)
def test_tuner(name: str, world: World) -> None:
    changed, error, message = TUNER[name]
    sgd = lambda tensors: torch.optim.SGD(tensors, lr=0.1)  # noqa: E731
    arguments: dict[str, Any] = {
        "module": world.w,
        "hyper": world.h,
        "train_loss": world.train,
        "val_loss": world.val,
        "weight_optimizer": sgd,
        "hyper_optimizer": sgd,
        **changed(world),
    }
    world.refuses(error, message, lambda: hvp.Tuner(**arguments))


def square(w: Tensor, batch: Any = None) -> Tensor:
    return w.square().sum()


NAN = torch.full((3,), math.nan)
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "influence of nan": (
        lambda: hvp.influence_matrix(
            lambda v: v, lambda w, x: (w * x).sum(), lambda w, x: w.sum(), torch.ones(3), NAN, torch.ones(1)
        ),
        hvp.NonFiniteError,
        r"^train_examples: expected finite gradients.*3 of them, the first at index 0",
    ),
    "nystrom of nan": (
        lambda: hvp.HessianOperator(lambda w: w.pow(3).sum(), NAN).solve(torch.ones(3), hvp.Nystrom(2)),
        hvp.NonFiniteError,
        r"expected finite products",
    ),
    "nystrom preconditioner of nan": (
        lambda: hvp.NystromPreconditioner(hvp.HessianOperator(lambda w: w.pow(3).sum(), NAN), 2, 0.1),
        hvp.NonFiniteError,
        r"^operator: expected finite products; got NaN or Inf",
    ),
    "nystrom preconditioner, shape": (
        lambda: hvp.NystromPreconditioner(hvp.HessianOperator(square, torch.ones(3)), 2, 0.1)([torch.ones(1)]),
        ValueError,
        r"^v\[0\]: expected shape \(3,\) as weights\[0\]; got \(1,\)",
    ),
    "kfac of nan": (
        lambda: hvp.KFACPreconditioner(
            LINEAR, lambda o, y: o.square().sum(), dict(LINEAR.named_parameters()), NAN[None, :2], None, 0.1
        ),
        hvp.NonFiniteError,
        r"^inputs: expected finite activations and curvature; got NaN or Inf",
    ),
    "kfac, shape": (
        lambda: hvp.KFACPreconditioner(
            LINEAR, lambda o, y: o.square().sum(), dict(LINEAR.named_parameters()), torch.ones(1, 2), None, 0.1
        )([torch.ones(2, 2), torch.ones(2, 2)]),
        ValueError,
        r"^v\[1\]: expected shape \(2,\) as weights\[1\]; got \(2, 2\)",
    ),
    "conjugate gradients, a weight that only the validation loss uses": (
        lambda: hvp.Hypergradient(
            lambda w, h, b: (torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE) * (w[0] - h) ** 2).sum() / 2,
            lambda w, h, b: w[0].square().sum() + w[1].square().sum(),
            hvp.ConjugateGradient(10),
            "eager",
        )([torch.ones(3, dtype=DTYPE), torch.ones(2, dtype=DTYPE)], torch.full((3,), 0.5, dtype=DTYPE), None, None),
        hvp.DivergenceError,
        r"the residual grew .*\(limit 4.5e\+15\).* a weight that the training loss does not use.*hvp.MINRES or damping",
    ),
    "linear model, sparse": (
        lambda: hvp.LinearModelOperator(torch.eye(2).to_sparse(), torch.ones(2), loss="squared"),
        TypeError,
        r"^inputs: expected a dense tensor of shape \(2, 2\) .*; got layout torch.sparse_coo: use .to_dense\(\)",
    ),
    "linear model, targets": (
        lambda: hvp.LinearModelOperator(torch.eye(2), torch.ones(2), loss="squared", targets=[1.0, 2.0]),
        TypeError,
        r"^targets: expected a tensor or None of shape \(2,\) .*; got list",
    ),
    "tuner, expanded": (
        lambda: hvp.Tuner(
            [torch.ones(2), torch.ones(1).expand(3)],
            torch.ones(1),
            square,
            square,
            weight_optimizer=torch.optim.SGD,
            hyper_optimizer=torch.optim.SGD,
        ),
        ValueError,
        r"^module\[1\]: expected memory for every element.*strides \(0,\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_elsewhere(name: str) -> None:
    call, error, message = OTHERS[name]
    with pytest.raises(error, match=message):
        call()
