"""Inverse-Hessian-vector products and hypergradients, fast and in constant memory.

The names below are the public API; the README says which one does what.
"""

from hvp_engine import differentiable as differentiable
from hvp_engine.diagnostics.hypergradient_check import CheckResult, Verdict, check
from hvp_engine.differentiation.modules import functional
from hvp_engine.differentiation.problem import Averaged
from hvp_engine.distributed import DataParallel
from hvp_engine.errors import (
    BackendError,
    CheckpointError,
    DataError,
    DistributedError,
    DivergenceError,
    GraphError,
    HvpError,
    NonFiniteError,
    SecondDerivativeError,
    TraceError,
)
from hvp_engine.hypergradients.autograd_api import approx_inverse_hvp, best_response, hypergradient
from hvp_engine.hypergradients.estimator import Estimate
from hvp_engine.hypergradients.fixed_point import FixedPointHypergradient
from hvp_engine.hypergradients.implicit import Hypergradient, HypergradientResult
from hvp_engine.hypergradients.influence import Influence, influence_matrix
from hvp_engine.hypergradients.response import ResponseJacobian, response_jacobian
from hvp_engine.operators.base import LinearOperator, solve
from hvp_engine.operators.eigenvalues import ExtremeEigenvalues, SpectralDensity, extreme_eigenvalues, spectral_density
from hvp_engine.operators.gauss_newton import GaussNewtonOperator
from hvp_engine.operators.hessian import HessianOperator
from hvp_engine.operators.identity import I
from hvp_engine.operators.linear_model import LinearModelOperator
from hvp_engine.operators.stochastic import StochasticHessianOperator
from hvp_engine.ops.backend import use_backend
from hvp_engine.solvers import MINRES, Budget, Chebyshev, ConjugateGradient, Exact, Identity, Neumann, Nystrom
from hvp_engine.solvers.preconditioners import (
    DiagonalPreconditioner,
    JacobiPreconditioner,
    KFACPreconditioner,
    NystromPreconditioner,
    WoodburyPreconditioner,
)
from hvp_engine.solvers.solution import Solution, Status
from hvp_engine.tuning import History, Record, Tuner

__version__ = "0.1.0"

__all__ = [
    "Averaged",
    "MINRES",
    "BackendError",
    "Budget",
    "Chebyshev",
    "CheckResult",
    "CheckpointError",
    "ConjugateGradient",
    "DataError",
    "DataParallel",
    "DiagonalPreconditioner",
    "DistributedError",
    "DivergenceError",
    "Estimate",
    "Exact",
    "ExtremeEigenvalues",
    "FixedPointHypergradient",
    "GaussNewtonOperator",
    "GraphError",
    "HessianOperator",
    "History",
    "HvpError",
    "Hypergradient",
    "HypergradientResult",
    "Identity",
    "I",
    "Influence",
    "JacobiPreconditioner",
    "KFACPreconditioner",
    "LinearModelOperator",
    "LinearOperator",
    "Neumann",
    "NonFiniteError",
    "Nystrom",
    "NystromPreconditioner",
    "Record",
    "ResponseJacobian",
    "SecondDerivativeError",
    "Solution",
    "SpectralDensity",
    "Status",
    "StochasticHessianOperator",
    "TraceError",
    "Tuner",
    "Verdict",
    "WoodburyPreconditioner",
    "approx_inverse_hvp",
    "best_response",
    "check",
    "differentiable",
    "extreme_eigenvalues",
    "functional",
    "hypergradient",
    "influence_matrix",
    "response_jacobian",
    "solve",
    "spectral_density",
    "use_backend",
]
