"""What the caller gets wrong: an error that names the argument, and nothing of the caller's changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import DTYPE, randn
from torch import Tensor, nn

import hvp_engine as hvp

LINEAR = nn.Linear(2, 2)


class World:
    """A small problem in tape and functional form, with gradients and a frozen flag that have to stay."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.w = [randn(3, seed=1).requires_grad_(), randn(2, 2, seed=2).requires_grad_()]
        self.h = torch.tensor(0.2, dtype=DTYPE, requires_grad=True)
        self.v = [randn(3, seed=3), randn(2, 2, seed=4)]
        for tensor in (*self.w, self.h):
            tensor.grad = torch.ones_like(tensor)
        self.loss = self.train(self.w, self.h, None)
        self.value = self.val(self.w, self.h, None)
        self.f = list(torch.autograd.grad(self.loss, self.w, create_graph=True))

    def train(self, w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return h.exp() * (w[0].square().sum() + w[1].pow(4).sum())

    def val(self, w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return w[0].sum() + w[1].sum() + h

    def snapshot(self) -> list[Any]:
        tensors = [*self.w, self.h, *self.v, *self.f, self.loss]
        return [
            *(tensor.detach().clone() for tensor in tensors),
            *(tensor.grad.clone() for tensor in (*self.w, self.h)),
            *(tensor.requires_grad for tensor in tensors),
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        ]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        before = self.snapshot()
        yield
        for a, b in zip(before, self.snapshot(), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        torch.autograd.grad(self.loss, self.w, retain_graph=True)  # the graph is still there

    def refuses(self, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
        with self.unchanged(), pytest.raises(error, match=message):
            call()


@pytest.fixture
def world() -> World:
    return World()


def nan_like(tensors: list[Tensor], value: float = math.nan) -> list[Tensor]:
    bad = [tensor.clone() for tensor in tensors]
    bad[1][0, 1] = value
    return bad


INVERSE_HVP: dict[str, tuple[Callable[[World], dict[str, Any]], type[Exception], str]] = {
    # v
    "v too short": (lambda a: {"v": a.v[:1]}, ValueError, r"^v: expected 2 tensors, one for each of w; got 1"),
    "v too long": (lambda a: {"v": [*a.v, a.v[0]]}, ValueError, r"^v: expected 2 tensors.*got 3"),
    "v shape": (lambda a: {"v": [a.v[1], a.v[0]]}, ValueError, r"^v\[0\]: expected shape \(3,\).*got \(2, 2\)"),
    "v integer": (lambda a: {"v": [a.v[0].long(), a.v[1]]}, TypeError, r"^v\[0\]: .*floating dtype.*torch.int64"),
    "v complex": (lambda a: {"v": [a.v[0] * 1j, a.v[1]]}, TypeError, r"^v\[0\]: .*floating dtype.*complex"),
    "v device": (lambda a: {"v": [t.to("meta") for t in a.v]}, ValueError, r"^v\[0\]: expected device cpu.*got meta"),
    "v devices": (lambda a: {"v": [a.v[0], a.v[1].to("meta")]}, ValueError, r"^v: expected all tensors on one device"),
    "v number": (lambda a: {"v": 1.0}, TypeError, r"^v: expected a tensor or a sequence of tensors; got float"),
    "v list of numbers": (lambda a: {"v": [1.0, 2.0]}, TypeError, r"^v\[0\]: expected a tensor; got float"),
    "v none": (lambda a: {"v": None}, TypeError, r"^v: .*got NoneType"),
    "v nested": (lambda a: {"v": [[a.v[0]], [a.v[1]]]}, TypeError, r"^v: expected a flat sequence"),
    "v empty": (lambda a: {"v": []}, ValueError, r"^v: expected at least one tensor"),
    "v nan": (lambda a: {"v": nan_like(a.v)}, ValueError, r"^v: expected finite values; got NaN or Inf"),
    "v inf": (lambda a: {"v": nan_like(a.v, math.inf)}, ValueError, r"^v: expected finite values; got NaN or Inf"),
    # f
    "f too short": (lambda a: {"f": a.f[:1]}, ValueError, r"^f: expected 2 tensors, one for each of w; got 1"),
    "f shape": (lambda a: {"f": a.f[::-1]}, ValueError, r"^f\[0\]: expected shape \(3,\).*got \(2, 2\)"),
    "f integer": (lambda a: {"f": [t.long() for t in a.f]}, TypeError, r"^f\[0\]: .*floating dtype"),
    "f device": (lambda a: {"f": [t.to("meta") for t in a.f]}, ValueError, r"^f\[0\]: expected device cpu.*got meta"),
    "f without graph": (lambda a: {"f": [t.detach() for t in a.f]}, hvp.GraphError, r"^f: .*create_graph=True"),
    "f loss without graph": (lambda a: {"f": a.loss.detach()}, hvp.GraphError, r"^f: expected a loss with an autograd"),
    "f of other weights": (
        lambda a: {"f": World().f},
        hvp.GraphError,
        r"^f: expected gradients that depend on w; got a graph that reaches none",
    ),
    "f loss of other weights": (lambda a: {"f": World().loss}, hvp.GraphError, r"^f: .*reaches none of the 2 weights"),
    "f not reduced": (lambda a: {"f": a.w[0].square()}, ValueError, r"^f: expected 2 tensors.*got 1"),
    "f number": (lambda a: {"f": 1.0}, TypeError, r"^f: .*got float"),
    "f nan": (lambda a: {"f": a.loss * math.nan}, hvp.NonFiniteError, r"^f: expected finite products; the loss is nan"),
    "f inf": (lambda a: {"f": a.loss * math.inf}, hvp.NonFiniteError, r"^f: expected finite products; the loss is inf"),
    # w
    "w empty": (lambda a: {"w": []}, ValueError, r"^w: expected at least one tensor; got an empty list"),
    "w integer": (lambda a: {"w": [a.w[0].long(), a.w[1]]}, TypeError, r"^w\[0\]: .*floating dtype"),
    "w module": (lambda a: {"w": nn.Linear(2, 2)}, TypeError, r"^w: expected a tensor or a sequence.*got Linear"),
    "w too short": (lambda a: {"w": a.w[:1]}, ValueError, r"^v: expected 1 tensors, one for each of w; got 2"),
    "w devices": (lambda a: {"w": [a.w[0], a.w[1].to("meta")]}, ValueError, r"^w: expected all tensors on one device"),
    "w all frozen": (
        lambda a: {"w": [t.detach() for t in a.w]},
        hvp.GraphError,
        r"^f: .*reaches none",
    ),
    # iterations
    "iterations negative": (lambda a: {"iterations": -1}, ValueError, r"^iterations: expected .*>= 0; got -1"),
    "iterations float": (lambda a: {"iterations": 2.0}, TypeError, r"^iterations: expected an int; got float"),
    "iterations bool": (lambda a: {"iterations": True}, TypeError, r"^iterations: expected an int; got bool"),
    # alpha
    "alpha nan": (lambda a: {"alpha": math.nan}, ValueError, r"^alpha: expected a finite number > 0; got nan"),
    "alpha inf": (lambda a: {"alpha": math.inf}, ValueError, r"^alpha: expected a finite number > 0; got inf"),
    "alpha zero": (lambda a: {"alpha": 0.0}, ValueError, r"^alpha: expected a finite number > 0; got 0"),
    "alpha negative": (lambda a: {"alpha": -0.1}, ValueError, r"^alpha: expected a finite number > 0; got -0.1"),
    "alpha word": (lambda a: {"alpha": "automatic"}, TypeError, r"^alpha: expected a number.*; got"),
    "alpha none": (lambda a: {"alpha": None}, TypeError, r"^alpha: expected a number.*; got NoneType"),
    # damping
    "damping negative": (lambda a: {"damping": -1.0}, ValueError, r"^damping: expected a finite number >= 0; got -1"),
    "damping nan": (lambda a: {"damping": math.nan}, ValueError, r"^damping: expected a finite number >= 0; got nan"),
    "damping word": (lambda a: {"damping": "x"}, TypeError, r"^damping: expected a number; got str"),
}


@pytest.mark.parametrize("name", INVERSE_HVP)
@pytest.mark.parametrize("f", ["loss", "gradient"])
@pytest.mark.parametrize("alpha", [0.01, "auto"])
def test_approx_inverse_hvp(name: str, f: str, alpha: float | str, world: World) -> None:
    changed, error, message = INVERSE_HVP[name]
    arguments = {"v": world.v, "f": world.loss if f == "loss" else world.f, "w": world.w, "iterations": 3}
    arguments |= {"alpha": alpha, **changed(world)}
    world.refuses(error, message, lambda: hvp.approx_inverse_hvp(**arguments))


def test_v_wider_than_the_weights() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"^v\[0\]: expected a dtype no wider than torch.float32.*got torch.float64"):
        hvp.approx_inverse_hvp(torch.ones(3, dtype=DTYPE), w.square().sum(), w, 2, 0.1)
    assert torch.equal(w, torch.ones(3)) and w.grad is None


def test_f_wider_than_the_weights() -> None:
    w = torch.ones(3, requires_grad=True)
    f = torch.autograd.grad(w.square().sum(), w, create_graph=True)[0].double()
    with pytest.raises(TypeError, match=r"^f\[0\]: expected a dtype no wider than torch.float32.*got torch.float64"):
        hvp.approx_inverse_hvp(torch.ones(3), f, w, 2, 0.1)


TAPE: dict[str, tuple[Callable[[World], dict[str, Any]], type[Exception], str]] = {
    "train_loss vector": (lambda a: {"train_loss": a.w[0] * 2}, ValueError, r"^train_loss: expected a scalar.*\(3,\)"),
    "train_loss number": (
        lambda a: {"train_loss": 1.0},
        TypeError,
        r"^train_loss: expected a scalar tensor; got float",
    ),
    "train_loss detached": (
        lambda a: {"train_loss": a.loss.detach()},
        hvp.GraphError,
        r"^train_loss: .*autograd graph",
    ),
    "train_loss of others": (lambda a: {"train_loss": World().loss}, hvp.GraphError, r"^train_loss: .*reaches none"),
    "train_loss nan": (lambda a: {"train_loss": a.loss * math.nan}, hvp.NonFiniteError, r"^train_loss: .*loss is nan"),
    "train_loss inf": (lambda a: {"train_loss": a.loss * math.inf}, hvp.NonFiniteError, r"^train_loss: .*loss is inf"),
    "val_loss vector": (lambda a: {"val_loss": a.w[0] * 2}, ValueError, r"^val_loss: expected a scalar.*\(3,\)"),
    "val_loss number": (lambda a: {"val_loss": 1.0}, TypeError, r"^val_loss: expected a scalar tensor; got float"),
    "val_loss detached": (lambda a: {"val_loss": a.value.detach()}, hvp.GraphError, r"^val_loss: .*autograd graph"),
    "val_loss nan": (
        lambda a: {"val_loss": a.value * math.nan},
        hvp.NonFiniteError,
        r"val_loss: expected finite values",
    ),
    "weights empty": (lambda a: {"weights": []}, ValueError, r"^weights: expected at least one tensor"),
    "weights number": (lambda a: {"weights": 3}, TypeError, r"^weights: .*got int"),
    "hyper empty": (lambda a: {"hyperparameters": []}, ValueError, r"^hyperparameters: expected at least one tensor"),
    "hyper frozen": (lambda a: {"hyperparameters": a.h.detach()}, hvp.GraphError, r"^hyperparameters: .*require grad"),
    "hyper elsewhere": (
        lambda a: {"hyperparameters": torch.ones((), requires_grad=True)},
        hvp.GraphError,
        r"^hyperparameters: expected at least one that .* depends on",
    ),
}


@pytest.mark.parametrize("solver", [20, hvp.Neumann, "neumann"])
def test_solver_is_checked_in_every_style(solver: Any, world: World) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: hvp.hypergradient(world.loss, world.value, world.w, world.h, solver),
        lambda: hvp.best_response(world.loss, world.w, world.h, solver),
        lambda: hvp.Hypergradient(world.train, world.val, solver),
        lambda: hvp.solve(lambda v: v, world.v, solver),
    ]
    for call in calls:
        world.refuses(TypeError, r"^solver: expected a solver such as hvp.Neumann\(20\); got (int|type|str)", call)


@pytest.mark.parametrize("name", TAPE)
@pytest.mark.parametrize("alpha", [0.01, "auto"])
@pytest.mark.parametrize("style", ["hypergradient", "best_response"])
def test_tape_style(name: str, alpha: float | str, style: str, world: World) -> None:
    changed, error, message = TAPE[name]
    arguments = {"train_loss": world.loss, "val_loss": world.value, "weights": world.w, "hyperparameters": world.h}
    arguments |= {"solver": hvp.Neumann(3, alpha=alpha), **changed(world)}

    def call() -> None:
        if style == "hypergradient":
            hvp.hypergradient(**arguments)
            return
        del arguments["val_loss"]
        response = hvp.best_response(**arguments)
        torch.autograd.grad(sum(part.sum() for part in response), arguments["hyperparameters"])

    if style == "best_response" and name.startswith("val_loss"):
        pytest.raises(TypeError, hvp.best_response, **arguments)  # it takes none
    else:
        world.refuses(error, message, call)


def test_best_response_with_a_non_finite_validation_loss(world: World) -> None:
    response = hvp.best_response(world.loss, world.w, world.h, hvp.Neumann(3))
    value = math.nan * response[0].sum()
    world.refuses(hvp.NonFiniteError, "val_loss: expected finite values", lambda: torch.autograd.grad(value, world.h))


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
    "hyper number": (lambda a: {"hyper": 0.1}, TypeError, r"^hyper: expected a tensor; got float"),
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


SOLVERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "iterations": (lambda: hvp.Neumann(-3), ValueError, r"^iterations: expected .*>= 0; got -3"),
    "iterations type": (lambda: hvp.Neumann("20"), TypeError, r"^iterations: expected an int; got str"),
    "alpha": (lambda: hvp.Neumann(3, alpha=-1), ValueError, r"^alpha: expected a finite number > 0; got -1"),
    "alpha type": (lambda: hvp.Neumann(3, alpha=torch.tensor(0.1)), TypeError, r"^alpha: .*got Tensor"),
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
    "inner_steps float": (lambda a: {"inner_steps": 1.5}, ValueError, r"^inner_steps: expected an int >= 1; got 1.5"),
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
        r"^v: expected 2 tensors of the weights' shapes, \(2, 2\), \(2,\); got 2, \(2, 2\), \(2, 2\)",
    ),
    "conjugate gradients, a weight that only the validation loss uses": (
        lambda: hvp.Hypergradient(
            lambda w, h, b: (torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE) * (w[0] - h) ** 2).sum() / 2,
            lambda w, h, b: w[0].square().sum() + w[1].square().sum(),
            hvp.ConjugateGradient(10),
            "eager",
        )([torch.ones(3, dtype=DTYPE), torch.ones(2, dtype=DTYPE)], torch.full((3,), 0.5, dtype=DTYPE), None, None),
        hvp.DivergenceError,
        r"the residual grew .*\(limit 4.5e\+15\).* the training loss does not use a weight.*hvp.MINRES or damping",
    ),
    "linear model, sparse": (
        lambda: hvp.LinearModelOperator(torch.eye(2).to_sparse(), torch.ones(2), loss="squared"),
        TypeError,
        r"^inputs: expected a dense tensor; got layout torch.sparse_coo: use .to_dense\(\)",
    ),
    "linear model, targets": (
        lambda: hvp.LinearModelOperator(torch.eye(2), torch.ones(2), loss="squared", targets=[1.0, 2.0]),
        TypeError,
        r"^targets: expected a tensor or None; got list",
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
