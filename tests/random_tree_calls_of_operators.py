"""Calls with operators on random trees, and their closed forms: products, solvers, preconditioners, eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fused_op_oracles import F32, F64
from hypothesis import strategies as st
from losses_on_random_trees import ALPHA, TERMS, Found, Subject, World
from problems_with_known_answers import DTYPE, randn, truncated_sum
from random_tree_calls_of_losses import rows_of
from random_trees import ANYWHERE, CONTAINERS, SILENT, UNLIKE, Sample, joined, like, numbers, split
from torch import Tensor, nn

import hvp_engine as hvp

# Operators


def hessian_operator(world: World) -> Found:
    made = hvp.HessianOperator(world.losses.alone, world.weights.tree, engine=world.engine)
    world.propagates = world.draw(st.booleans())
    if world.propagates:
        return made @ world.v.tree, world.losses.hessian(world.weights.numbers) @ world.v.numbers
    found = made.solve(world.v.tree, world.solver).value
    return found, world.losses.inverse(world.weights.numbers, world.damping) @ world.v.numbers


def averaged(world: World) -> Found:
    world.propagates = True
    made = hvp.HessianOperator(hvp.Averaged(world.losses.alone), world.weights.tree, [1.0, 2.0], engine="eager")
    return made @ world.v.tree, 1.5 * world.losses.hessian(world.weights.numbers) @ world.v.numbers


def data_parallel(world: World) -> Found:
    world.propagates = True
    loss = hvp.DataParallel(world.losses.alone)
    made = hvp.HessianOperator(loss, world.weights.tree, 2.0, engine="eager")
    return made @ world.v.tree, 2 * world.losses.hessian(world.weights.numbers) @ world.v.numbers


def stochastic(world: World) -> Found:
    world.propagates = True
    batches = [torch.tensor(1.0), torch.tensor(3.0)]
    made = hvp.StochasticHessianOperator(world.losses.alone, world.weights.tree, batches, engine="eager")
    found = [made @ world.v.tree, made @ world.v.tree]
    once = world.losses.hessian(world.weights.numbers) @ world.v.numbers
    return found, torch.cat([once, 3 * once])


def gauss_newton(world: World) -> Found:
    """Outputs X (w + w^3 / 3), as a tree, and half their squares as loss: G = J^T J, J = X diag(1 + w^2)."""
    world.propagates = True
    size = len(world.sample("weights").numbers)
    x = randn(size + 2, size, seed=1)

    def model(weights: Any, inputs: Tensor) -> dict[str, Tensor]:
        w = joined(weights)
        outputs = inputs.to(w) @ (w + w.pow(3) / 3)
        return {"first": outputs[:1], "rest": outputs[1:]}

    def loss(outputs: dict[str, Tensor], targets: Any) -> Tensor:
        return sum(part.square().sum() for part in outputs.values()) / 2

    made = hvp.GaussNewtonOperator(model, loss, world.weights.tree, x, None)
    found = made @ world.v.tree
    jacobian = x * (1 + world.weights.numbers.square())
    return found, jacobian.T @ (jacobian @ world.v.numbers)


def linear_model(world: World) -> Found:
    """Squared error: H = 2 / (samples outputs) X'^T X' (x) I + decay, X' with a column of ones for the bias."""
    dtype, outputs, bias = (world.draw(st.sampled_from(options)) for options in ([F64, F32], [1, 2], [False, True]))
    samples_, features = world.draw(st.integers(1, 6)), world.draw(st.integers(1, 4))
    shapes = [(outputs, features), (outputs,)] if outputs > 1 else [(features,), ()]
    parts = [numbers(shape, index).to(dtype) for index, shape in enumerate(shapes[: 1 + bias])]
    container = world.draw(st.sampled_from(["list", "tuple", "dict"] if bias else ["bare", "list"]))
    world.shaped(Sample(parts, container))
    memory = world.draw(st.sampled_from([lambda x: x, lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, ::2]]))
    inputs = world.argument("inputs", Sample([memory(randn(samples_, features, seed=5).to(dtype))], "bare"))
    made = hvp.LinearModelOperator(inputs.tree, world.weights.tree, loss="squared", decay=2.0)
    v = world.v
    found = made.solve(v.tree, world.solver).value
    x = inputs.numbers.view(samples_, features)
    extended = torch.cat([x, torch.ones(samples_, 1, dtype=DTYPE)], 1) if bias else x
    curvature = 2 * extended.T @ extended / (samples_ * outputs)
    matrix = curvature + (2.0 + world.damping) * torch.eye(len(curvature), dtype=DTYPE)
    columns = _columns(v.numbers, outputs, features)
    truth = torch.linalg.solve(matrix, columns) if bool(torch.isfinite(matrix).all()) else columns * torch.nan
    return found, torch.cat([truth[:features].T.reshape(-1), truth[features:].reshape(-1)])


def _columns(v: Tensor, outputs: int, features: int) -> Tensor:
    """(features and perhaps the bias, outputs)."""
    weight, bias = v[: outputs * features], v[outputs * features :]
    return torch.cat([weight.view(outputs, features).T, bias.view(-1, outputs)])


def influence_matrix(world: World) -> Found:
    size = len(world.sample("weights").numbers)
    train = world.argument("train_examples", Sample([randn(3, size, seed=2)], "bare"))
    test = world.argument("test_examples", Sample([randn(2, size, seed=3)], "bare"))

    def loss(weights: Any, batch: Tensor) -> Tensor:
        w = joined(weights)
        return (batch.to(w) @ w).mean()

    operator = hvp.HessianOperator(world.losses.alone, world.weights.tree, engine="eager")
    found = hvp.influence_matrix(operator, loss, loss, world.weights.tree, train.tree, test.tree, world.solver)
    g, t = train.numbers.view(3, size), test.numbers.view(2, size)
    return found.matrix, -(g @ world.losses.inverse(world.weights.numbers, world.damping) @ t.T).reshape(-1)


# Callables, and every solver and preconditioner on them


def product(world: World) -> Callable[[Any], Any]:
    """v -> A v on trees."""
    a = world.losses.a
    return lambda v: split(a.to(joined(v)) @ joined(v), v)


def solve(world: World) -> Found:
    """Multiple right-hand sides with warm starts."""
    v, a = world.v, world.losses.a
    matrix = a + world.damping * torch.eye(len(a), dtype=DTYPE)
    start = world.argument("x0", world.draw(like(v))) if world.where == "x0" or world.draw(st.booleans()) else None
    if world.flaw is not None or start is None or world.draw(st.booleans()):
        found = hvp.solve(product(world), v.tree, world.solver, x0=None if start is None else start.tree)
        return found.value, torch.linalg.solve(matrix, v.numbers)
    two = [CONTAINERS[v.container]([torch.stack([leaf, -leaf]) for leaf in part.leaves]) for part in (v, start)]
    found = hvp.solve(product(world), two[0], world.solver, batched=True, x0=two[1])
    x = torch.linalg.solve(matrix, v.numbers)
    return rows_of(found.value), torch.cat([x, -x])


def by(make: Callable[[World], Any], exact: bool = True) -> Callable[[World], Found]:
    """A solver on A x = v: the solution, or the truncated series if not `exact`."""

    def call(world: World) -> Found:
        v, a = world.v, world.losses.a
        found = hvp.solve(product(world), v.tree, make(world)).value
        damping = world.damping
        if not exact:
            return found, truncated_sum(a, v.numbers, TERMS, ALPHA, damping)
        return found, torch.linalg.solve(a + damping * torch.eye(len(a), dtype=DTYPE), v.numbers)

    return call


def identity(world: World) -> Found:
    found = hvp.solve(product(world), world.v.tree, hvp.Identity(world.damping)).value
    return found, world.v.numbers / (1 + world.damping)


def nystrom(world: World) -> Found:
    """With as many test vectors as weights it is a damped inverse."""
    v, a = world.v, world.losses.a
    found = hvp.solve(product(world), v.tree, hvp.Nystrom(max(1, len(a)), rho=0.5, damping=world.damping)).value
    return found, torch.linalg.solve(a + (0.5 + world.damping) * torch.eye(len(a), dtype=DTYPE), v.numbers)


def preconditioned(make: Callable[[World, Any], Any]) -> Callable[[World], Found]:
    """A preconditioner changes how conjugate gradients arrive, not where."""

    def call(world: World) -> Found:
        operator = hvp.HessianOperator(world.losses.alone, world.weights.tree, engine="eager")
        solver = hvp.ConjugateGradient(80, damping=world.damping, preconditioner=make(world, operator))
        found = operator.solve(world.v.tree, solver).value
        return found, world.losses.inverse(world.weights.numbers, world.damping) @ world.v.numbers

    return call


def diagonal(world: World, operator: Any) -> Any:
    sample = world.sample("weights")
    leaves = [leaf.detach().abs() + 1 for leaf in sample.leaves]
    return hvp.DiagonalPreconditioner(world.argument("diagonal", Sample(leaves, sample.container)).tree)


def of_layers(make: Callable[..., Any], world: World) -> Found:
    """For one sample KFAC and Woodbury equal (G + shift I)^-1, with G = I (x) x' x'^T for half the squared error."""
    dtype, shift = world.draw(st.sampled_from([F64, F32])), 0.5
    module = nn.Linear(3, 2, dtype=dtype)
    weights = dict(module.named_parameters())
    world.shaped(Sample([weight.detach() for weight in weights.values()], "list"))
    inputs = world.argument("inputs", Sample([randn(1, 3, seed=4).to(dtype)], "bare"))
    targets = torch.zeros(1, 2, dtype=dtype)
    made = make(module, lambda o, y: (o - y).square().sum() / 2, weights, inputs.tree, targets, shift)
    x = torch.cat([inputs.numbers, torch.ones(1, dtype=DTYPE)])
    matrix = torch.outer(x, x)

    def curvature(v: list[Tensor]) -> list[Tensor]:
        product = matrix.to(joined(v)) @ _columns(joined(v), 2, 3)
        return split(torch.cat([product[:3].T.reshape(-1), product[3]]), v)

    found = hvp.solve(curvature, world.v.tree, hvp.ConjugateGradient(1, damping=shift, preconditioner=made)).value
    truth = torch.linalg.solve(matrix + shift * torch.eye(4, dtype=DTYPE), _columns(world.v.numbers, 2, 3))
    return found, torch.cat([truth[:3].T.reshape(-1), truth[3:].reshape(-1)])


# Eigenvalues


def eigenvalues(world: World) -> Found:
    a = world.losses.a
    like_ = world.argument("like", world.sample("weights"))
    found = hvp.extreme_eigenvalues(product(world), like=like_.tree, max_hvps=len(a) + 1, tol=1e-9)
    values = torch.linalg.eigvalsh(a) if len(a) else torch.zeros(1, dtype=DTYPE)
    return torch.tensor([*found.largest, *found.smallest]), values[[-1, 0]]


def density(world: World) -> Found:
    """With as many steps as weights the nodes are the eigenvalues; each row of shares adds up to 1."""
    a = world.losses.a
    like_ = world.argument("like", world.sample("weights"))
    found = hvp.spectral_density(product(world), 2, len(a) + 1, like=like_.tree)
    values = torch.linalg.eigvalsh(a) if len(a) else torch.zeros(1, dtype=DTYPE)
    nodes = found.nodes[found.weights > 1e-3]
    nearest = values[(nodes[:, None] - values).abs().argmin(1)]
    return torch.cat([nodes, found.weights.sum(1)]), torch.cat([nearest, torch.ones(2, dtype=DTYPE)])


AT = {"weights": ANYWHERE, "v": UNLIKE}
EXAMPLES = ["no tensor", *SILENT]
FACTORS = [flaw for flaw in ANYWHERE if flaw not in ("a whole number", "no leaves")]
"""Of a single tensor that is cast to the dtype of the weights if that is wider."""


LAYERS = {"v": [*ANYWHERE, "another shape"], "inputs": list(SILENT)}


def plain(call: Callable[[World], Found]) -> Subject:
    """A solver on an operator that is a function."""
    return Subject(call, {"v": ANYWHERE})


OPERATOR_CALLS: dict[str, Subject] = {
    "Averaged": Subject(averaged, AT),
    "Budget": plain(by(lambda world: hvp.Budget(error=1e-8, damping=world.damping))),
    "Chebyshev": plain(by(lambda world: hvp.Chebyshev(60, damping=world.damping))),
    "ConjugateGradient": plain(by(lambda world: hvp.ConjugateGradient(60, damping=world.damping))),
    "DataParallel": Subject(data_parallel, AT),
    "DiagonalPreconditioner": Subject(preconditioned(diagonal), {**AT, "diagonal": ANYWHERE}),
    "Exact": plain(by(lambda world: hvp.Exact(damping=world.damping))),
    "GaussNewtonOperator": Subject(gauss_newton, AT),
    "HessianOperator": Subject(hessian_operator, AT),
    "Identity": plain(identity),
    "JacobiPreconditioner": Subject(preconditioned(lambda world, H: hvp.JacobiPreconditioner(H)), AT),
    "KFACPreconditioner": Subject(partial(of_layers, hvp.KFACPreconditioner), LAYERS, ["list"]),
    "LinearModelOperator": Subject(linear_model, {**AT, "inputs": FACTORS}),
    "MINRES": plain(by(lambda world: hvp.MINRES(60, damping=world.damping))),
    "Neumann": plain(by(lambda world: hvp.Neumann(TERMS, ALPHA, damping=world.damping), exact=False)),
    "Nystrom": plain(nystrom),
    "NystromPreconditioner": Subject(preconditioned(lambda world, H: hvp.NystromPreconditioner(H, 2, 0.5)), AT),
    "StochasticHessianOperator": Subject(stochastic, AT),
    "WoodburyPreconditioner": Subject(partial(of_layers, hvp.WoodburyPreconditioner), LAYERS, ["list"]),
    "extreme_eigenvalues": Subject(eigenvalues, {"like": ANYWHERE}),
    "influence_matrix": Subject(
        influence_matrix, {"weights": ANYWHERE, "train_examples": EXAMPLES, "test_examples": EXAMPLES}
    ),
    "solve": Subject(solve, {"v": ANYWHERE, "x0": UNLIKE}),
    "spectral_density": Subject(density, {"like": ANYWHERE}),
}
