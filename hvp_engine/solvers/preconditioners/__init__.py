"""Preconditioners: cheap, symmetric positive definite approximations M of A^-1."""

from hvp_engine.solvers.preconditioners.diagonal import DiagonalPreconditioner, JacobiPreconditioner
from hvp_engine.solvers.preconditioners.kfac import KFACPreconditioner
from hvp_engine.solvers.preconditioners.nystrom import NystromPreconditioner
from hvp_engine.solvers.preconditioners.woodbury import WoodburyPreconditioner

__all__ = [
    "DiagonalPreconditioner",
    "JacobiPreconditioner",
    "KFACPreconditioner",
    "NystromPreconditioner",
    "WoodburyPreconditioner",
]
