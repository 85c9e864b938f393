"""Operations with first and second derivatives where torch has only first ones, or pays for second ones in time or
memory."""

from hvp_engine.differentiable.attention.function import scaled_dot_product_attention
from hvp_engine.differentiable.recurrent.layers import gru, lstm

__all__ = ["gru", "lstm", "scaled_dot_product_attention"]
