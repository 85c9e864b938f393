"""Every error of the package. Each message names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations


class HvpError(Exception):
    """Base of the package's own errors."""


class DivergenceError(HvpError, ArithmeticError):
    """A solve produced non-finite values or grew beyond its stated factor."""


class NonFiniteError(DivergenceError, ValueError):
    """An argument or a loss holds NaN or Inf, so that there is nothing to solve."""


class SecondDerivativeError(HvpError, RuntimeError):
    """An operator in the loss has no second derivative, or a derivative of the result was asked for."""


class GraphError(HvpError, ValueError):
    """A gradient or loss carries no autograd graph, or the graph does not reach what it should."""


class StaleGraphError(GraphError, RuntimeError):
    """The graph of a loss or a gradient has been freed, or a tensor in it was changed in place."""


class TraceError(HvpError, RuntimeError):
    """A loss cannot be traced into a graph, because it depends on tensor values in Python or changes tensors."""


class BackendError(HvpError, RuntimeError):
    """A backend or engine is unknown, unavailable, or failed while running."""


class DataError(HvpError, ValueError):
    """A data file is missing, truncated or not in the expected format."""


class DistributedError(HvpError, RuntimeError):
    """Another process failed, or the processes do not fit together."""


class CheckpointError(HvpError, ValueError):
    """A checkpoint is unreadable, incomplete or belongs to something else."""
