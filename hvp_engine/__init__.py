"""Inverse-Hessian-vector products and hypergradients, fast and in constant memory.

The names below are the public API; see the README for where to look for what.
"""

from hvp_engine.backend import use_backend
from hvp_engine.errors import (
    BackendError,
    CheckpointError,
    DataError,
    DivergenceError,
    GraphError,
    HvpError,
    NonFiniteError,
    SecondDerivativeError,
)
from hvp_engine.functional import functional
from hvp_engine.implicit import (
    Hypergradient,
    HypergradientResult,
    approx_inverse_hvp,
    best_response,
    hypergradient,
)
from hvp_engine.operators import HessianOperator
from hvp_engine.solution import Solution, Status
from hvp_engine.solvers import Identity, Neumann
from hvp_engine.solving import solve
from hvp_engine.tuner import Record, Tuner

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "GraphError",
    "HessianOperator",
    "HvpError",
    "Hypergradient",
    "HypergradientResult",
    "Identity",
    "Neumann",
    "NonFiniteError",
    "Record",
    "SecondDerivativeError",
    "Solution",
    "Status",
    "Tuner",
    "approx_inverse_hvp",
    "best_response",
    "functional",
    "hypergradient",
    "solve",
    "use_backend",
]
