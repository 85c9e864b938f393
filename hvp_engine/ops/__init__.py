"""The fused vector ops: one list of schemas, a plain reference, and the backends that implement them."""

from hvp_engine.ops.schemas import OPS, Op, bind, check

__all__ = ["OPS", "Op", "bind", "check"]
