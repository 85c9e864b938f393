"""As test_bad_input.py, where the losses are computed already."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE
from refused_calls import World, nan_like
from torch import nn

import hvp_engine as hvp


@pytest.fixture
def world() -> World:
    return World()


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
    "v all none": (
        lambda a: {"v": [None, None]},
        hvp.GraphError,
        r"^v: expected a gradient for at least one of w; got None for each: .* does not depend on w",
    ),
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
    "w module": (
        lambda a: {"w": nn.Linear(2, 2).double()},
        ValueError,
        r"^v\[0\]: expected shape \(2, 2\) as w.*got \(3,\)",
    ),
    "w too short": (lambda a: {"w": a.w[:1]}, ValueError, r"^v: expected 1 tensors, one for each of w; got 2"),
    "w devices": (lambda a: {"w": [a.w[0], a.w[1].to("meta")]}, ValueError, r"^w: expected all tensors on one device"),
    "w all frozen": (
        lambda a: {"w": [t.detach() for t in a.w]},
        hvp.GraphError,
        r"^f: .*reaches none",
    ),
    # iterations
    "iterations negative": (lambda a: {"iterations": -1}, ValueError, r"^iterations: expected .*>= 0; got -1"),
    "iterations float": (lambda a: {"iterations": 2.0}, TypeError, r"^iterations: expected an int >= 0; got float"),
    "iterations bool": (lambda a: {"iterations": True}, TypeError, r"^iterations: expected an int >= 0; got bool"),
    # alpha
    "alpha nan": (lambda a: {"alpha": math.nan}, ValueError, r"^alpha: expected a finite number > 0; got nan"),
    "alpha inf": (lambda a: {"alpha": math.inf}, ValueError, r"^alpha: expected a finite number > 0; got inf"),
    "alpha zero": (lambda a: {"alpha": 0.0}, ValueError, r"^alpha: expected a finite number > 0; got 0"),
    "alpha negative": (lambda a: {"alpha": -0.1}, ValueError, r"^alpha: expected a finite number > 0; got -0.1"),
    "alpha word": (lambda a: {"alpha": "automatic"}, TypeError, r"^alpha: expected \"auto\" or .*got 'automatic'"),
    "alpha none": (
        lambda a: {"alpha": None},
        TypeError,
        r'^alpha: expected "auto" or a finite number > 0; got NoneType',
    ),
    # damping
    "damping negative": (lambda a: {"damping": -1.0}, ValueError, r"^damping: expected a finite number >= 0; got -1"),
    "damping nan": (lambda a: {"damping": math.nan}, ValueError, r"^damping: expected a finite number >= 0; got nan"),
    "damping word": (lambda a: {"damping": "x"}, TypeError, r"^damping: expected a finite number >= 0; got 'x'"),
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
    with pytest.raises(
        TypeError, match=r"^v\[0\]: expected a floating dtype no wider than torch.float32.*got torch.float64"
    ):
        hvp.approx_inverse_hvp(torch.ones(3, dtype=DTYPE), w.square().sum(), w, 2, 0.1)
    assert torch.equal(w, torch.ones(3)) and w.grad is None


def test_f_wider_than_the_weights() -> None:
    w = torch.ones(3, requires_grad=True)
    f = torch.autograd.grad(w.square().sum(), w, create_graph=True)[0].double()
    with pytest.raises(
        TypeError, match=r"^f\[0\]: expected a floating dtype no wider than torch.float32.*got torch.float64"
    ):
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
    "val_loss of others": (lambda a: {"val_loss": World().value}, hvp.GraphError, r"^val_loss: .*reaches none"),
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
        world.refuses(
            TypeError, r"^solver: expected a solver such as hvp.Neumann\(20\); got (int|the class|'neum)", call
        )


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


@pytest.mark.parametrize("engine", ["eager", "recorded"])
def test_graphs_that_were_freed_name_their_argument(world: World, engine: Any) -> None:
    def calls(spent: str) -> tuple[torch.Tensor, torch.Tensor]:
        again = World()
        losses = {"train_loss": again.loss, "val_loss": (again.w[0] ** 2).sum() + (again.w[1] ** 2).sum()}
        losses[spent].backward()
        return hvp.hypergradient(**losses, weights=again.w, hyperparameters=again.h, engine=engine)

    for spent in ("train_loss", "val_loss"):
        with pytest.raises(hvp.GraphError, match=f"^{spent}: expected a graph that can still .* retain_graph=True"):
            calls(spent)
    torch.autograd.grad(world.f, world.w, world.v)
    with pytest.raises(hvp.GraphError, match=r"^f: expected a graph that can still be differentiated.*compute f again"):
        hvp.approx_inverse_hvp(world.v, world.f, world.w, 3, 0.1, engine=engine)


@pytest.mark.parametrize("engine", ["eager", "recorded"])
def test_weights_that_were_changed_since_name_the_argument(world: World, engine: Any) -> None:
    (response, *_) = hvp.best_response(world.loss, world.w, world.h, hvp.Neumann(3), engine=engine)
    with torch.no_grad():
        for weight in world.w:
            weight.mul_(2.0)
    with pytest.raises(hvp.GraphError, match=r"^f: .*changed in place afterwards, as optimizer.step\(\)"):
        hvp.approx_inverse_hvp(world.v, world.f, world.w, 3, 0.1, engine=engine)
    with pytest.raises(hvp.GraphError, match=r"^train_loss: .*changed in place afterwards"):
        response.square().sum().backward()


def test_best_response_refuses_a_batch_of_gradients(world: World) -> None:
    response = hvp.best_response(world.loss, world.w, world.h, hvp.Neumann(3))[0]
    rows = torch.eye(response.numel(), dtype=DTYPE).view(-1, *response.shape)
    with pytest.raises(hvp.GraphError, match="one gradient at a time.*hvp.response_jacobian"):
        torch.autograd.grad(response, world.h, rows, is_grads_batched=True)


def test_best_response_under_no_grad_is_differentiable(world: World) -> None:
    expected = hvp.best_response(world.loss, world.w, world.h, hvp.Neumann(3))[0]
    with torch.no_grad():
        found = hvp.best_response(world.loss, world.w, world.h, hvp.Neumann(3))[0]
    for ours, true in zip(*(torch.autograd.grad(r.square().sum(), world.h) for r in (found, expected)), strict=True):
        assert torch.allclose(ours, true)
