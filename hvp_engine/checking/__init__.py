"""A hypergradient tested on the user's own problem."""

from hvp_engine.checking.comparison import check
from hvp_engine.checking.verdict import CheckResult, Verdict

__all__ = ["CheckResult", "Verdict", "check"]
