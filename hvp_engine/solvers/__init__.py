"""Ways to solve (A + damping I) x = v, one file each."""

from hvp_engine.solvers.base import Iteration, Outcome, Solver
from hvp_engine.solvers.neumann import Identity, Neumann

__all__ = ["Identity", "Iteration", "Neumann", "Outcome", "Solver"]
