"""Neumann series by plain products of autograd, with nothing around them.

Of a model of 20 weights, what a general solve does before, between and after its products takes as long as three
products. Where autograd is known to make them faster than a program would, the extension runs all terms of a short
series in one call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine.differentiation.double_backward import Pullback, Tape
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.ops.backend import select
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import LinearSystem, Result, Vector
from hvp_engine.solvers.iteration import GROWTH_LIMIT
from hvp_engine.solvers.neumann import outcome_of
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import Spectrum

try:
    from hvp_engine.ops.cpp import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_LARGEST = 1 << 16
"""Elements up to which one thread updates vectors as fast as several."""

_MOST_SHAPES = 1024
_NOT_ROWS: set[tuple[torch.Size, ...]] = set()
"""Shapes of weights whose products autograd does not lay out row after row, as those of convolutions: a series that the
extension cannot read has made its first product in vain."""


def plain_series(tape: Tape, v: Vector, solver: Solver) -> tuple[list[Tensor], Sequence[float]] | None:
    """What a general solve gives too, bit for bit, and its figures, which `outcome_of` reads.

    None where a general solve is needed: for other solvers, on other devices, where a program is faster, and for
    whatever goes wrong, which it explains.
    """
    if type(solver) is not Neumann or solver.alpha == "auto" or solver.form != "horner":
        return None
    if solver.preconditioner is not None or not solver.iterations or sum([part.numel() for part in v]) > _LARGEST:
        return None
    if select(v[0].device)[0] != "cpp":
        return None
    alpha, damping, terms = solver.alpha, solver.damping, solver.iterations

    def series(pullback: Pullback) -> tuple[list[Tensor], Sequence[float]] | None:
        p, cotangents = pullback.copies(v)
        shapes = tuple([part.shape for part in v])
        product = pullback.rows_at(cotangents) if shapes in _NOT_ROWS else pullback.at(cotangents)
        try:
            figures = _C.plain_series(product, v, p, terms, alpha, damping)
        except RuntimeError:  # autograd's, which it raises again
            return None
        if figures is None:
            if len(_NOT_ROWS) >= _MOST_SHAPES:
                _NOT_ROWS.clear()
            _NOT_ROWS.add(shapes)
            return None
        return list(p), figures

    found = tape.plainly(terms, series)
    if found is None:
        return None
    squared_v, _, bad_v, squared_residual, _, bad = found[1]
    good = bad_v == 0 == bad and squared_residual <= GROWTH_LIMIT**2 * squared_v < math.inf  # none of them is NaN
    return found if good else None


class TapeSystem(LinearSystem):
    """A system whose operator is the gradient of a loss that autograd has recorded, used for one solve."""

    def __init__(self, tape: Tape):
        super().__init__(tape, EagerEngine(), Spectrum())

    def general(self, v: Vector, solver: Solver, name: str = "v", x0: Vector | None = None) -> Result:
        """The solution by a general solve, whose time the tape is told."""
        assert isinstance(self.operator, Tape)
        start = time.thread_time()
        result = super().solve(v, solver, name, x0)
        self.operator.solved(time.thread_time() - start)
        return result

    def solve(self, v: Vector, solver: Solver, name: str = "v", x0: Vector | None = None) -> Result:
        assert isinstance(self.operator, Tape)
        found = plain_series(self.operator, v, solver) if x0 is None else None
        if found is None:
            return self.general(v, solver, name, x0)
        assert isinstance(solver, Neumann)
        value, figures = found
        outcome = outcome_of(figures, solver.iterations, value[0].dtype)
        solution = Solution(
            value=None,
            iterations=solver.iterations,
            hvps=solver.iterations,
            residual_norm=outcome.residual_norm,
            residual_of=outcome.residual_of,
            status=outcome.status,
            alpha=solver.alpha_for(None),
            damping=solver.damping,
        )
        return value, solution
