"""Diagonal preconditioners: one from known weight decays, and Jacobi's from an estimated diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_not_negative
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.pytree import Tree, flatten
from hvp_engine.differentiation.linear_map import LinearMap, check_operator

_FLOOR = 0.1
"""A diagonal estimate below this share of its row's norm, or below zero, is mostly noise."""


class DiagonalPreconditioner:
    """M = 1 / (diagonal + shift), element by element.

    A decay per weight, sum(decay * w**2) / 2, adds `decay` to the Hessian's diagonal: often the part of the curvature
    that differs most between weights, and known for free. `shift` stands for the rest of the Hessian.

    Arguments:
        diagonal: a tree of tensors like the weights (or that broadcasts to them), or a function without arguments
            that returns one and is called at each application, for a diagonal that changes between solves.
        shift: added to the diagonal, >= 0: roughly the typical eigenvalue of the rest of the Hessian; 0 if there is
            no rest.

    Cost: one pass over the weights for each application.

    Errors: `ValueError` if diagonal + shift is not finite and positive, or shift < 0; `TypeError` for leaves that
    are not tensors.

    >>> import torch, hvp_engine as hvp
    >>> decay = torch.tensor([1.0, 100.0, 1e4])
    >>> M = hvp.DiagonalPreconditioner(decay)
    >>> hvp.solve(lambda v: decay * v, torch.ones(3), hvp.ConjugateGradient(1, preconditioner=M)).value
    tensor([1.0000e+00, 1.0000e-02, 1.0000e-04])
    """

    def __init__(self, diagonal: Tree | Callable[[], Tree], shift: float = 0.0):
        shift = check_not_negative(shift, "shift")
        self.diagonal, self.shift = diagonal, shift
        for index, leaf in enumerate(self._leaves()):
            total = leaf.detach() + shift
            if not bool((torch.isfinite(total) & (total > 0)).all()):
                raise ValueError(
                    f"diagonal: expected diagonal + shift finite and > 0; got {float(total.min()):.3g} as the smallest "
                    f"in leaf {index}: use a larger shift"
                )

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        leaves = self._leaves()
        if len(leaves) != len(v):
            raise ValueError(f"diagonal: expected {len(v)} leaves, one for each of the weights; got {len(leaves)}")
        return [tensor / (leaf.to(tensor.dtype) + self.shift) for tensor, leaf in zip(v, leaves, strict=True)]

    def _leaves(self) -> list[Tensor]:
        module = isinstance(self.diagonal, torch.nn.Module)
        tree = self.diagonal() if callable(self.diagonal) and not module else self.diagonal
        return flatten(tree, "diagonal")[0]


def hutchinson_diagonal(operator: LinearMap, probes: int, seed: int = 0) -> tuple[FlatVector, FlatVector]:
    """Unbiased estimates of an operator's diagonal, the mean of z * A z over random signs z, and of the squared norms
    of its rows, the mean of (A z)^2.

    The diagonal's standard deviation in an entry is the norm of the rest of that row, over sqrt(probes); a diagonal
    operator needs one probe.

    Source: Bekas, Kokiopoulou and Saad, An Estimator for the Diagonal of a Matrix, Applied Numerical Mathematics 2007,
    equation 5.
    """
    layout: Layout = operator.layout
    generator = layout.generator(seed)
    diagonal, squares = FlatVector(layout), FlatVector(layout)
    signs, image = FlatVector(layout), FlatVector(layout)
    for _ in range(probes):
        for view in signs.views:
            view.copy_(2 * torch.randint(2, view.shape, generator=generator, device=view.device) - 1)
        signs.refresh()
        image.copy_(operator.product(signs.tangents))
        diagonal.data.addcmul_(signs.data, image.data, value=1 / probes)
        squares.data.addcmul_(image.data, image.data, value=1 / probes)
    return diagonal, squares


class JacobiPreconditioner(DiagonalPreconditioner):
    """M = 1 / (d + shift), with d a Hutchinson estimate of an operator's diagonal.

    An estimate below a tenth of its row's norm, or below zero, is noise and is raised to a tenth. With few probes, the
    noise in the other entries can cost more products than the diagonal saves, as for softmax regression
    (bench/results/products.csv); known decays need no probes.

    Arguments:
        operator: a :class:`HessianOperator`, a :class:`GaussNewtonOperator` or another operator of this package.
        probes: products to spend, >= 1.
        shift: added to the diagonal, >= 0; the solver's damping belongs here.
        seed: of the random signs.

    Attributes:
        hvps: products spent here; a solve does not count them.

    Cost: `probes` products, once; one flat vector. It is not updated when the operator's weights change.

    Errors: `TypeError` or `ValueError` naming the argument; `ValueError` for a zero or non-finite diagonal.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (torch.tensor([1.0, 100.0, 1e4]) * w**2).sum() / 2, torch.zeros(3))
    >>> M = hvp.JacobiPreconditioner(H, probes=1, shift=0.0)
    >>> hvp.solve(H, torch.ones(3), hvp.ConjugateGradient(20, preconditioner=M)).status.name
    'CONVERGED'
    """

    def __init__(self, operator: LinearMap, probes: int = 10, shift: float = 0.0, seed: int = 0):
        check_operator(operator, "operator")
        probes = check_count(probes, "probes")
        diagonal, squares = hutchinson_diagonal(operator, probes, seed)
        estimate = FlatVector(operator.layout, torch.maximum(diagonal.data, _FLOOR * squares.data.sqrt()))
        super().__init__(estimate.views, shift)
        self.hvps = probes
