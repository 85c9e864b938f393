"""Preconditioners: cheap symmetric positive definite approximations M of an inverse, as a solver applies them."""

from hvp_engine.preconditioning.base import Preconditioner, check_preconditioner, precondition
from hvp_engine.preconditioning.diagonal import DiagonalPreconditioner, JacobiPreconditioner
from hvp_engine.preconditioning.kfac import KFACPreconditioner
from hvp_engine.preconditioning.nystrom import NystromPreconditioner

__all__ = [
    "DiagonalPreconditioner",
    "JacobiPreconditioner",
    "KFACPreconditioner",
    "NystromPreconditioner",
    "Preconditioner",
    "check_preconditioner",
    "precondition",
]
