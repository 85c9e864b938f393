"""The fused ops: one list of schemas, a plain reference, and the backends that implement them."""

from hvp_engine.ops.recurrences import CG, MINRES, RECURRENCES, Scalars, bind_recurrence
from hvp_engine.ops.schemas import OPS, Op, bind, check

__all__ = ["CG", "MINRES", "OPS", "RECURRENCES", "Op", "Scalars", "bind", "bind_recurrence", "check"]
