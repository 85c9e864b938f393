"""Ways to a hypergradient beside `Hypergradient`; each takes its place in `Tuner(estimator=...)`."""

from hvp_engine.estimators.at_minimum import AtMinimum
from hvp_engine.estimators.fitted_response import FittedResponse
from hvp_engine.estimators.gauss_newton import larsen
from hvp_engine.estimators.responses import LinearResponse, StructuredResponse
from hvp_engine.estimators.unrolled import Unrolled, UnrolledEstimate
from hvp_engine.estimators.update_rules import SGD, Adam, UpdateRule

__all__ = [
    "SGD",
    "Adam",
    "AtMinimum",
    "FittedResponse",
    "LinearResponse",
    "StructuredResponse",
    "Unrolled",
    "UnrolledEstimate",
    "UpdateRule",
    "larsen",
]
