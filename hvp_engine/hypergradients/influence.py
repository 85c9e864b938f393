"""Influence functions: what each training example does to the loss of each test example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_function
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import Structure, check_scalar, flatten
from hvp_engine._support.torch_compat import pytree
from hvp_engine.differentiation.double_backward import check_reached, differentiate, filled, leaves
from hvp_engine.errors import GraphError, NonFiniteError
from hvp_engine.operators.base import solve
from hvp_engine.solvers import ConjugateGradient, Solver
from hvp_engine.solvers.base import worst_of
from hvp_engine.solvers.solution import Solution

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Influence:
    """What :func:`influence_matrix` returns.

    Attributes:
        matrix: (training examples, test examples): -g_i . A^-1 g_j, the derivative of test loss j with respect to a
            weight added to the loss of training example i. Positive: the example is harmful to that test example.
        solution: the solves of A x = g_j: products of all, and the worst residual norm with its status; no value.
    """

    matrix: Tensor
    solution: Solution

    def of_leaving_out(self) -> Tensor:
        """(training examples, test examples): the change of each test loss, to first order, if a training example
        is left out of a mean over all of them. Training anew measures it."""
        return -self.matrix / len(self.matrix)


def influence_matrix(
    operator: Any,
    train_loss: Loss,
    test_loss: Loss,
    weights: Any,
    train_examples: Any,
    test_examples: Any,
    solver: Solver | None = None,
    *,
    chunk: int = 256,
) -> Influence:
    """The influence of every training example on the loss of every test example, -g_i . (A + damping I)^-1 g_j.

    With A the Hessian of the training objective at its minimum w*, g_i and g_j the gradients of single training and
    test losses, it is dL_j(w*)/d epsilon, where epsilon L_i is added to the objective.

    Arguments:
        operator: A: a :class:`HessianOperator` of the whole training objective, decay included, at `weights`, or
            another operator of this package, or any callable v -> A v.
        train_loss, test_loss: `loss(weights, batch)` -> scalar tensor, called with batches of one example: the part of
            the objective that an example contributes (a mean over the batch, without the decay), and what is asked
            about.
        weights: any tree of tensors, where the objective is at its minimum.
        train_examples, test_examples: a tensor or any tree of tensors whose first dimension counts the examples;
            other leaves are passed on.
        solver: default `ConjugateGradient(100)`; with damping where A is indefinite or nearly singular.
        chunk: test examples that are solved for at once, and training examples whose gradients exist at once.

    Returns an :class:`Influence`. The caller's tensors, buffers and random state stay as they were.

    Validity: first order in 1/(training examples), at a minimum; a network stopped early has neither a minimum nor a
    positive definite A, and the numbers rank rather than measure. Losses that mix examples (BatchNorm in training
    mode) see batches of one.

    Cost: one solve for each test example (in blocks, as `solve(..., batched=True)` does); one gradient for each
    test example, and one for each training example and chunk of test examples: by `vmap` where the loss allows, else
    in a loop. Memory: about 2 `chunk` vectors of weights, beside the solver's.

    Errors: `TypeError`/`ValueError` naming the argument; :class:`NonFiniteError` for a training example whose gradient
    is not finite; as :func:`solve`.

    Source: Koh and Liang 2017, Eq. 2 (matrix), with Hampel 1974.

    >>> import torch, hvp_engine as hvp
    >>> x = torch.tensor([1.0, 2.0, 6.0])                        # the mean minimizes the squared distance
    >>> loss = lambda w, batch: ((w - batch) ** 2).mean() / 2
    >>> H = hvp.HessianOperator(loss, x.mean(), x)
    >>> found = hvp.influence_matrix(H, loss, loss, x.mean(), x, torch.tensor([5.0]))
    >>> found.of_leaving_out()                                   # without 6.0 the mean is 1.5, farther from 5.0
    tensor([[-1.3333],
            [-0.6667],
            [ 2.0000]])
    """
    solver = ConjugateGradient(100) if solver is None else solver
    chunk = check_count(chunk, "chunk")
    weight_list, structure = flatten(weights, "weights")
    train = _Gradients(train_loss, weight_list, structure, train_examples, "train")
    test = _Gradients(test_loss, weight_list, structure, test_examples, "test")
    columns, solutions = [], []
    for index, gradients in enumerate(test.chunks(chunk)):
        try:
            solution = solve(operator, structure.rebuild(gradients), solver, batched=True)
        except NonFiniteError:
            _refuse_unsound(gradients, chunk * index)  # which names the example; else the operator is what is not sound
            raise
        solutions.append(solution.of(None))
        directions = flatten(solution.value, "solution")[0]
        columns.append(torch.cat([-_inner_products(of_train, directions) for of_train in train.chunks(chunk)]))
    matrix = torch.cat(columns, 1)
    bad = (~torch.isfinite(matrix)).any(1).nonzero()
    if len(bad):
        raise NonFiniteError(
            "train_examples: expected finite gradients of every example; got NaN or Inf from "
            f"{len(bad)} of them, the first at index {int(bad[0])}: look at its data and its loss"
        )
    return Influence(matrix, worst_of(solutions))


def _refuse_unsound(gradients: Sequence[Tensor], start: int) -> None:
    """`NonFiniteError` for gradients, of the examples from `start` on, that are not finite."""
    sound = torch.stack([part.reshape(len(part), -1).isfinite().all(1) for part in gradients if part.numel()]).all(0)
    if not bool(sound.all()):
        raise NonFiniteError(
            "test_examples: expected finite gradients of every example; got NaN or Inf, the first at index "
            f"{start + int((~sound).nonzero()[0])}: look at its data and its loss"
        )


class _Gradients:
    """The gradients of a loss of single examples."""

    def __init__(self, loss: Loss, weights: Sequence[Tensor], structure: Structure, examples: Any, name: str):
        check_function(loss, f"{name}_loss", "(weights, batch)", 2)
        self._loss, self._weights, self._structure, self._name = loss, weights, structure, name
        self._leaves, self._spec = pytree.tree_flatten(examples)
        if len(self._leaves) == 1 and isinstance(examples, Mapping) and self._leaves[0] is examples:
            raise TypeError(
                f"{name}_examples: expected a tensor or a tree of tuples, lists, dicts and registered classes; got "
                f"{type(examples).__name__}, as a tokenizer returns it: pass dict(batch)"
            )
        self._tensors = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        lengths = {len(leaf) if leaf.dim() else 0 for leaf in map(self._leaves.__getitem__, self._tensors)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"{name}_examples: expected tensors whose first dimension counts the examples, one length >= 1; got "
                f"shapes {', '.join(str(tuple(self._leaves[i].shape)) for i in self._tensors) or 'of no tensor'}: "
                "of a data set or a list of examples pass torch.utils.data.default_collate(list(examples))"
            )
        [self._count] = lengths
        self._vectorized = True
        self._seed = Draws().next_seed()
        with isolated(self._seed, weights[0].device):
            active = leaves(weights)
            value = self._value(active, [self._leaves[index][:1] for index in self._tensors])
        if not value.requires_grad:
            raise GraphError(f"{name}_loss: expected a loss that depends on the weights; got one without a graph")
        check_reached(differentiate(value, active, retain_graph=False), f"{name}_loss")

    def chunks(self, size: int) -> Iterator[list[Tensor]]:
        """The gradients of at most `size` examples after another, stacked along a first dimension."""
        for start in range(0, self._count, size):
            parts = [self._leaves[index][start : start + size] for index in self._tensors]
            with isolated(self._seed, self._weights[0].device):
                yield self._at_once(parts) if self._vectorized else self._one_by_one(parts)

    def _at_once(self, parts: list[Tensor]) -> list[Tensor]:
        weights = [weight.detach() for weight in self._weights]

        def gradient(*single: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda ws: self._value(ws, [s[None] for s in single]))(tuple(weights))

        try:
            return list(torch.func.vmap(gradient, randomness="different")(*parts))
        except Exception:  # what vmap cannot do (control flow on values, .item(), ...); a bad loss fails again below
            self._vectorized = False
            return self._one_by_one(parts)

    def _one_by_one(self, parts: list[Tensor]) -> list[Tensor]:
        rows = []
        for index in range(len(parts[0])):
            weights = leaves(self._weights)
            value = self._value(weights, [part[index : index + 1] for part in parts])
            found = differentiate(value, weights, retain_graph=False) if value.requires_grad else [None] * len(weights)
            rows.append(filled(found, weights))
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _value(self, weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        batch = list(self._leaves)
        for index, part in zip(self._tensors, parts, strict=True):
            batch[index] = part
        value = self._loss(self._structure.rebuild(weights), pytree.tree_unflatten(batch, self._spec))
        check_scalar(value, f"{self._name}_loss")
        return value.reshape(())


def _inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner products of stacked vectors: a row for each of `left`, a column for each of `right`."""
    parts = [a.reshape(len(a), -1) @ b.reshape(len(b), -1).T for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum(0)
