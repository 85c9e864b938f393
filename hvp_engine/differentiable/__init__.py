"""Operations that torch has without a fast second derivative: value, first and second derivative by kernels each."""

from hvp_engine.differentiable.cross_entropy_functions import cross_entropy, linear_cross_entropy, log_softmax
from hvp_engine.differentiable.normalization_functions import batch_norm, group_norm, layer_norm, rms_norm

__all__ = [
    "batch_norm",
    "cross_entropy",
    "group_norm",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
]
