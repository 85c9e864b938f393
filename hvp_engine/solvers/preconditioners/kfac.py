"""Kronecker-factored curvature of linear and convolutional layers as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hvp_engine._support.arguments import check_positive
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import check_like
from hvp_engine.solvers.preconditioners.layers import (
    checked_weights,
    eigen,
    hessian_roots,
    path,
    recorded_layers,
)


@dataclass(frozen=True)
class _Block:
    """The block A (x) G of a layer: eigenvalues and eigenvectors of both factors, and the indices of its leaves."""

    weight: int
    bias: int | None
    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]

    def solve(self, v: Tensor, shift: float) -> Tensor:
        """(A (x) G + shift I)^-1 v for v of shape (outputs, inputs)."""
        (a, p), (g, q) = self.inputs, self.outputs
        return q @ ((q.T @ v @ p) / (torch.outer(g, a) + shift)) @ p.T


class KFACPreconditioner:
    """M = (A (x) G + shift I)^-1 for each layer, whose Gauss-Newton block a Kronecker product approximates.

    For a layer with inputs a (with a 1 for the bias) and outputs z, A is the mean of a a^T over the samples, and G the
    sum of g g^T over samples and outputs, with g = (dz / d outputs)^T s and s s^T the loss's Hessian in the outputs, in
    full: no labels are sampled. The block is exact for a single sample, or if g is the same for all samples, as in
    a deep linear network with squared error. In a convolution every position counts as a sample: A is a sum over
    positions, G a mean. Other parameters (of normalizations, grouped convolutions, layers that are used more than
    once) get one number for each tensor, an estimate of the mean of its diagonal.

    A short Neumann series or Chebyshev iteration gains most, since directions of every scale move at once. The
    condition number need not decrease, least of all in convolutions, whose positions are not independent; conjugate
    gradients, which cope with a few large eigenvalues anyway, gain less or nothing.

    Arguments:
        module: the network, with `torch.nn.Linear` and `torch.nn.Conv2d` layers.
        loss: `loss(outputs, targets)` -> scalar tensor, a sum or mean over samples; outputs are (samples, outputs).
        weights: a dict of (some of) the module's named parameters, in the order of the problem's weights; the
            curvature is taken at their values.
        inputs, targets: a batch.
        shift: > 0, the typical curvature that the blocks do not contain: weight decay and the solver's damping.

    Attributes:
        hvps: products spent with the Hessian: 0.
        gradients: backward passes spent, one for each output; a solve does not count them.

    Cost: one forward pass, one backward pass for each output, and the eigenvalue decompositions of the factors, square
    matrices that stay in memory. It is not updated when the weights change.

    Errors: `TypeError` or `ValueError` naming the argument; `ValueError` if no layer is supported;
    :class:`NonFiniteError` for activations or curvature with NaN or Inf.

    Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015; for
    convolutions Grosse and Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution Layers, ICML 2016.

    >>> import torch, hvp_engine as hvp
    >>> net, x, y = torch.nn.Linear(3, 2), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    >>> half_square = lambda outputs, targets: (outputs - targets).square().sum() / 2
    >>> weights = dict(net.named_parameters())
    >>> M = hvp.KFACPreconditioner(net, half_square, weights, x, y, shift=0.5)
    >>> G = hvp.GaussNewtonOperator(hvp.functional(net), half_square, weights, x, y)
    >>> v = {name: torch.ones_like(weight) for name, weight in weights.items()}
    >>> solution = G.solve(v, hvp.ConjugateGradient(1, damping=0.5, preconditioner=M))      # one sample: M is exact
    >>> solution.status.name
    'CONVERGED'
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor, Any], Tensor],
        weights: Mapping[str, Tensor],
        inputs: Any,
        targets: Any,
        shift: float,
    ):
        self.shift = check_positive(shift, "shift")
        leaves, places = checked_weights(module, weights)
        self._layout = Layout.of(leaves)
        self._blocks, self._means, self.gradients = _factors(module, loss, weights, inputs, targets, places)
        self.hvps = 0

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        check_like(v, self._layout, "v", "weights")
        result = [tensor / (self.shift + self._means.get(index, 0.0)) for index, tensor in enumerate(v)]
        for block in self._blocks:
            rows = v[block.weight].flatten(1)
            if block.bias is not None:
                rows = torch.cat([rows, v[block.bias][:, None]], 1)
            solved = block.solve(rows.to(block.inputs[0].dtype), self.shift).to(rows.dtype)
            if block.bias is not None:
                result[block.bias] = solved[:, -1]
                solved = solved[:, :-1]
            result[block.weight] = solved.reshape(v[block.weight].shape)
        return result


def _factors(
    module: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    weights: Mapping[str, Tensor],
    inputs: Any,
    targets: Any,
    places: dict[str, int],
) -> tuple[list[_Block], dict[int, float], int]:
    """The blocks, the mean curvature of each other weight by its index, and the number of backward passes."""
    layers, once, outputs, state = recorded_layers(module, weights, inputs, places)
    covered = {path(name, kind) for name in once for kind in ("weight", "bias")}
    rest = [name for name in state if name not in covered]
    roots = hessian_roots(loss, outputs, targets)
    sums, means = _covariances(outputs, roots, layers, once, [state[n] for n in rest])
    blocks = []
    for (name, (x, _)), covariance in zip(once.items(), sums, strict=True):
        bias = places.get(path(name, "bias"))
        rows = _input_rows(layers[name], x)
        if bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        a, g = rows.T @ rows / len(outputs), covariance * (len(outputs) / len(rows))
        blocks.append(_Block(places[path(name, "weight")], bias, eigen(a), eigen(g)))
    return blocks, {places[name]: mean for name, mean in zip(rest, means, strict=True)}, roots.shape[2]


def _covariances(
    outputs: Tensor,
    roots: Tensor,
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, tuple[Tensor, Tensor]],
    rest: list[Tensor],
) -> tuple[list[Tensor], list[float]]:
    """Sums of g g^T over samples, positions and outputs for each layer; means of the diagonal for each of `rest`.

    Every sample gets a random sign for each output. It cancels in g g^T, and makes the square of a sum over samples an
    unbiased estimate of the sum of squares: with signs s, t the mean of (s a + t b)^2 is a^2 + b^2.
    """
    generator = torch.Generator(device=outputs.device).manual_seed(0)
    received = [output for _, output in calls.values()]
    sums = [output.new_zeros(_width(layers[name]), _width(layers[name])) for name, (_, output) in calls.items()]
    means = [0.0] * len(rest)
    for root in roots.unbind(2):
        signs = 2 * torch.randint(2, (len(root), 1), generator=generator, device=root.device) - 1
        found = torch.autograd.grad(outputs, [*received, *rest], root * signs, retain_graph=True, allow_unused=True)
        for index, (gradient, name) in enumerate(zip(found, calls, strict=False)):
            if gradient is not None:
                rows = _output_rows(layers[name], gradient)
                sums[index].addmm_(rows.T, rows)
        for index, gradient in enumerate(found[len(received) :]):
            if gradient is not None:
                means[index] += float(gradient.square().mean())
    return sums, means


def _width(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else cast(nn.Linear, layer).out_features


def _input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs that multiply the weights, one row for each sample and position."""
    if isinstance(layer, nn.Conv2d):
        patches = nn.functional.unfold(
            x, layer.kernel_size, layer.dilation, cast(tuple[int, ...], layer.padding), layer.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def _output_rows(layer: nn.Module, gradient: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    return gradient.reshape(-1, gradient.shape[-1])
