"""Other ways to a hypergradient; each takes the place of `Hypergradient` in `Tuner(estimator=...)`."""

from baselines.estimators.at_minimum import AtMinimum
from baselines.estimators.fitted_response import FittedResponse
from baselines.estimators.gauss_newton import larsen
from baselines.estimators.responses import LinearResponse, StructuredResponse

__all__ = ["AtMinimum", "FittedResponse", "LinearResponse", "StructuredResponse", "larsen"]
