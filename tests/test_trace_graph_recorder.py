"""The recorder of graphs: what it writes down, what it refuses, and what it leaves behind."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import hvp_engine as hvp
from hvp_engine.differentiation.trace.alias_recorder import of_own_memory
from hvp_engine.differentiation.trace.graph_recorder import (
    ControlFlowError,
    LayoutError,
    ValueDependenceError,
    record_graph,
)
from hvp_engine.differentiation.trace.value_watch import KEPT, WatchfulRecorder

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)
OUTSIDE = torch.tensor([2.0, 7.0, 1.0], dtype=torch.float64)
PART = OUTSIDE[1]
aten = torch.ops.aten


def recorded_right(function: Callable[..., Any], *arguments: Tensor) -> torch.fx.GraphModule:
    """The graph, which gives what the function gives at other arguments, too."""
    module = WatchfulRecorder().record(function, list(map(of_own_memory, arguments)))
    others = [argument * 1.5 + 0.1 for argument in arguments]
    for point in (arguments, others):
        torch.testing.assert_close(module(*point), function(*point))
    return module


def second_derivative(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((x.sin() * OUTSIDE).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient @ OUTSIDE, x)[0]


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).mul_(x)
    return y


def foreach(x: Tensor) -> list[Tensor]:
    y = [x * 2, x.sin()]
    torch._foreach_add_(y, 1.0)
    return y


def by_numbers(x: Tensor) -> Tensor:
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
    scale[0] += 5.0
    return x * scale


def by_numbers_of_the_default_dtype(x: Tensor) -> Tensor:
    scale = torch.Tensor([1.0, 2.0, 3.0])
    scale.mul_(2)
    return x * scale.mul_(torch.from_numpy(numpy.ones(3, dtype=numpy.float32)).add_(1))


def another_memory(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    y.data = x
    return y * x


def step_of_an_optimizer(x: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=x.dtype))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with torch.enable_grad():
        (parameter * x).sum().backward()
    optimizer.step()
    return parameter.detach() * x


class Kind(Tensor):
    """A class of somebody's own, without operations of its own."""


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.reshape(1, 3).matmul(OUTSIDE.clone())


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "several results": lambda x: x.sort(),
    "parts": lambda x: [part * 2 for part in x.split(2)],
    "a tensor from outside": lambda x: x * OUTSIDE + OUTSIDE,
    "an input as it is": lambda x: (x, x),
    "None among results": lambda x: [x.exp(), None],
    "second derivative": second_derivative,
    "written in place": in_place,
    "lists written in place": foreach,
    "numbers": by_numbers,
    "numbers, written whole": by_numbers_of_the_default_dtype,
    "other memory": another_memory,
    "step of an optimizer": step_of_an_optimizer,
    "a parameter of an input": lambda x: (torch.nn.Parameter(x) * torch.nn.Parameter(x * 2)).detach(),
    "a subclass without operations": lambda x: (x.as_subclass(Kind) * 2).sin().as_subclass(Tensor),
    "memory that only others know": lambda x: x * OUTSIDE[0] + PART + OUTSIDE,
    "sparse": lambda x: torch.sparse.mm(torch.eye(3, dtype=x.dtype).to_sparse(), x[:, None]),
    "vmap": lambda x: torch.vmap(lambda row: row.sin().sum())(torch.outer(x, OUTSIDE)),
    "grad of func": torch.func.grad(lambda x: (x**3).sum()),
    "forward over reverse": lambda x: torch.func.jvp(torch.func.grad(lambda y: (y**3).sum()), (x,), (OUTSIDE,))[1],
    "hessian": torch.func.hessian(lambda x: (x.sin() * OUTSIDE).prod()),
    "inference mode": in_inference_mode,
    "a subclass": lambda x: TwoTensor(x, x * 2).sin().b,
    "by name": lambda x: torch.sum(input=x.expand(2, 3), dim=[0], keepdim=True),
    "factories": lambda x: torch.arange(3, dtype=x.dtype) * x + torch.full((3,), 2.0, dtype=x.dtype),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graphs(name: str) -> None:
    recorded_right(FUNCTIONS[name], X)


def test_nodes_know_what_their_values_are_like() -> None:
    module = recorded_right(lambda x: x.sort(), X)
    node = next(node for node in module.graph.nodes if node.target is aten.sort.default)
    assert [(t.shape, t.dtype) for t in node.meta["val"]] == [(X.shape, X.dtype), (X.shape, torch.int64)]


def test_an_input_that_the_function_has_from_outside_too() -> None:
    """It is that tensor on all calls, if the input has memory of its own; else it cannot be told from a view of it."""
    module = WatchfulRecorder().record(lambda x: x * X, [of_own_memory(X)])
    torch.testing.assert_close(module(Y), Y * X)
    for function in (lambda x: x * X, lambda x: x * torch.nn.Parameter(x), lambda x: x.as_subclass(Kind) * x):
        with pytest.raises(ValueDependenceError, match="memory of an input"):
            WatchfulRecorder().record(function, [X.detach()])


VALUES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "of numbers": (lambda x: x * torch.tensor([2.0, 3.0]).sum().item(), 1),
    "from outside": (lambda x: x * OUTSIDE.max().item(), 1),
    "from outside, twice": (lambda x: x * (OUTSIDE + Y).tolist()[0], 2),
    "a mask from outside": (lambda x: x[OUTSIDE > 1.5].sum(), 1),
    "of shapes": (lambda x: x * torch.ones_like(x).numel(), 0),
    "factories": (lambda x: x * torch.ones(3).sum().item(), 0),
    "written from outside": (lambda x: x * torch.zeros(3).add_(OUTSIDE).sum().item(), 1),
    "beside a write": (lambda x: (x * 2).add_(OUTSIDE) * OUTSIDE.max().item(), 1),
    "numpy": (lambda x: x * float(OUTSIDE.numpy().max()), 1),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_input_decides_are_kept(name: str) -> None:
    function, count = VALUES[name]
    module = WatchfulRecorder().record(function, [X])
    assert len({id(tensor) for tensor in module.meta[KEPT]}) == count
    torch.testing.assert_close(module(Y), function(Y))


def written_through_a_view(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    y[0] = x.sum()
    return x * (y * 1).sum().item()


def written_through_a_view_of_a_view(x: Tensor) -> Tensor:
    y = torch.zeros(2, 3, dtype=x.dtype)
    row, column = y[0], y.t()[0]
    column.copy_(x[:2])
    return x * row.sum().item()


def written_as_a_list(x: Tensor) -> Tensor:
    y = [torch.zeros(3, dtype=x.dtype)]
    torch._foreach_add_(y, [x])
    return x * y[0].sum().item()


def written_by_name(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    torch.sin(x, out=y)
    return x * y.sum().item()


DEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * float(x.numpy()[0]),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: x * float(torch.equal(x, X)),
    "view": written_through_a_view,
    "view of a view": written_through_a_view_of_a_view,
    "list": written_as_a_list,
    "out": written_by_name,
    "numbers in a list": lambda x: x * torch.tensor([x[0], 1.0, 2.0]),
    "numbers in a list, as_tensor": lambda x: x * torch.as_tensor([x[0], 1.0, 2.0]),
    "numbers in a list, under grad": lambda x: torch.func.grad(lambda y: (y * torch.tensor([y[0], 1.0, 2.0])).sum())(x),
    "sizes of parts": lambda x: torch.tensor_split(OUTSIDE, x.long())[0].sum() * x,
    "a packed sequence": lambda x: torch.nn.utils.rnn.pack_padded_sequence(
        OUTSIDE[None], x[:1].abs().long() + 1, batch_first=True
    )[0],
    "its memory": lambda x: copy.copy(x) * x,
    "random": lambda x: x * torch.rand(3).sum().item(),
    "random in place": lambda x: x * torch.zeros(3).uniform_().sum().item(),
    "random, by way of a mask": lambda x: OUTSIDE[torch.rand(3) > 0.5].sum() * x,
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_values_of_inputs_and_random_ones_are_refused(name: str) -> None:
    with pytest.raises(ValueDependenceError):
        WatchfulRecorder().record(DEPENDENT[name], [X])


def test_functions_of_functions_are_refused() -> None:
    with pytest.raises(ControlFlowError, match="cond"):
        record_graph(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, [x]), [X])


def test_tensors_of_kinds_that_no_graph_holds_are_refused() -> None:
    with pytest.raises(LayoutError, match="compressed sparse"):
        WatchfulRecorder().record(lambda x: torch.eye(3, dtype=x.dtype).to_sparse_csr() @ x, [X])
    with pytest.raises(LayoutError, match="TwoTensor"):
        WatchfulRecorder().record(lambda x: x.a, [TwoTensor(X, Y)])
    with pytest.raises(LayoutError, match="without values"):
        WatchfulRecorder().record(lambda x: torch.func.linearize(torch.sin, x)[1](x), [X])


def test_nothing_is_left_on_tensors_from_outside() -> None:
    before = dict(vars(OUTSIDE)), dict(vars(X))
    record_graph(lambda x: x * OUTSIDE + X, [X])
    assert (dict(vars(OUTSIDE)), dict(vars(X))) == before
    with pytest.raises(ZeroDivisionError):
        record_graph(lambda x: x * OUTSIDE / (1 // 0), [X])
    assert dict(vars(OUTSIDE)) == before[0]


def test_nothing_is_left_on_tensors_that_the_function_keeps() -> None:
    kept: dict[str, Tensor] = {}

    def function(x: Tensor) -> Tensor:
        kept["y"] = (x * 2).detach()
        return kept["y"].sin()

    WatchfulRecorder().record(function, [X])
    assert not vars(kept["y"]) and not vars(kept["y"].untyped_storage()) and not vars(X.untyped_storage())
    torch.save(copy.deepcopy(kept), io.BytesIO())


def test_a_mask_that_is_written_inside() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        mask = torch.zeros(3, dtype=torch.bool)
        mask[:2] = True
        return ((w * x)[mask] ** 3).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a fallback would be
        product = hvp.HessianOperator(loss, X, Y, engine="linearized") @ torch.ones_like(X)
    torch.testing.assert_close(product, torch.tensor([6.0, 6.0, 0.0], dtype=X.dtype) * X * Y**3)


def test_sparse_matrices_in_a_batch() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (torch.sparse.mm(x, w[:, None]) ** 3).sum() + (w @ w) ** 2

    for engine in ("linearized", "recorded"):
        operator = hvp.HessianOperator(loss, X, torch.diag(Y).to_sparse(), engine=engine)
        expected = 6 * X * Y**3 + 8 * X * X.sum() + 4 * X.dot(X)
        torch.testing.assert_close(operator @ torch.ones_like(X), expected)


def test_sparse_matrices_with_other_numbers_of_elements() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ((x @ w[:, None]) ** 3).sum() / x._nnz()

    batches = [torch.diag(Y * (torch.arange(3) < count)).to_sparse() for count in (2, 3, 2)]
    batches += [batch.to_sparse_csr() for batch in batches]
    for engine in ("recorded", "auto"):
        hypergradient = hvp.Hypergradient(
            lambda w, h, x: loss(w, x) + h * w.square().sum(), lambda w, h, x: loss(w, x), hvp.Neumann(3, 1e-3), engine
        )
        plain = hvp.Hypergradient(hypergradient.train_loss, hypergradient.val_loss, hvp.Neumann(3, 1e-3), "eager")
        for batch in batches:
            h = torch.tensor(0.1, dtype=X.dtype)
            torch.testing.assert_close(hypergradient(X, h, batch, batch).grads, plain(X, h, batch, batch).grads)


def test_an_input_without_memory_of_its_own() -> None:
    wide = torch.tensor([2.0], dtype=X.dtype).expand(3)
    module = WatchfulRecorder().record(lambda x: x[1:] * OUTSIDE[0] + OUTSIDE[1:], [wide])
    torch.testing.assert_close(module(Y), Y[1:] * OUTSIDE[0] + OUTSIDE[1:])


@pytest.mark.parametrize("change", ["data", "numpy"])
def test_values_from_outside_that_torch_does_not_see_change(change: str) -> None:
    scale = torch.tensor([2.0], dtype=torch.float64)

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return scale.item() * ((w - h * x) ** 2).sum()

    linearized, eager = (
        hvp.Hypergradient(loss, loss, hvp.Neumann(3, 0.1), engine) for engine in ("linearized", "eager")
    )
    h = torch.tensor(0.5, dtype=torch.float64)
    linearized(X, h, Y, Y)
    if change == "data":
        scale.data.mul_(3)
    else:
        scale.numpy()[:] = 6.0
    with pytest.warns(UserWarning, match="linearized"):
        changed = linearized(X, h, Y, Y).grads
    torch.testing.assert_close(changed, eager(X, h, Y, Y).grads)
