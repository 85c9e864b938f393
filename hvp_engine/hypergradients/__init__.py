"""Hypergradients: by the implicit function theorem, through fixed points, by unrolling."""

from hvp_engine.hypergradients.estimator import Estimate, Estimator
from hvp_engine.hypergradients.unrolled import Unrolled, UnrolledEstimate
from hvp_engine.hypergradients.update_rules import SGD, Adam, UpdateRule

__all__ = ["SGD", "Adam", "Estimate", "Estimator", "Unrolled", "UnrolledEstimate", "UpdateRule"]
