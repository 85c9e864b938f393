"""Recurrent layers: one operation for each layer and direction, with first and second derivatives."""

from hvp_engine.differentiable.recurrent.layers import gru, lstm

__all__ = ["gru", "lstm"]
