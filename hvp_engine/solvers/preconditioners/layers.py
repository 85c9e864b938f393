"""What preconditioners of linear and convolutional layers need: the layers' inputs and outputs, the loss's Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvp_engine._support.pytree import check_scalar, flatten
from hvp_engine._support.torch_compat import pytree
from hvp_engine.errors import NonFiniteError

Calls = dict[str, tuple[Tensor, Tensor]]
"""The input and the output of each layer."""


def checked_weights(module: Any, weights: Any) -> tuple[list[Tensor], dict[str, int]]:
    """The leaves of `weights`, and the place of each name among them; errors name the argument."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module; got {type(module).__name__}")
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a dict of named parameters; got {type(weights).__name__}")
    names = pytree.tree_flatten({name: name for name in weights})[0]
    return flatten(dict(weights), "weights")[0], {name: place for place, name in enumerate(names)}


def not_finite() -> NonFiniteError:
    """The error for a curvature that is not."""
    return NonFiniteError(
        "inputs: expected finite activations and curvature; got NaN or Inf: check the inputs, the targets and the "
        "weights"
    )


def recorded_layers(
    module: nn.Module, weights: Mapping[str, Tensor], inputs: Any, places: Mapping[str, int]
) -> tuple[dict[str, nn.Module], Calls, Tensor, dict[str, Tensor]]:
    """The linear and convolutional layers whose weights are in `places`, the calls of those that are used once, the
    outputs of the module, and the leaves that these depend on; `ValueError` if there is no such layer."""
    layers = {name: layer for name, layer in module.named_modules() if path(name, "weight") in places}
    layers = {name: layer for name, layer in layers.items() if _is_known(layer)}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda layer, arguments, output: calls[name].append((arguments[0].detach(), output))

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            state = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            outputs = torch.func.functional_call(module, state | buffers, (inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}
    if not once:
        raise ValueError("module: expected torch.nn.Linear or Conv2d layers with weights in `weights`; got none")
    return layers, once, outputs, state


def path(layer: str, kind: str) -> str:
    """The name of a layer's parameter."""
    return f"{layer}.{kind}" if layer else kind


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def hessian_roots(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """For each sample a matrix s such that s s^T is the loss's Hessian in the outputs: (samples, outputs, outputs)."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"module: expected outputs of shape (samples, outputs); got {got}")
    with torch.enable_grad():
        points = outputs.detach().requires_grad_()
        value = loss(points, targets)
        check_scalar(value, "loss")
        (gradient,) = torch.autograd.grad(value, points, create_graph=True)
        if not gradient.requires_grad:
            return outputs.new_zeros(*outputs.shape, outputs.shape[1])
        columns = [torch.autograd.grad(column.sum(), points, retain_graph=True)[0] for column in gradient.unbind(1)]
    hessians = torch.stack(columns, 2)
    values, vectors = eigen((hessians + hessians.mT) / 2)
    return vectors * values.sqrt()[:, None, :]


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (negative ones set to zero) and eigenvectors of symmetric matrices."""
    if not bool(torch.isfinite(matrix).all()):
        raise not_finite()
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors
