"""Operations with first and second derivatives where torch has only first ones, or pays for second ones in memory."""

from hvp_engine.differentiable.attention.function import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
