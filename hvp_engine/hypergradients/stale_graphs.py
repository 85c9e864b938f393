"""Graphs that autograd can no longer differentiate, because they were freed or their tensors have changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvp_engine._support.torch_compat import CHANGED_TENSOR, FREED_GRAPH
from hvp_engine.errors import StaleGraphError


@contextlib.contextmanager
def refused_if_stale(name: str) -> Iterator[None]:
    """Turn autograd's errors about such a graph into ours, which name the argument it belongs to."""
    try:
        yield
    except RuntimeError as error:
        if FREED_GRAPH in str(error):
            raise StaleGraphError(
                f"{name}: expected a graph that can still be differentiated; got one that an earlier backward pass has "
                "freed: pass retain_graph=True (or create_graph=True) to every .backward() and torch.autograd.grad "
                f"before this call, or compute {name} again. torch says: {error}"
            ) from error
        if CHANGED_TENSOR in str(error):
            raise StaleGraphError(
                f"{name}: expected a graph whose tensors are as the forward pass left them; got one of which a tensor "
                "was changed in place afterwards, as optimizer.step() changes weights: make this call before the step, "
                f"or compute {name} again after it. torch says: {error}"
            ) from error
        raise
