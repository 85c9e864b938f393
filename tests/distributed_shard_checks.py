"""What must hold in every process of a group where the weights are shards; see spawned_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    assert_close,
    assert_same_bits,
    batch,
    decays,
    losses,
    network,
    network_of_any_device,
    parallel,
    shard,
    twin,
    weights_of,
)
from distributed_tuner_checks import loaders, small_tuner
from problems_with_known_answers import randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import hvp_engine as hvp
from hvp_engine.diagnostics.memory import peak_memory


def _cut(tree: dict[str, Tensor], dims: tuple[int, ...] = (0, 0, 1, 0)) -> dict[str, Tensor]:
    """DTensors whose sizes are not multiples of the number of processes; with four, some hold nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(leaf, mesh, [Shard(dim)]) for (name, leaf), dim in zip(tree.items(), dims, strict=True)
    }


def _whole(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in tree.items()}


SOLVERS_OF_SHARDS = {
    "neumann": hvp.Neumann(20, alpha=0.05),
    "accumulate": hvp.Neumann(20, alpha=0.05, form="accumulate", damping=0.1),
    "chebyshev": hvp.Chebyshev(20, bounds=(0.5, 40.0)),
    "cg": hvp.ConjugateGradient(60),
    "minres": hvp.MINRES(60),
    "identity": hvp.Identity(),
}


def check_sharded_solvers(rank: int, count: int, folder: Path) -> None:
    """Sharded weights, replicated or sharded hyperparameters: the numbers are those of one process."""
    module, train, val = network(), batch(1), batch(2)
    parts = shard(train, rank, count), shard(val, rank, count)
    for solver in SOLVERS_OF_SHARDS.values():
        theirs = hvp.Hypergradient(*losses(module), solver=solver, engine="eager")(
            weights_of(module), decays(), train, val
        )
        for hyper in (decays(), _cut(decays()), {**decays(), "0.weight": _cut(decays())["0.weight"]}):
            together = hvp.Hypergradient(*parallel(module), solver=solver, engine="eager")
            ours = together(_cut(weights_of(module)), hyper, *parts)
            assert all(type(grad) is type(hyper[name]) for name, grad in ours.grads.items())
            tolerance = 1e-7 if isinstance(solver, hvp.MINRES | hvp.ConjugateGradient) else 1e-10
            assert_close(_whole(ours.grads), theirs.grads, tolerance, solver)
            assert_close(_whole(ours.solution.value), theirs.solution.value, tolerance, solver)
            for name in ("train_loss", "val_loss", "gradient_norm"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(ours.unfinished, theirs.unfinished, rtol=1e-6, atol=1e-9)
            assert ours.solution.status == theirs.solution.status
            assert_same_bits(list(_whole(ours.grads).values()), ours.solution.residual_norm, ours.solution.iterations)


def check_sharded_estimates(rank: int, count: int, folder: Path) -> None:
    """alpha='auto' starts its estimate elsewhere than with one process; both see the same spectrum."""
    module, train = network(), batch(1)
    part, _ = losses(module)
    hyper = decays()

    def loss(weights: Any, batch: Any) -> Tensor:
        return part(weights, hyper, batch)

    theirs = hvp.HessianOperator(loss, weights_of(module), train, engine="eager")
    union, mine = hvp.DataParallel(loss), shard(train, rank, count)
    ours = hvp.HessianOperator(union, _cut(weights_of(module)), mine, engine="eager")
    assert ours.shape == theirs.shape
    largest = [hvp.extreme_eigenvalues(H, tol=1e-5).largest for H in (ours, theirs)]
    assert largest[0] == pytest.approx(largest[1], rel=1e-6)
    v = {name: randn(*weight.shape, seed=9) for name, weight in weights_of(module).items()}
    assert_close(_whole(ours @ _cut(v)), theirs @ v)
    solutions = [ours.solve(_cut(v), hvp.Neumann(300)), theirs.solve(v, hvp.Neumann(300))]
    assert solutions[0].alpha == pytest.approx(solutions[1].alpha, rel=0.1)
    assert_close(_whole(solutions[0].value), solutions[1].value, 1e-5)
    again = ours.solve(_cut(v), hvp.ConjugateGradient(60), x0=solutions[0].value)
    assert again.residual_norm < 1e-9
    assert_same_bits([], solutions[0].alpha, again.iterations)


def check_sharded_memory(rank: int, count: int, folder: Path) -> None:
    """A solver's memory shrinks with the number of processes."""
    loss = hvp.DataParallel(lambda weights, batch: (batch.mean() * weights["w"] ** 2).sum())
    weights = {"w": torch.ones(1024, 64)}
    mesh = init_device_mesh("cpu", (count,))
    cut = {"w": distribute_tensor(weights["w"], mesh, [Shard(0)])}
    for solver in (hvp.Neumann(3, alpha=0.1), hvp.Chebyshev(3, bounds=(1.0, 3.0)), hvp.ConjugateGradient(3)):
        taken = []
        for point in (weights, cut):
            operator = hvp.HessianOperator(loss, point, torch.ones(2), engine="eager")
            with peak_memory() as meter:
                kept = solver.allocate(operator.layout)
            taken.append(meter.peak_bytes)
            del kept
        assert taken[0] >= 2 * 4 * 1024 * 64
        vectors = 4 / 3 if isinstance(solver, hvp.ConjugateGradient) else 1  # its step of parts needs one more
        assert taken[1] <= vectors * taken[0] / count + 2000


def check_sharded_refusals(rank: int, count: int, folder: Path) -> None:
    module, train, val = network(), batch(1), batch(2)
    cut = _cut(weights_of(module))
    arguments = decays(), shard(train, rank, count), shard(val, rank, count)
    with pytest.raises(TypeError, match="wrap the loss in hvp.DataParallel"):
        hvp.Hypergradient(*losses(module), engine="eager")(cut, *arguments)
    for solver in (hvp.Exact(), hvp.Nystrom(3, rho=0.1)):
        with pytest.raises(ValueError, match="hvp.MINRES, which work on shards"):
            hvp.Hypergradient(*parallel(module), solver=solver, engine="eager")(cut, *arguments)
    with pytest.raises(ValueError, match="expected all of them as shards, or none"):
        hvp.Hypergradient(*parallel(module))({**cut, "2.bias": weights_of(module)["2.bias"]}, *arguments)
    mesh = init_device_mesh("cpu", (count,))
    with pytest.raises(ValueError, match=r"distribute_tensor\(tensor, mesh, \[Shard\(0\)\]\)"):
        replicated = {name: distribute_tensor(leaf, mesh, [Replicate()]) for name, leaf in weights_of(module).items()}
        hvp.Hypergradient(*parallel(module))(replicated, *arguments)
    with pytest.raises(TypeError, match="expected tensors that are whole in this process"):
        hvp.approx_inverse_hvp(list(cut.values()), cut["2.bias"].sum(), list(cut.values()), 3, 0.1)


def check_fully_sharded_modules(rank: int, count: int, folder: Path) -> None:
    """FSDP2 has no second derivatives: its modules are refused, its parameters accepted."""
    module, train, val = network(), batch(1), batch(2)
    managed = fully_shard(twin(module), mesh=init_device_mesh("cpu", (count,)))
    with pytest.raises(TypeError, match="under fully_shard"):
        hvp.functional(managed)
    with torch.device("meta"):
        code = network_of_any_device()
    weights = dict(managed.named_parameters())
    together = hvp.Hypergradient(*parallel(code), solver=hvp.Neumann(5, alpha=0.05), engine="eager")
    ours = together(weights, decays(), shard(train, rank, count), shard(val, rank, count))
    alone = hvp.Hypergradient(*losses(module), solver=hvp.Neumann(5, alpha=0.05), engine="eager")
    assert_close(ours.grads, alone(weights_of(module), decays(), train, val).grads)


def check_sharded_tuner(rank: int, count: int, folder: Path) -> None:
    whole, hyper = network(), decays()
    options = {"weight_clip": 1.0, "hyper_clip": 0.5, "engine": "eager", "solver": hvp.Neumann(5, alpha=0.02)}
    one = small_tuner(whole, hyper, losses(whole), **options)
    one.fit(*loaders(0, 1), 3, progress=False)
    cut, cut_hyper = _cut(weights_of(network())), _cut(decays())
    many = small_tuner(cut, cut_hyper, parallel(network()), **options)  # type: ignore[arg-type]
    many.fit(*loaders(rank, count), 3, progress=False)
    assert_close(_whole(cut), weights_of(whole), 1e-9)
    assert_close(_whole(cut_hyper), hyper, 1e-9)
    state = many.weight_optimizer.state_dict()["state"]
    held = sum(part["exp_avg"].numel() for part in state.values())
    assert held == sum(leaf.to_local().numel() for leaf in cut.values())


CHECKS = [
    check_sharded_solvers,
    check_sharded_estimates,
    check_sharded_memory,
    check_sharded_refusals,
    check_fully_sharded_modules,
    check_sharded_tuner,
]
