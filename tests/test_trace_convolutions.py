"""Convolutions of a trace: derivatives with respect to kernels, biases, and the layout of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.engines import LinearizedEngine
from hvp_engine.engines.functions import TracedLinearization

aten = torch.ops.aten
Loss = Callable[[list[Tensor], Tensor], Tensor]


def tangent_and_error(loss: Loss, weights: list[Tensor], x: Tensor) -> tuple[torch.fx.Graph, float]:
    """The tangent graph of the traced Hessian, and its product's distance from eager's."""
    torch.manual_seed(1)
    v = [torch.randn_like(w) for w in weights]
    operator = hvp.HessianOperator(loss, weights, x, engine=LinearizedEngine())
    assert isinstance(operator.linear_map, TracedLinearization)
    product, expected = operator @ v, hvp.HessianOperator(loss, weights, x, engine="eager") @ v
    scale = torch.stack([e.norm() for e in expected]).norm()
    error = torch.stack([(p - e).norm() for p, e in zip(product, expected, strict=True)]).norm() / scale
    return operator.linear_map.functions.partition.tangent.module.graph, float(error)


def kernels_that_are_images(graph: torch.fx.Graph) -> int:
    """Convolutions in which a kernel has more places than what comes out."""
    found = [node for node in graph.nodes if node.target is aten.convolution.default and not node.args[6]]
    return sum(node.args[1].meta["val"][0, 0].numel() > node.meta["val"][0, 0].numel() for node in found)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 3


@pytest.mark.parametrize(
    ("convolve", "kernel", "image", "replaced"),
    [
        pytest.param(F.conv2d, (4, 3, 3, 3), (7, 9), True, id="plain"),
        pytest.param(partial(F.conv2d, stride=2, padding=1), (4, 3, 3, 3), (8, 8), True, id="more-places"),
        pytest.param(partial(F.conv2d, stride=(3, 2), padding=(0, 2)), (4, 3, 3, 2), (12, 9), True, id="uneven"),
        pytest.param(partial(F.conv2d, padding=2, dilation=2), (4, 3, 3, 3), (9, 9), True, id="dilated"),
        pytest.param(partial(F.conv2d, stride=2, dilation=3), (4, 3, 2, 2), (11, 11), True, id="dilated-and-strided"),
        pytest.param(partial(F.conv_transpose2d, stride=2, padding=1), (3, 4, 3, 3), (5, 6), True, id="transposed"),
        pytest.param(partial(F.conv2d, groups=3), (6, 1, 3, 3), (7, 7), False, id="grouped"),
        pytest.param(partial(F.conv1d, stride=2), (4, 3, 3), (12,), True, id="one-dimension"),
        pytest.param(partial(F.conv3d, padding=1), (4, 3, 2, 3, 2), (4, 5, 4), True, id="three-dimensions"),
    ],
)
def test_derivatives_of_kernels(convolve, kernel, image, replaced):
    torch.manual_seed(0)

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        inner = torch.tanh(F.conv2d(x, weights[0]) if x.dim() == 4 else x * weights[0].sum())
        return convolve(inner, weights[1]).tanh().square().mean()

    graph, error = tangent_and_error(loss, [drawn(3, 3, 1, 1), drawn(*kernel)], drawn(5, 3, *image))
    assert error < 1e-12
    assert (kernels_that_are_images(graph) == 0) == replaced


def test_derivatives_of_kernels_of_one_size_hold_one_that_stands_for_them() -> None:
    """Only its size is read; a deep network would hold one more copy of all its kernels."""
    kernels = [drawn(4, 4, 3, 3) for _ in range(4)] + [drawn(6, 4, 3, 3)]

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        for w in weights:
            x = F.conv2d(x, w, padding=1).tanh()
        return x.square().mean()

    graph, error = tangent_and_error(loss, kernels, drawn(5, 4, 8, 8))
    assert error < 1e-13 and kernels_that_are_images(graph) == 0
    backward = [node for node in graph.nodes if node.target is aten.convolution_backward.default]
    standing = {node.args[2] for node in backward if node.args[10] == [False, True, False]}
    names = [node.name for node in standing if node.op == "placeholder" and "full" in node.name]
    assert len(names) == 2 < len(backward)


def test_kernels_larger_than_what_comes_out_stay_convolutions():
    """A convolution in the forward, not a derivative: views that follow rely on its strides."""
    torch.manual_seed(0)
    graph, error = tangent_and_error(
        lambda w, x: F.conv2d(x, w[0]).view(4, 20).tanh().square().mean(), [drawn(5, 3, 4, 4)], drawn(4, 3, 5, 5)
    )
    assert error < 1e-12
    assert kernels_that_are_images(graph) > 0


def images_last(graph: torch.fx.Graph) -> bool:
    """Whether there are convolutions, and all of them give images in channels-last layout."""
    found = [node.meta["val"] for node in graph.nodes if node.target is aten.convolution.default]
    return bool(found) and all(value.is_contiguous(memory_format=torch.channels_last) for value in found)


def network_loss(net: nn.Module) -> tuple[Loss, list[Tensor]]:
    """The loss of a network as a function of its weights, a list."""
    call, names = hvp.functional(net), list(dict(net.named_parameters()))
    weights = [w.detach() for w in net.parameters()]
    return lambda w, x: call(dict(zip(names, w, strict=True)), x).tanh().square().mean(), weights


def stem(channels: int = 8) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)]


@pytest.mark.parametrize(
    ("layers", "last"),
    [
        pytest.param(lambda: [*stem(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 2)], True, id="flattened"),
        pytest.param(lambda: [*stem(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)], True, id="averaged"),
        pytest.param(lambda: [*stem(), nn.BatchNorm2d(8).eval()], True, id="known-statistics"),
        pytest.param(lambda: [*stem(), nn.BatchNorm2d(8)], True, id="statistics-of-the-batch"),
        pytest.param(lambda: [*stem(), nn.GroupNorm(2, 8)], True, id="statistics-of-groups"),
        pytest.param(
            lambda: [*stem(), nn.InstanceNorm2d(8, track_running_stats=True)], False, id="statistics-by-torch"
        ),
        pytest.param(lambda: [*stem(), Viewed()], False, id="takes-images-for-contiguous"),
        pytest.param(lambda: [*stem(), Strided()], False, id="names-strides"),
        pytest.param(lambda: stem(6), False, id="channels-that-fill-no-vector"),
    ],
)
def test_layout_of_images(layers, last):
    torch.manual_seed(0)
    loss, weights = network_loss(nn.Sequential(*layers()))
    graph, error = tangent_and_error(loss, weights, torch.randn(5, 3, 8, 8))
    assert error < 1e-5
    assert images_last(graph) == last


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).sin()


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((len(x), 10), (x[0].numel(), 1)).sin()


def test_masks_of_images_are_eagers():
    """Random numbers are drawn in memory's order, so that images in another layout would meet another mask."""
    torch.manual_seed(0)
    loss, weights = network_loss(nn.Sequential(*stem(), nn.Dropout(0.5)))
    x, v = torch.randn(5, 3, 8, 8), [torch.randn_like(w) for w in weights]
    products = []
    for engine in (LinearizedEngine(), "eager"):
        torch.manual_seed(3)
        products.append(hvp.HessianOperator(loss, weights, x, engine=engine) @ v)
    for ours, eagers in zip(*products, strict=True):
        torch.testing.assert_close(ours, eagers)


def test_images_last_give_eagers_hypergradient():
    """The mixed product too, and several right-hand sides at once."""
    torch.manual_seed(0)
    loss, weights = network_loss(nn.Sequential(*stem(), nn.MaxPool2d(2)))
    x, decay = torch.randn(5, 3, 8, 8), torch.tensor(-2.0)

    def train_loss(w: list[Tensor], log_decay: Tensor, batch: Tensor) -> Tensor:
        return loss(w, batch) + log_decay.exp() * sum(t.square().sum() for t in w)

    found = []
    for engine in ("linearized", "eager"):
        hypergradient = hvp.Hypergradient(
            train_loss, lambda w, log_decay, batch: loss(w, batch), hvp.Neumann(5, alpha=0.1), engine=engine
        )
        found.append(hypergradient(weights, decay, x, x.flip(0)).grads)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    stacked = [torch.randn(3, *w.shape) for w in weights]
    solutions = []
    for engine in ("linearized", "eager"):
        operator = hvp.HessianOperator(train_loss, weights, decay, x, engine=engine)
        solutions.append(operator.solve(stacked, hvp.Neumann(5, alpha=0.1), batched=True).value)
    for ours, eagers in zip(*solutions, strict=True):
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)
