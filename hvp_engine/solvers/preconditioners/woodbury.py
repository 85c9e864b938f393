"""The Gauss-Newton matrix of linear and convolutional layers, inverted in the space of the batch's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hvp_engine._support.arguments import check_count
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import check_like, flatten
from hvp_engine._support.torch_compat import broadcast_shapes
from hvp_engine.solvers.preconditioners.layers import (
    checked_weights,
    hessian_roots,
    not_finite,
    path,
    recorded_layers,
)


class _Rows:
    """The rows F of one weight, one for each sample and output: F F^T is its part of the Gauss-Newton matrix's dual."""

    def times(self, v: Tensor) -> Tensor:
        """F v."""
        raise NotImplementedError

    def transposed(self, u: Tensor) -> Tensor:
        """F^T u, shaped like the weight."""
        raise NotImplementedError

    def add_to(self, dual: Tensor, inverse: Tensor) -> None:
        """dual <- dual + F diag(inverse) F^T, with `inverse` a scalar or like the weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Dense(_Rows):
    """F as a matrix."""

    rows: Tensor
    shape: torch.Size

    def times(self, v: Tensor) -> Tensor:
        return self.rows @ v.reshape(-1)

    def transposed(self, u: Tensor) -> Tensor:
        return (u @ self.rows).view(self.shape)

    def add_to(self, dual: Tensor, inverse: Tensor) -> None:
        dual.addmm_(self.rows * inverse.expand(self.shape).reshape(-1), self.rows.T)


@dataclass(frozen=True)
class _Outer(_Rows):
    """Row (b, c) of F is the outer product of `outputs[b, c]` and `inputs[b]`."""

    inputs: Tensor
    outputs: Tensor
    shape: torch.Size

    def times(self, v: Tensor) -> Tensor:
        return torch.einsum("bco,bo->bc", self.outputs, self.inputs @ v.flatten(1).T).reshape(-1)

    def transposed(self, u: Tensor) -> Tensor:
        samples, columns, _ = self.outputs.shape
        return torch.einsum("bc,bco->bo", u.view(samples, columns), self.outputs).T.matmul(self.inputs).view(self.shape)

    def add_to(self, dual: Tensor, inverse: Tensor) -> None:
        samples, columns, width = self.outputs.shape
        blocks = dual.view(samples, columns, samples, columns)
        if inverse.numel() == 1:
            flat = self.outputs.reshape(-1, width)
            gram = (self.inputs @ self.inputs.T * inverse)[:, None, :, None]
            blocks.add_((flat @ flat.T).view_as(blocks) * gram)
            return
        weights = inverse.expand(self.shape).flatten(1).T
        for a in range(samples):  # sum over o and i of outputs[b, c, o] outputs[a, e, o] inputs[b, i] inputs[a, i] / d
            products = (self.inputs * self.inputs[a]) @ weights
            blocks[:, :, a].add_((self.outputs * products[:, None]) @ self.outputs[a].T)


class WoodburyPreconditioner:
    """M = (diagonal + J^T S J)^-1, with J^T S J the Gauss-Newton matrix: by Woodbury's formula,

        M = D - D F^T (I + F D F^T)^-1 F D,   D = 1 / diagonal,   F^T F = J^T S J,

    where F has a row for each sample and output, and S is the loss's Hessian in the outputs. So M is exact for linear
    models, for networks whose Hessian is near its Gauss-Newton matrix close to it. Parameters of other layers
    (normalizations, grouped convolutions, layers that are used more than once) get 1 / diagonal.

    It is a preconditioner and not an inverse: where the network is not linear, M v alone is further from H^-1 v than
    what 20 products of conjugate gradients reach. With it they may need far fewer products, which pays if a product
    takes long, or if many right-hand sides share M.

    Arguments:
        module: the network, with `torch.nn.Linear` and `torch.nn.Conv2d` layers.
        loss: `loss(outputs, targets)` -> scalar tensor, a sum or mean over samples, convex in the outputs, such as
            `cross_entropy` or `mse_loss`; outputs are (samples, outputs).
        weights: a dict of (some of) the module's named parameters, in the order of the problem's weights; the
            curvature is taken at their values.
        inputs, targets: a batch.
        diagonal: > 0, what the Hessian has besides: weight decay plus the solver's damping. A number, or a tree like
            `weights` of tensors that broadcast to them.
        max_size: refuse more rows, samples times outputs: memory grows as their square, time as their cube.

    Attributes:
        hvps: products spent with the Hessian: 0.
        gradients: backward passes spent, one for each output; a solve does not count them.

    Cost, for n rows: one forward pass, one backward pass for each output, the factorization of an n x n matrix,
    n^3 / 3 operations; once. An application takes about four products with F, and n^2 operations. Memory: n^2 numbers;
    the outputs' derivatives; for layers with more than one position for each sample, as convolutions, n times the
    weights. It is not updated when the weights change.

    Errors: `TypeError` or `ValueError` naming the argument; `ValueError` if no layer is supported;
    :class:`NonFiniteError` for activations or curvature with NaN or Inf.

    Source: Woodbury, Inverting Modified Matrices, Princeton 1950; in the space of the batch: Ren and Goldfarb,
    Efficient Subsampled Gauss-Newton and Natural Gradient Methods for Training Neural Networks, arXiv 2019.

    >>> import torch, hvp_engine as hvp
    >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> weights = dict(net.named_parameters())
    >>> M = hvp.WoodburyPreconditioner(net, torch.nn.functional.cross_entropy, weights, x, y, diagonal=0.5)
    >>> G = hvp.GaussNewtonOperator(hvp.functional(net), torch.nn.functional.cross_entropy, weights, x, y)
    >>> v = {name: torch.ones_like(weight) for name, weight in weights.items()}
    >>> G.solve(v, hvp.ConjugateGradient(1, damping=0.5, preconditioner=M)).status.name     # a linear model: M is exact
    'CONVERGED'
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor, Any], Tensor],
        weights: Mapping[str, Tensor],
        inputs: Any,
        targets: Any,
        diagonal: Any,
        max_size: int = 3000,
    ):
        leaves, places = checked_weights(module, weights)
        max_size = check_count(max_size, "max_size", what="the number of rows")
        self._layout = Layout.of(leaves)
        self._inverses = [1 / d for d in _diagonals(diagonal, weights, leaves)]
        layers, calls, outputs, _ = recorded_layers(module, weights, inputs, places)
        roots = hessian_roots(loss, outputs, targets)
        self.hvps, self.gradients = 0, roots.shape[2]
        size = roots.shape[0] * roots.shape[2]
        if size > max_size:
            raise ValueError(
                f"inputs: expected at most max_size={max_size} samples times outputs; got {size}: use fewer samples, "
                "hvp.KFACPreconditioner, or a larger max_size"
            )
        received = [output for _, output in calls.values()]
        passes = [torch.autograd.grad(outputs, received, root, retain_graph=True) for root in roots.unbind(2)]
        self._rows: list[tuple[int, _Rows]] = []
        dual = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        for (name, (x, _)), gradients in zip(calls.items(), zip(*passes, strict=True), strict=True):
            of_weight, of_bias = _rows_of(layers[name], x, torch.stack(gradients, 1))
            self._rows.append((places[path(name, "weight")], of_weight))
            if path(name, "bias") in places:
                self._rows.append((places[path(name, "bias")], of_bias))
        for place, rows in self._rows:
            rows.add_to(dual, self._inverses[place])
        self._factor, failed = torch.linalg.cholesky_ex(dual)
        if failed or not bool(torch.isfinite(self._factor).all()):
            raise not_finite()

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        check_like(v, self._layout, "v", "weights")
        dtype = self._factor.dtype
        result = [tensor.to(dtype) * inverse for tensor, inverse in zip(v, self._inverses, strict=True)]
        images = torch.stack([rows.times(result[place]) for place, rows in self._rows]).sum(0)
        solved = torch.cholesky_solve(images[:, None], self._factor)[:, 0]
        for place, rows in self._rows:
            result[place] = result[place] - rows.transposed(solved) * self._inverses[place]
        return [tensor.to(like.dtype) for tensor, like in zip(result, v, strict=True)]


def _diagonals(diagonal: Any, weights: Mapping[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The diagonal's part for each leaf, all > 0."""
    if isinstance(diagonal, int | float):
        parts = [torch.full((), float(diagonal), dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
    else:
        parts = flatten(diagonal, "diagonal")[0]
        if len(parts) != len(leaves):
            raise ValueError(f"diagonal: expected {len(leaves)} leaves, one for each of the weights; got {len(parts)}")
        parts = [part.detach().to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    for name, part, leaf in zip(weights, parts, leaves, strict=True):
        if not bool((torch.isfinite(part) & (part > 0)).all()):
            raise ValueError(f"diagonal: expected finite values > 0; got {float(part.min()):.3g} for {name!r}")
        if broadcast_shapes(part.shape, leaf.shape) != leaf.shape:
            raise ValueError(
                f"diagonal: expected a shape that broadcasts to {tuple(leaf.shape)}, that of {name!r}; got "
                f"{tuple(part.shape)}"
            )
    return parts


def _rows_of(layer: nn.Module, x: Tensor, gradients: Tensor) -> tuple[_Rows, _Rows]:
    """The rows of a layer's weight and of its bias. `gradients` are those of its output, (samples, outputs, ...)."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Conv2d):
        padding = cast(tuple[int, ...], layer.padding)
        patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).mT
        signals = gradients.flatten(3).mT
    else:
        patches = x.reshape(len(x), -1, x.shape[-1])
        signals = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])
    of_bias = _Dense(signals.sum(2).flatten(0, 1), torch.Size(weight.shape[:1]))
    if patches.shape[1] == 1:
        return _Outer(patches[:, 0], signals[:, :, 0], weight.shape), of_bias
    dense = torch.einsum("bcpo,bpk->bcok", signals, patches).flatten(0, 1).flatten(1)
    return _Dense(dense, weight.shape), of_bias
