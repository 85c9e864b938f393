"""Every module that has handlers of operators: they are in the table once these are imported."""

from hvp_engine.differentiation.native import (
    adjoints,
    convolution,
    differentiable,
    elementwise,
    linear_algebra,
    nonlinear,
    recurrent,
    shaping,
)

__all__ = [
    "adjoints",
    "convolution",
    "differentiable",
    "elementwise",
    "linear_algebra",
    "nonlinear",
    "recurrent",
    "shaping",
]
