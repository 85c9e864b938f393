"""Ways to solve (A + damping I) x = v, one file each."""

from hvp_engine.solvers.base import LinearSystem, Prepared, Solver
from hvp_engine.solvers.budget import Budget
from hvp_engine.solvers.chebyshev import Chebyshev
from hvp_engine.solvers.conjugate_gradient import ConjugateGradient
from hvp_engine.solvers.dense import Exact
from hvp_engine.solvers.iteration import Iteration, Outcome
from hvp_engine.solvers.minres import MINRES
from hvp_engine.solvers.neumann import Identity, Neumann
from hvp_engine.solvers.nystrom import Nystrom

__all__ = [
    "MINRES",
    "Budget",
    "Chebyshev",
    "ConjugateGradient",
    "Exact",
    "Identity",
    "Iteration",
    "LinearSystem",
    "Neumann",
    "Nystrom",
    "Outcome",
    "Prepared",
    "Solver",
]
