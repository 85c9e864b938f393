"""A hypergradient tested on the user's own problem."""

from hvp_engine.diagnostics.hypergradient_check.comparison import check
from hvp_engine.diagnostics.hypergradient_check.verdict import CheckResult, Verdict

__all__ = ["CheckResult", "Verdict", "check"]
