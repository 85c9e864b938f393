"""Operations with first and second derivatives where torch has only first ones, or pays for second ones in time or
memory."""

from hvp_engine.differentiable.attention.function import scaled_dot_product_attention
from hvp_engine.differentiable.cross_entropy_functions import cross_entropy, linear_cross_entropy, log_softmax
from hvp_engine.differentiable.normalization_functions import batch_norm, group_norm, layer_norm, rms_norm
from hvp_engine.differentiable.recurrent.layers import gru, lstm

__all__ = [
    "batch_norm",
    "cross_entropy",
    "group_norm",
    "gru",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "lstm",
    "rms_norm",
    "scaled_dot_product_attention",
]
