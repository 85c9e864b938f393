"""Terms in the space of the batch: a dense layer's part of each vector by the examples that its product is made of.

Let a layer multiply S known rows x (S x m) by its weight W (n x m), and let its part of H t be d T + g^T x with a decay
d that is one number, or one for each of the n outputs. All vectors of a series stay combinations of the vectors v that
it began with and of rows of x: T = c v + G^T x, with few numbers G (S x n). The network asks only for x T^T =: U, and

    T <- T - scale (d T + g^T x)   is   c <- (1 - scale d) c,   G <- (1 - scale d) G - scale g,
                                        U <- (1 - scale d) U - scale K g   with K = x x^T, made once.

So a term costs S^2 n multiplications instead of 2 S n m, and T itself is formed once, after the last term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.linear_map import Accumulation
from hvp_engine.differentiation.native.places import Place, in_order
from hvp_engine.differentiation.trace.partial_evaluation import Partition

aten = torch.ops.aten

_FEWEST_TERMS = 4
"""Terms below which nothing is gained, however large the layers are."""

_FEW_OUTPUTS = 16

Number = float | Tensor
"""A coefficient: one, or in float64 one for each output, as a column."""


@dataclass(frozen=True)
class Factor:
    """A weight whose part of a vector is kept in the space of the batch.

    Attributes:
        weight: its position.
        product: the node that multiplies `inputs` by the tangent.
        inputs: the node of the known rows.
        sizes: (S, n).
    """

    weight: int
    product: fx.Node
    inputs: fx.Node
    sizes: tuple[int, int]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of G and U: the order in which the product's result would be made."""
        rows, columns = self.sizes
        return in_order(self.sizes, (1, 0) if columns <= _FEW_OUTPUTS and rows > columns else (0, 1))

    @property
    def width(self) -> int:
        """m."""
        return int(self.inputs.meta["val"].shape[1])


def fewest_terms(found: Sequence[Factor], grams_exist: bool) -> float:
    """Terms from which the space of the batch takes fewer multiplications, those of K at the beginning included.

    For 200 rows of 784 and 10 outputs a term takes 200 * 200 * 10 in place of 2 * 200 * 784 * 10, which saves 2.7
    million; K takes 31, U at the beginning and T at the end 3.1: from 13 terms on.
    """
    sizes = [(*factor.sizes, factor.width) for factor in found]
    saved = sum((2 * m - rows) * rows * n for rows, n, m in sizes)
    around = sum(2 * rows * n * m + (0 if grams_exist else rows * rows * m) for rows, n, m in sizes)
    return max(_FEWEST_TERMS, around / saved)


def factors(parts: Partition, residuals: Sequence[Tensor]) -> list[Factor]:
    """The weights that qualify by the structure of the graph, where a term costs at most half as much."""
    part = parts.accumulating
    nodes = list(part.module.graph.nodes)
    tangents = [node for node in nodes if node.op == "placeholder"][len(part.residuals) :]
    known = set(nodes[: len(part.residuals)])
    outputs: list[fx.Node] = list(nodes[-1].args[0])
    found, position = [], 0
    for weight, (tangent, (pairs, others)) in enumerate(zip(tangents, parts.terms, strict=True)):
        first = position
        position += 2 * pairs + others
        product = _only_product(tangent)
        if (pairs, others) != (1, 0) or product is None:
            continue
        inputs, (n, m) = product.args[-2], tangent.meta["val"].shape
        if inputs not in known or outputs[first + 1] is not inputs:
            continue
        rows = inputs.meta["val"].shape[0]
        decays = [residuals[index] for index in parts.diagonals[weight]]
        if rows <= m and m > 1 and all(decay.expand(n, m).stride(1) == 0 for decay in decays):
            found.append(Factor(weight, product, inputs, (rows, n)))
    return found


def _only_product(tangent: fx.Node) -> fx.Node | None:
    """The one node that reads the tangent, if that is x @ t(tangent), perhaps with a summand."""
    if len(tangent.users) != 1 or tangent.meta["val"].dim() != 2:
        return None
    (transposed,) = tangent.users
    if transposed.target is not aten.t.default or len(transposed.users) != 1:
        return None
    (product,) = transposed.users
    if product.target not in (aten.mm.default, aten.addmm.default) or product.kwargs:
        return None
    return product if product.args[-1] is transposed and product.args[-2] is not transposed else None


def one_for_each_output(decay: Place, factor: Factor) -> Place:
    """A decay of the weight's sizes, the same along each row, as one of (S, n)."""
    return Place(decay.region, factor.sizes, (0, decay.strides[0]), decay.offset)


def number(decays: Sequence[Tensor], shape: Sequence[int]) -> Number:
    """The sum of decays of a weight of `shape`, each the same along each row."""
    total: Number = 0.0
    for decay in decays:
        whole = decay.expand(*shape)
        total = total + (float(whole[0, 0]) if whole.stride(0) == 0 else whole[:, :1].double())
    return total


class Combination:
    """What sum_b c_b v_b is in T = sum_b c_b v_b + G^T x, for each of a solve's vectors.

    Arguments:
        decay: of the weight.
        vectors: the weight's part of each vector at the beginning.
    """

    def __init__(self, decay: Number, vectors: Sequence[Tensor]):
        self._decay, self._vectors = decay, vectors
        count = range(len(vectors))
        self._c: list[list[Number]] = [[1.0 if k == b else 0.0 for b in count] for k in count]

    def follow(self, accumulation: Accumulation, target: int, mixings: Sequence[tuple[int, int]], damping: float,
               steps: range) -> None:  # fmt: skip
        """The coefficients c after the steps; `mixings` has their targets and sources."""
        c, shrink = self._c, accumulation.scale * (self._decay + damping)
        for step in steps:
            c[target] = [own - shrink * direction for own, direction in zip(c[target], c[0], strict=True)]
            for (to, source), mixing in zip(mixings, accumulation.mixings, strict=True):
                own, factor = mixing.factors_at(step)
                c[to] = [own * a + factor * b for a, b in zip(c[to], c[source], strict=True)]

    def form(self, changed: set[int]) -> None:
        """Write the vectors that have changed, without G^T x."""
        values = {k: self._value(k, len(changed) == 1) for k in changed}
        for k, value in values.items():
            if value is not self._vectors[k]:
                self._vectors[k].copy_(value)

    def _value(self, k: int, in_place: bool) -> Tensor:
        vector = self._vectors[k]
        value = vector if in_place else vector.clone()
        value.mul_(_as_factor(self._c[k][k], vector))
        for b, other in enumerate(self._vectors):
            c = self._c[k][b]
            if b != k and (isinstance(c, Tensor) or c != 0.0):
                value.addcmul_(other, c.to(vector.dtype)) if isinstance(c, Tensor) else value.add_(other, alpha=c)
        return value


def _as_factor(c: Number, vector: Tensor) -> Number:
    return c.to(vector.dtype) if isinstance(c, Tensor) else c
