"""What must hold in every process of a group; each function runs in all of them (see spawned_processes.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    EXAMPLES,
    assert_close,
    assert_same_bits,
    batch,
    compare,
    decays,
    losses,
    network,
    parallel,
    shard,
    twin,
    weights_of,
)
from problems_with_known_answers import DTYPE, randn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import hvp_engine as hvp
from hvp_engine.engines import auto

SOLVERS = {
    "neumann": hvp.Neumann(20, alpha=0.05),
    "accumulate": hvp.Neumann(20, alpha=0.05, form="accumulate"),
    "auto alpha": hvp.Neumann(20),
    "chebyshev": hvp.Chebyshev(20),
    "cg": hvp.ConjugateGradient(40),
    "minres": hvp.MINRES(40),
    "nystrom": hvp.Nystrom(10, rho=0.1),
    "exact": hvp.Exact(),
    "identity": hvp.Identity(),
    "budget": hvp.Budget(hvps=30),
}


def _hypergradients(
    rank: int, count: int, solver: Any, engine: str
) -> tuple[hvp.HypergradientResult, hvp.HypergradientResult]:
    """The result from this process's part of the data, with the others', and from all data in one process."""
    module, train, val = network(), batch(1), batch(2)
    weights, hyper = weights_of(module), decays()
    together = hvp.Hypergradient(*parallel(module), solver=solver, engine=engine)
    alone = hvp.Hypergradient(*losses(module), solver=solver, engine="eager")
    ours = together(weights, hyper, shard(train, rank, count), shard(val, rank, count))
    return ours, alone(weights, hyper, train, val)


def check_solvers(rank: int, count: int, folder: Path) -> None:
    for solver in SOLVERS.values():
        compare(*_hypergradients(rank, count, solver, "eager"))


def check_engines(rank: int, count: int, folder: Path) -> None:
    for engine in ("linearized", "auto", "cudagraph"):
        compare(*_hypergradients(rank, count, hvp.Neumann(20), engine))


def check_compiled(rank: int, count: int, folder: Path) -> None:
    compare(*_hypergradients(rank, count, hvp.Neumann(20), "compiled"))


def check_finite_differences(rank: int, count: int, folder: Path) -> None:
    """`hvp.check` re-solves the inner problem of all batches."""
    module, train, val = network(), batch(1), batch(2)
    point, parts = (weights_of(module), decays()), (shard(train, rank, count), shard(val, rank, count))
    ours = hvp.check(*parallel(module), *point, parts, directions=1, engine="eager")
    theirs = hvp.check(*losses(module), *point, (train, val), directions=1, engine="eager")
    assert ours.verdict == theirs.verdict
    assert_same_bits([], ours.verdict.name)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The numbers of elements that all-reduces in the block take."""
    sizes: list[int] = []
    true = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(tensor.numel())
        return true(tensor, *arguments, **keywords)

    with mock.patch.object(dist, "all_reduce", counting):
        yield sizes


def check_one_message_for_each_term(rank: int, count: int, folder: Path) -> None:
    module = network()
    arguments = weights_of(module), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    sizes = {}
    for engine in ("eager", "linearized"):
        for terms in (0, 7, 17):
            solver = hvp.Neumann(terms, alpha=0.05)
            hypergradient = hvp.Hypergradient(*parallel(module), solver=solver, engine=engine)
            with _counted() as sizes[terms]:
                hypergradient(*arguments)
        assert len(sizes[0]) == 3  # the two losses with their gradients, and the mixed product
        assert len(sizes[7]) - len(sizes[0]) == 7 and len(sizes[17]) - len(sizes[7]) == 10
    number = sum(weight.numel() for weight in module.parameters())
    for size in sizes[17][2:-1]:  # of a term: the weights at aligned places, and one number more
        assert number < size <= number + 16 * 4 + 1


def check_data_parallel_modules(rank: int, count: int, folder: Path) -> None:
    module = network()
    wrapped = DistributedDataParallel(twin(module))
    train, val = batch(1), batch(2)
    named = {f"module.{name}": weight for name, weight in weights_of(module).items()}
    hyper = {f"module.{name}": decay for name, decay in decays().items()}
    for engine in ("eager", "linearized"):
        together = hvp.Hypergradient(*parallel(wrapped), solver=hvp.Neumann(5, alpha=0.05), engine=engine)
        alone = hvp.Hypergradient(*losses(module), solver=hvp.Neumann(5, alpha=0.05), engine="eager")
        ours = together(named, hyper, shard(train, rank, count), shard(val, rank, count))
        theirs = alone(weights_of(module), decays(), train, val)
        assert_close({name.removeprefix("module."): grad for name, grad in ours.grads.items()}, theirs.grads)
    inputs, targets = shard(train, rank, count)  # and its own reduction still works
    torch.nn.functional.cross_entropy(wrapped(inputs), targets).backward()
    torch.nn.functional.cross_entropy(module(train[0]), train[1]).backward()
    for ours_, theirs_ in zip(wrapped.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs_.grad)


def check_uneven_and_empty_shards(rank: int, count: int, folder: Path) -> None:
    module, train, val = network(), batch(1), batch(2)
    # 17 and 7 examples of two processes; none, 21, 3 and none of four.
    cuts = {2: [0, 17, 24], 4: [0, 0, 21, 24, 24]}[count]
    mine = slice(cuts[rank], cuts[rank + 1])
    parts = [(inputs[mine], targets[mine]) for inputs, targets in (train, val)]
    solver = hvp.ConjugateGradient(20)
    together = hvp.Hypergradient(*parallel(module, examples=lambda batch: len(batch[0])), solver=solver)
    alone = hvp.Hypergradient(*losses(module), solver=solver)
    compare(together(weights_of(module), decays(), *parts), alone(weights_of(module), decays(), train, val))
    nothing = (train[0][:0], train[1][:0])
    with pytest.raises(ValueError, match="examples: expected at least one"):
        together(weights_of(module), decays(), nothing, nothing)


def check_operators(rank: int, count: int, folder: Path) -> None:
    module, train = network(), batch(1)
    hyper = decays()
    part, _ = losses(module)

    def loss(weights: Any, batch: Any) -> Tensor:
        return part(weights, hyper, batch)

    union = hvp.DataParallel(loss)
    weights = weights_of(module)
    v = {name: randn(*weight.shape, seed=9) for name, weight in weights.items()}
    ours = hvp.HessianOperator(union, weights, shard(train, rank, count))
    theirs = hvp.HessianOperator(loss, weights, train)
    assert_close(ours @ v, theirs @ v)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    assert_close(ours.gradient, theirs.gradient)
    assert_close(ours.solve(v, hvp.MINRES(60)).value, theirs.solve(v, hvp.MINRES(60)).value, 1e-7)
    several = {name: torch.stack([part, 2 * part]) for name, part in v.items()}
    both = [H.solve(several, hvp.Neumann(10), batched=True).value for H in (ours, theirs)]
    assert_close(*both)
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=1e-9, atol=1e-12)
    largest = [hvp.extreme_eigenvalues(H) for H in (ours, theirs)]
    assert largest[0].largest == pytest.approx(largest[1].largest, rel=1e-8)
    assert_same_bits([ours.dense()], largest[0].largest)
    averaged = hvp.HessianOperator(union.averaged(), weights, [shard(train, rank, count), shard(batch(3), rank, count)])
    assert_close(averaged @ v, hvp.HessianOperator(hvp.Averaged(loss), weights, [train, batch(3)]) @ v)
    squares = (lambda weights, inputs: inputs @ weights["0.weight"].T), torch.nn.functional.mse_loss
    data = train[0], randn(EXAMPLES, 7, seed=5)
    point = {"0.weight": weights["0.weight"]}
    newton = [
        hvp.GaussNewtonOperator(squares[0], loss, point, *part)
        for loss, part in ((hvp.DataParallel(squares[1]), shard(data, rank, count)), (squares[1], data))
    ]
    assert_close(newton[0] @ point, newton[1] @ point)
    stream = hvp.StochasticHessianOperator(union, weights, [shard(train, rank, count)])
    assert_close(stream @ v, theirs @ v)


def check_plain_calls(rank: int, count: int, folder: Path) -> None:
    """Called as a function, it is the loss of all batches, with first derivatives and no second ones."""
    module, train = network(), batch(1)
    union, _ = parallel(module)
    points = []
    for loss, data in ((union, shard(train, rank, count)), (losses(module)[0], train)):
        weights = {name: weight.requires_grad_() for name, weight in weights_of(module).items()}
        hyper = {name: decay.requires_grad_() for name, decay in decays().items()}
        value = loss(weights, hyper, data)
        (2 * value).backward()
        points.append((value.detach(), weights, hyper))
    torch.testing.assert_close(points[0][0], points[1][0], rtol=1e-12, atol=0)
    for tree in (1, 2):
        assert_close(*({name: leaf.grad for name, leaf in point[tree].items()} for point in points))
    with torch.no_grad():
        torch.testing.assert_close(union(weights_of(module), decays(), shard(train, rank, count)), points[1][0])
    weights = {name: weight.requires_grad_() for name, weight in weights_of(module).items()}
    value = union(weights, decays(), shard(train, rank, count))
    with pytest.raises(hvp.SecondDerivativeError, match="DataParallel itself"):
        hvp.hypergradient(value, value, list(weights.values()), list(weights.values()))


def check_one_engine_is_chosen(rank: int, count: int, folder: Path) -> None:
    """Processes whose measurements differ take the simplest engine that one of them wants."""
    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    hypergradient = hvp.Hypergradient(*parallel(network()), solver=hvp.Neumann(5, alpha=0.05), engine="auto")

    def measured(contenders: Any) -> list[float]:
        eager_is_faster = rank == count - 1
        return [1.0 if (engine.name == "eager") == eager_is_faster else 2.0 for engine, _ in contenders]

    used = []
    true = auto.AutoEngine.linearize_by

    def noting(self: auto.AutoEngine, name: str, problem: Any) -> Any:
        used.append(name)
        return true(self, name, problem)

    with (
        mock.patch.object(auto, "seconds_per_term", measured),
        mock.patch.object(auto.AutoEngine, "linearize_by", noting),
    ):
        for _ in range(2):
            ours = hypergradient(*arguments)
    assert used == ([] if rank == count - 1 else ["eager", "eager"])
    alone = hvp.Hypergradient(*losses(network()), solver=hvp.Neumann(5, alpha=0.05), engine="eager")
    compare(ours, alone(*arguments[:2], batch(1), batch(2)))
    assert f"process {rank} of {count}" in hypergradient.report()


def check_precisions(rank: int, count: int, folder: Path) -> None:
    """float32 and bfloat16 weights: as close to the float64 result as one process gets."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        module = network().to(dtype)
        train, val = ((inputs.to(dtype), targets) for inputs, targets in (batch(1), batch(2)))
        weights = weights_of(module)
        hyper = {name: decay.to(dtype) for name, decay in decays().items()}
        together = hvp.Hypergradient(*parallel(module), solver=hvp.Neumann(20), engine="eager")
        ours = together(weights, hyper, shard(train, rank, count), shard(val, rank, count))
        exact = hvp.Hypergradient(*losses(network()), solver=hvp.Neumann(20), engine="eager")
        wide = ({name: leaf.to(DTYPE) for name, leaf in tree.items()} for tree in (weights, hyper))
        theirs = exact(*wide, (train[0].to(DTYPE), train[1]), (val[0].to(DTYPE), val[1]))
        assert all(grad.dtype == dtype for grad in ours.grads.values())
        assert_close({name: grad.to(DTYPE) for name, grad in ours.grads.items()}, theirs.grads, tolerance)
        assert_same_bits(list(ours.grads.values()))


CHECKS = [
    check_solvers,
    check_engines,
    check_one_message_for_each_term,
    check_data_parallel_modules,
    check_uneven_and_empty_shards,
    check_operators,
    check_plain_calls,
    check_one_engine_is_chosen,
    check_precisions,
]
SLOW_CHECKS = [check_compiled, check_finite_differences]
