"""A low-rank approximation of an operator as a preconditioner."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hvp_engine._support.arguments import check_count, check_positive
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine._support.pytree import check_like
from hvp_engine.differentiation.linear_map import LinearMap, check_fixed, check_operator
from hvp_engine.solvers.batched import fill
from hvp_engine.solvers.low_rank import Sketch


class NystromPreconditioner:
    """M = (I + U ((l_k + rho) / (L + rho) - I) U^T) / (l_k + rho), U L U^T ~ A of rank k, l_k the smallest of L.

    It brings the large eigenvalues of A + rho I down to about l_k + rho, so that the small ones determine the condition
    number. That pays off if a few eigenvalues stand out, as they do in trained networks.

    Arguments:
        operator: a :class:`HessianOperator`, a :class:`GaussNewtonOperator` or another operator of this package.
        rank: products to spend, >= 1.
        rho: > 0; the solver's damping, if it has one.
        sketch: "gaussian" or "columns"; see :class:`Nystrom`.
        seed: of the test vectors.

    Attributes:
        hvps: products spent here; a solve does not count them.

    Cost: `rank` products, once; `rank` flat vectors; two passes over them for each application.

    Errors: `TypeError` or `ValueError` naming the argument.

    Source: Frangella, Tropp and Udell, Randomized Nystrom Preconditioning, SIAM Journal on Matrix Analysis and
    Applications 2023, equation 5.

    >>> import torch, hvp_engine as hvp
    >>> d = torch.tensor([1.0, 2.0, 1.0, 2.0, 1e4, 1e5])
    >>> H = hvp.HessianOperator(lambda w: (d * w**2).sum() / 2, torch.zeros(6))
    >>> M = hvp.NystromPreconditioner(H, rank=3, rho=0.1)
    >>> hvp.solve(H, torch.ones(6), hvp.ConjugateGradient(6, preconditioner=M)).status.name
    'CONVERGED'
    """

    def __init__(
        self,
        operator: LinearMap,
        rank: int,
        rho: float,
        sketch: Literal["gaussian", "columns"] = "gaussian",
        seed: int = 0,
    ):
        check_operator(operator, "operator")
        check_fixed(operator, "operator")
        rank, rho = check_count(rank, "rank"), check_positive(rho, "rho")
        columns = Sketch(operator.layout, rank, sketch, seed)
        fill(columns, operator.linear_map)
        self.hvps = columns.steps
        self._layout = operator.layout
        self._basis, values, _ = columns.low_rank()
        self._least = values.amin(0) + rho if len(values) else values.new_tensor(rho)
        # M v = (v + U gains U^T v) / least: an eigenvector with eigenvalue l gets (1 + gain) / least = 1 / (l + rho).
        self._gains = self._least / (values + rho) - 1

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        check_like(v, self._layout, "v", "weights")
        vector = FlatVector.of(self._layout, v)
        vector.data.addmv_(self._basis.T, self._gains * (self._basis @ vector.data))
        vector.data.div_(self._least)
        return vector.views
