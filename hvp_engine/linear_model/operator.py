"""The Hessian of a linear model, by its factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine._support.flat_vector import FlatVector, Layout, padded
from hvp_engine._support.pytree import flatten
from hvp_engine.linear_model import reference as linear_model_reference
from hvp_engine.linear_model.arguments import Loss, Reduction, check_names, check_targets, check_weights, decays_of
from hvp_engine.linear_model.engine import FactoredLinearization, LinearModelEngine, kernels_on
from hvp_engine.linear_model.reference import Factors
from hvp_engine.operators.hessian import CurvatureOperator
from hvp_engine.solvers.lanczos import Tridiagonalization

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "squared": functional.mse_loss,
    "logistic": functional.binary_cross_entropy_with_logits,
    "softmax": functional.cross_entropy,
}


class LinearModelOperator(CurvatureOperator):
    """The Hessian of a linear model's loss in its weights, by its factors.

    With outputs = inputs W^T + b, it is the second derivative in (W, b) of exactly

    | loss       | L(W, b)                                                                            |
    |------------|------------------------------------------------------------------------------------|
    | "squared"  | `F.mse_loss(outputs, targets, reduction=reduction)`                                |
    | "logistic" | `F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)`        |
    | "softmax"  | `F.cross_entropy(outputs, targets, reduction=reduction)`                           |

    plus sum(decay * W**2) / 2, and the same for b. (So "mean" divides the squared and the logistic loss by
    samples * outputs, the softmax loss by samples; the squared loss has no factor 1/2; the decay is never divided.) It
    is H V = G(V X^T) X + decay * V, with G the loss's own curvature in the outputs, sample by sample. The caller says
    which loss it is; nothing here can check that.

    Arguments:
        inputs: X, (samples, features), in the weights' dtype or a narrower one (float32, bfloat16, float16).
        weights: W like that of `nn.Linear`, (outputs, features); or (features,) for one output, whose outputs have the
            shape (samples,). With a bias: a tree of two leaves (W, b), for example a tuple or an `nn.Linear`; b is
            (outputs,), or for a W of shape (features,) 0-dim or (1,).
        loss: "squared", "logistic" or "softmax".
        targets: as the loss takes them: like the outputs; for "softmax" class indices (samples,), none of them
            ignored, or probabilities like the outputs. Needed for `.loss` and `.gradient`, and for "softmax" with
            probabilities that do not add up to 1, since their sums multiply the curvature.
        decay: a number or 0-dim tensor, for all weights and the bias; or a tree like `weights` whose leaves are such,
            or tensors of the weights' shapes. It may be negative.
        reduction: "mean" or "sum".

    Weights, targets and decay are all float32 or all float64, and everything is on one device. The operator copies all
    but the inputs, which must not be changed in place while it is in use.

    Every solver works on it. With :class:`Neumann` (without a preconditioner) all terms run in one call, in C++ on a
    CPU and in Triton on a GPU if they fit (`.engine.report()` says why if not), for all right-hand sides of a
    batched solve together. On a CPU so do the terms of :class:`Chebyshev` and the Lanczos steps of automatic settings.
    The Neumann series takes the cheaper of two forms, the others the first:

    * direct: two products with the inputs for each term, 4 samples * features * outputs operations;
    * dual, if all of W has the same decay (that of b may differ): every term is c v + S X, so the terms need only S and
      the samples x samples Gram matrix of the inputs, 2 samples^2 * outputs operations; the features enter only at the
      beginning and at the end.

    Both count `iterations` products. Memory: two vectors of weights for each right-hand side and one product,
    three matrices like the outputs; the Gram matrix, kept after the first dual solve. A product by `@` costs
    4 samples * features * outputs operations.

    Errors: `TypeError`/`ValueError` naming the argument for a shape, dtype, device or name that does not fit;
    `ValueError` from `.gradient` without targets; in a solve as :func:`solve`.

    Source: Bishop, Pattern Recognition and Machine Learning, Springer 2006, sections 4.3.3 and 4.3.4, for the Hessians.

    >>> import torch, hvp_engine as hvp
    >>> x, w = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
    >>> H = hvp.LinearModelOperator(x, w, loss="squared", decay=0.5)
    >>> H @ torch.ones(2)                                      # 2 x^T x / 2 + 0.5
    tensor([4.5000, 6.5000])
    >>> H.solve(torch.tensor([4.5, 6.5]), hvp.Neumann(200)).value
    tensor([1.0000, 1.0000])
    """

    def __init__(
        self,
        inputs: Tensor,
        weights: Any,
        *,
        loss: Loss,
        targets: Tensor | None = None,
        decay: Any = 0.0,
        reduction: Reduction = "mean",
    ):
        leaves, structure = flatten(weights, "weights")
        check_names(loss, reduction)
        check_weights(inputs, leaves, loss)
        leaves = [leaf.detach().clone(memory_format=torch.contiguous_format) for leaf in leaves]
        linearization = LinearModelProducts(
            inputs.detach(), leaves, loss, targets, decays_of(decay, leaves, structure), reduction
        )
        super().__init__(linearization, structure, LinearModelEngine())


class LinearModelProducts(FactoredLinearization):
    """The loss, its gradient and its products with vectors, at one point."""

    def __init__(
        self,
        inputs: Tensor,
        weights: Sequence[Tensor],
        loss: Loss,
        targets: Tensor | None,
        decays: Sequence[Tensor],
        reduction: Reduction,
    ):
        weight, *bias = weights
        matrix = weight if weight.dim() == 2 else weight[None]
        outputs = functional.linear(inputs.to(weight.dtype), matrix, *(b.view(-1) for b in bias))
        if targets is not None:
            check_targets(targets, outputs if weight.dim() == 2 else outputs[:, 0], loss)
            targets = targets.detach().clone()
        self._weights, self._decays, self._reduction = weights, decays, reduction
        self._outputs, self._loss, self._targets = outputs, loss, targets
        self.layout = Layout.of(weights)
        decay = FlatVector.of(self.layout, [d.expand_as(w) for d, w in zip(decays, weights, strict=True)]).data
        inputs = inputs if inputs.stride(1) == 1 and inputs.stride(0) >= inputs.shape[1] else inputs.contiguous()
        self.factors = Factors(self.layout, inputs, *self._curvature(), decay, uniform=decays[0].dim() == 0)

    @property
    def loss(self) -> Tensor | None:  # type: ignore[override]
        """The loss with its decay; None without targets."""
        if self._targets is None:
            return None
        outputs = self._outputs if self._weights[0].dim() == 2 else self._outputs[:, 0]
        value = _LOSSES[self._loss](outputs, self._targets, reduction=self._reduction)
        for weight, decay in zip(self._weights, self._decays, strict=True):
            value = value + (decay * weight.square()).sum() / 2
        return value

    @property
    def gradient(self) -> Sequence[Tensor]:  # type: ignore[override]
        if self._targets is None:
            raise ValueError("targets: expected those of the loss, which its gradient needs; got None")
        targets = self._targets
        if self._loss == "squared":
            error = 2 * (self._outputs - targets.view_as(self._outputs))
        elif self._loss == "logistic":
            error = self._outputs.sigmoid() - targets.view_as(self._outputs)
        else:
            if targets.dim() == 1:
                targets = functional.one_hot(targets, self._outputs.shape[1]).to(self._outputs)
            error = self._outputs.softmax(1) * targets.sum(1, keepdim=True) - targets
        error = error.T * self._scale
        parts = [error @ self.factors.wide_inputs, error.sum(1)]
        return [
            part.view_as(weight) + decay * weight
            for part, weight, decay in zip(parts, self._weights, self._decays, strict=False)
        ]

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        factors = self.factors
        weight, *bias = tangents
        columns = bias[0].view(-1, 1) if bias else None
        parts = factors.product(weight.reshape(factors.outputs, -1), columns)
        return [
            torch.addcmul(part.view(tangent.shape), decay, tangent)
            for part, decay, tangent in zip(parts, self._decays, tangents, strict=False)
        ]

    def lanczos(self, start: FlatVector, steps: int) -> Tridiagonalization:
        """`steps` of Lanczos, on a CPU in one call."""
        name, kernels = kernels_on(self.layout.device)
        lanczos = (kernels if name == "cpp" else linear_model_reference).linear_model_lanczos
        found: Tridiagonalization = lanczos(start.data, self.factors, steps)
        return found

    @property
    def _scale(self) -> float:
        """The factor by which the reduction scales one sample's loss."""
        if self._reduction == "sum":
            return 1.0
        return 1.0 / (len(self._outputs) if self._loss == "softmax" else self._outputs.numel())

    def _curvature(self) -> tuple[Tensor, Tensor | None]:
        """C and Q of the factors."""
        samples, outputs = self._outputs.shape
        curvature = self._outputs.new_zeros(outputs, padded(samples))
        part = curvature[:, :samples]
        if self._loss == "squared":
            part.fill_(2 * self._scale)
            return curvature, None
        if self._loss == "logistic":
            chances = self._outputs.sigmoid().T
            torch.mul(chances, self._scale * (1 - chances), out=part)
            return curvature, None
        probabilities = torch.zeros_like(curvature)
        probabilities[:, :samples] = self._outputs.softmax(1).T
        torch.mul(probabilities[:, :samples], self._scale, out=part)
        if self._targets is not None and self._targets.dim() == 2:
            part *= self._targets.sum(1)
        return curvature, probabilities
