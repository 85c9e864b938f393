"""Calls with losses of random trees, and their closed forms: recorded ones, functions, checks and training."""

from __future__ import annotations

from typing import Any

import torch
from fused_op_oracles import F32, F64
from hypothesis import strategies as st
from losses_on_random_trees import ALPHA, TERMS, Found, Losses, Subject, World
from problems_with_known_answers import DTYPE, randn, truncated_sum
from random_trees import ANYWHERE, FLAT, SILENT, TOLERANCES, UNLIKE, Sample, joined, like, numbers, split
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hvp_engine as hvp

# Recorded losses


def recorded(world: World) -> tuple[Any, Any, Tensor]:
    """Weights and hyperparameters that require grad, but for some of the weights, and the numbers of those that do."""
    w, h = world.weights, world.hyper
    if not world.computable:
        return w.tree, h.tree, torch.zeros(0, dtype=torch.bool)
    frozen = [world.draw(st.integers(0, 3)) == 0 for _ in w.leaves]
    frozen[-1] &= not all(frozen)
    for leaf, is_frozen in zip(w.leaves, frozen, strict=True):
        leaf.requires_grad_(not is_frozen)
    for leaf in h.leaves:
        leaf.requires_grad_()
    active = torch.cat([torch.full((leaf.numel(),), leaf.requires_grad) for leaf in w.leaves])
    world.trivial = not bool(active.any()) or len(h.numbers) == 0
    return w.tree, h.tree, active


def losses_of(world: World, weights: Any, hyper: Any) -> tuple[Tensor, Tensor]:
    """Losses at the arguments or, where those cannot be computed with, at what they should have been."""
    if not world.computable:
        good = [world.sample("weights"), world.sample("hyper")]
        weights, hyper = ([leaf.requires_grad_() for leaf in sample.leaves] for sample in good)
    return world.losses.train(weights, hyper), world.losses.val(weights, hyper)


def approx_inverse_hvp(world: World) -> Found:
    w, h, active = recorded(world)
    v, train = world.v, losses_of(world, w, h)[0]
    f: Any = train
    if world.where == "f" or world.draw(st.booleans()):
        leaves = world.weights.leaves if world.computable else world.sample("weights").leaves
        found = torch.autograd.grad(train, [leaf for leaf in leaves if leaf.requires_grad], create_graph=True)
        parts = iter(found)
        gradient = [next(parts) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in leaves]
        f = world.argument("f", Sample(gradient, "list")).tree
    found = hvp.approx_inverse_hvp(v.tree, f, w, TERMS, ALPHA, damping=world.damping)
    on = torch.diag(active.to(DTYPE))
    hessian = torch.where(on @ torch.ones_like(on) @ on > 0, world.losses.hessian(world.weights.numbers), 0.0)
    return found, truncated_sum(hessian, v.numbers, TERMS, ALPHA, world.damping)


def hypergradient(world: World) -> Found:
    w, h, active = recorded(world)
    train, val = losses_of(world, w, h)
    found = hvp.hypergradient(train, val, w, h, world.solver)
    return found, world.losses.hypergradient(world.weights.numbers, world.hyper.numbers, world.damping, active)


def best_response(world: World) -> Found:
    w, h, active = recorded(world)
    train = losses_of(world, w, h)[0]
    response = hvp.best_response(train, w, h, world.solver)
    value = world.losses.val(response, world.hyper.leaves)
    found = torch.autograd.grad(value, world.hyper.leaves)
    return found, world.losses.hypergradient(world.weights.numbers, world.hyper.numbers, world.damping, active)


# Loss functions


def functional_hypergradient(world: World) -> Found:
    losses = world.losses
    made = hvp.Hypergradient(losses.train, losses.val, world.solver, world.engine)
    found = made(world.weights.tree, world.hyper.tree, None, None).grads
    return found, losses.hypergradient(world.weights.numbers, world.hyper.numbers, world.damping)


def fixed_point(world: World) -> Found:
    losses = world.losses

    def phi(weights: Any, hyper: Any, batch: Any) -> Any:
        w, h = joined(weights), joined(hyper)
        return split(w - ALPHA * (losses.a.to(w) @ w - losses.b.to(w) @ h.to(w)), weights)

    made = hvp.FixedPointHypergradient(phi, losses.val, hvp.Neumann(100))
    found = made(world.weights.tree, world.hyper.tree, None, None).grads
    straight = Losses(losses.a, losses.b, losses.c, losses.d, 0.0)
    return found, straight.hypergradient(world.weights.numbers, world.hyper.numbers)


def response_jacobian(world: World) -> Found:
    part = world.draw(like(world.sample("weights")))
    stacked = Sample([torch.stack([leaf, -2 * leaf]) for leaf in part.leaves], part.container)
    cotangents = world.argument("cotangents", stacked)
    rows = torch.stack([part.numbers, -2 * part.numbers])
    world.trivial = len(world.losses.a) == 0
    found = hvp.response_jacobian(
        world.losses.train, world.weights.tree, world.hyper.tree, None, cotangents.tree, world.solver
    )
    if world.where == "cotangents" and world.flaw in SILENT:
        rows = rows * torch.nan
    truth = rows @ world.losses.inverse(world.weights.numbers, world.damping) @ world.losses.b
    return rows_of(found.rows), truth.reshape(-1)


def rows_of(tree: Any) -> Tensor:
    """A stack of trees as the rows of one matrix, flattened."""
    return torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in pytree.tree_leaves(tree)], 1).reshape(-1)


def check(world: World) -> Found:
    losses, start = world.losses, world.weights
    straight = Losses(losses.a, losses.b, losses.c, losses.d, 0.0)
    minimum = straight.inverse(world.sample("weights").numbers) @ straight.b @ world.sample("hyper").numbers
    weights = start.tree if world.where == "weights" else split(minimum, world.sample("weights").tree)
    found = hvp.check(
        straight.train, straight.val, weights, world.hyper.tree, (None, None), solver=hvp.Exact(), directions=1
    )
    precise = world.dtypes <= {F32, F64}
    wanted = {hvp.Verdict.CORRECT} if precise else set(hvp.Verdict)
    if world.flaw is not None:
        wanted = set(hvp.Verdict) - {hvp.Verdict.CORRECT}
    return torch.tensor([float(found.verdict in wanted)]), torch.ones(1, dtype=DTYPE)


def tuner(world: World) -> Found:
    world.propagates = True  # training itself takes what the loss gives; hypergradients that are not finite it skips
    losses, weights, hyper = world.losses, world.weights.tree, world.hyper.tree
    before = [sample.numbers for sample in (world.weights, world.hyper)] if world.computable else []
    points = [*world.sample("weights").leaves, *world.sample("hyper").leaves]
    world.trivial = any(0 in leaf.stride() for leaf in points)  # what is expanded cannot be updated in place
    made = hvp.Tuner(
        weights,
        hyper,
        losses.train,
        losses.val,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        solver=hvp.ConjugateGradient(60),
        inner_steps=1,
        engine="eager",
    )
    made.fit([None], [None], 1, progress=False)
    w, h = before
    w = w - 0.1 * losses.gradient(w, h)
    return [weights, hyper], torch.cat([w, h - 0.1 * losses.hypergradient(w, h)])


def functional(world: World) -> Found:
    """A linear layer; the weights are some of its parameters."""
    dtype = world.draw(st.sampled_from(list(TOLERANCES)))
    module, x = nn.Linear(3, 2, dtype=dtype), randn(2, 3, seed=6).to(dtype)
    names = world.draw(st.sampled_from([["weight", "bias"], ["bias"], []]))
    own = {name: numbers(p.shape, 7).to(dtype) for name, p in module.named_parameters() if name in names}
    world.dtypes |= {dtype}
    used = {name: own.get(name, p.detach()).double() for name, p in module.named_parameters()}
    return hvp.functional(module)(own, x), (x.double() @ used["weight"].T + used["bias"]).reshape(-1)


STRUCTURE = [flaw for flaw in UNLIKE if flaw not in SILENT]
"""Of what is read for its graph alone."""
BOTH = {"weights": ANYWHERE, "hyper": ANYWHERE}

LOSS_CALLS: dict[str, Subject] = {
    "FixedPointHypergradient": Subject(fixed_point, BOTH),
    "Hypergradient": Subject(functional_hypergradient, BOTH),
    "Tuner": Subject(tuner, BOTH, called={"weights": "module"}),
    "approx_inverse_hvp": Subject(
        approx_inverse_hvp, {"weights": ANYWHERE, "v": UNLIKE, "f": STRUCTURE}, FLAT, called={"weights": "w"}
    ),
    "best_response": Subject(best_response, BOTH, FLAT),
    "check": Subject(check, BOTH, share=0.3),
    "functional": Subject(functional, {}),
    "hypergradient": Subject(hypergradient, BOTH, FLAT),
    "response_jacobian": Subject(response_jacobian, {**BOTH, "cotangents": UNLIKE}),
}
