"""Operators without a handler in native programs: by several that have one, against plain double backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from recorded_checks import calls
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.missing_derivatives import nodes_of
from hvp_engine.differentiation.native import decompositions
from hvp_engine.differentiation.native.recurrent import onednn_layer_backward
from hvp_engine.differentiation.trace.partial_evaluation import Partition, partition
from hvp_engine.engines import create, traced

pytestmark = pytest.mark.filterwarnings("error:.*is replaced by")

IMAGES = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CLASSES = torch.randint(8, (4, 12, 12), generator=torch.Generator().manual_seed(2))
ONES = torch.ones(4, 8, 12, 12, dtype=torch.float64)

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "means of windows": lambda y: F.avg_pool2d(y, 2),
    "means of windows that are no squares": lambda y: F.avg_pool2d(y, (3, 2)),
    "means of windows that overlap": lambda y: F.avg_pool2d(y, 3, 2, 1),
    "means of windows that leave the rest out": lambda y: F.avg_pool2d(y, 5),
    "sums of windows": lambda y: F.avg_pool2d(y, 2, divisor_override=1),
    "means of windows of one image": lambda y: F.avg_pool2d(y[0], 4, 2),
    "means of signals": lambda y: F.avg_pool1d(y.flatten(2), 3, 2),
    "a number of means": lambda y: F.adaptive_avg_pool2d(y, (3, 6)),
    "powers of windows": lambda y: F.lp_pool2d(y.abs() + 0.1, 2, 2),
    "padded by its mirror image": lambda y: F.pad(y, (1, 2, 2, 1), "reflect"),
    "padded by its edges": lambda y: F.pad(y, (1, 2, 2, 1), "replicate"),
    "larger, exactly": lambda y: F.interpolate(y, scale_factor=1.5, mode="nearest-exact"),
    "longer": lambda y: F.interpolate(y.flatten(2), scale_factor=2),
    "largest of a number of windows": lambda y: F.adaptive_max_pool2d(y, (5, 6)),
    "larger": lambda y: F.interpolate(y, scale_factor=2),
    "larger, unevenly": lambda y: F.interpolate(y, size=(12, 36)),
    "channels to pixels": lambda y: F.pixel_shuffle(y, 2),
    "pixels to channels": lambda y: F.pixel_unshuffle(y, 2),
    "turned": lambda y: y.rot90(1, (2, 3)),
    "triangles": lambda y: y.tril() + y.triu(1) ** 2,
    "prelu": lambda y: F.prelu(y, y.mean((0, 2, 3))),
    "smooth l1": lambda y: F.smooth_l1_loss(y, ONES, beta=0.7),
    "huber": lambda y: F.huber_loss(y, ONES, delta=0.6),
    "soft margin": lambda y: F.soft_margin_loss(y, ONES),
    "squared error of both": lambda y: F.mse_loss(y, y.flip(0).tanh()),
    "entropy of probabilities": lambda y: F.binary_cross_entropy(y.sigmoid(), y.flip(0).detach().sigmoid()),
    "classes of pixels": lambda y: F.cross_entropy(y, CLASSES),
    "classes of pixels, smoothed": lambda y: F.cross_entropy(y, CLASSES, label_smoothing=0.1),
}


def problem(layer: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    weights = {"w": torch.randn(8, 3, 1, 1, dtype=torch.float64) / 3, "b": torch.randn(8, dtype=torch.float64) / 9}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y = F.conv2d(x, weights["w"], weights["b"])
        return (layer(y).tanh() ** 2).mean() + (y**2).mean()

    return loss, weights


@pytest.mark.parametrize("name", LAYERS)
def test_products_by_the_extension(name: str) -> None:
    loss, weights = problem(LAYERS[name])
    v = {key: torch.randn_like(weight) for key, weight in weights.items()}
    engine = create("linearized")
    operator = hvp.HessianOperator(loss, weights, IMAGES, engine=engine)
    found = operator @ v
    assert operator.linear_map.fallback is None
    leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
    gradient = torch.autograd.grad(loss(leaves, IMAGES), list(leaves.values()), create_graph=True)
    exact = torch.autograd.grad(gradient, list(leaves.values()), list(v.values()))
    torch.testing.assert_close(list(found.values()), list(exact), rtol=1e-10, atol=1e-12)
    assert "products and terms by the extension" in engine.report(), engine.report()


@pytest.mark.parametrize(
    "layer",
    [
        lambda y: F.avg_pool2d(y, 5, ceil_mode=True),
        lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
        lambda y: F.adaptive_avg_pool2d(y, 5),
        lambda y: F.interpolate(y, size=(13, 17)),
        lambda y: F.interpolate(y[..., :2, :2], scale_factor=3.4),
        lambda y: F.grid_sample(
            y, torch.linspace(-1, 1, 4 * 5 * 5 * 2).reshape(4, 5, 5, 2).double(), align_corners=False
        ),
    ],
    ids=[
        "windows beyond the image",
        "windows without padding",
        "windows of two sizes",
        "no whole number",
        "pixels of two sizes",
        "a grid",
    ],
)
def test_what_stays_with_pytorch_is_right_too(layer: Callable[[Tensor], Tensor]) -> None:
    loss, weights = problem(layer)
    v = {key: torch.randn_like(weight) for key, weight in weights.items()}
    engine = create("linearized")
    found = hvp.HessianOperator(loss, weights, IMAGES, engine=engine) @ v
    expected = hvp.HessianOperator(loss, weights, IMAGES, engine="eager") @ v
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert "lacks: operator aten." in engine.report(), engine.report()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_recorded_lstm_of_onednn(layers: int, bidirectional: bool, bias: bool) -> None:
    """What a script's own `nn.LSTM` has recorded on a CPU, in float32."""
    torch.manual_seed(0)
    layer = torch.nn.LSTM(6, 7, layers, bias, batch_first=True, bidirectional=bidirectional)
    weights, x = list(layer.parameters()), torch.randn(3, 5, 6)

    def loss() -> Tensor:
        output, (hidden, cell) = layer(x)
        return (output**2).mean() + hidden.sin().sum() + (cell[0] ** 3).mean()

    before = copy.deepcopy(weights)
    kinds = nodes_of([loss()])
    made = calls(loss, weights, tolerance=1e-5)
    functions = made[-1].program.functions  # type: ignore[union-attr]  # there is one
    assert any("Mkldnn" in node.name() for node in kinds), "torch no longer calls oneDNN here"
    assert functions.native is not None and functions.native.program is not None, functions.native.describe()
    assert not all(map(torch.equal, before, weights)), "fresh weights at each call"


@pytest.mark.parametrize("reverse", [False, True])
def test_the_derivative_of_an_lstm_of_onednn(reverse: bool) -> None:
    """Against PyTorch's own, with gradients of all results or of some."""
    torch.manual_seed(1)
    x, weight, states = torch.randn(5, 3, 6), torch.randn(28, 7) / 3, [torch.randn(3, 7) for _ in range(2)]
    parameters = [torch.randn(28, 6) / 3, weight, torch.randn(28), torch.randn(28)]
    aten, settings = torch.ops.aten, (reverse, [], 2, 7, 1, True, False, False, True)
    output, *last, workspace = aten.mkldnn_rnn_layer(x, *parameters, *states, *settings)
    results = output, *(state.reshape(3, 7) for state in last)
    for given in ((True, True, True), (True, False, False), (False, True, False)):
        grads = [torch.randn_like(result) if there else None for result, there in zip(results, given, strict=True)]
        whole = [torch.zeros_like(r) if grad is None else grad for r, grad in zip(results, grads, strict=True)]
        known = (x, *parameters, *states, *results)
        options = (reverse, 2, 7, 1, True, True, False, [], False, workspace)
        expected = aten.mkldnn_rnn_layer_backward(*known, *whole, *options)
        for found, true in zip(onednn_layer_backward(*known, *grads, *options), expected, strict=True):
            torch.testing.assert_close(found, true.reshape(found.shape), rtol=1e-4, atol=1e-5)


class Channels(torch.nn.Module):
    """A network of each point's channels."""

    def __init__(self, *layers: torch.nn.Module):
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(torch.nn.Module):
    """As of ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mixed = Channels(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mixed(self.grouped(x))


def test_what_stays_with_pytorch_finds_residuals_laid_out_as_in_the_trace() -> None:
    """The extension transposes products of few columns; views rely on the strides."""
    torch.manual_seed(0)
    nn = torch.nn
    norms = Channels(nn.LayerNorm(8)), Channels(nn.LayerNorm(8))
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), norms[0], Block(), norms[1], nn.Conv2d(8, 16, 2, 2))
    module = nn.Sequential(module, nn.Flatten()).double()
    net, x = hvp.functional(module), torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (net(weights, x).tanh() ** 2).mean()

    weights = dict(module.named_parameters())
    v = {key: torch.randn_like(weight) for key, weight in weights.items()}
    found = hvp.HessianOperator(loss, weights, x, engine="linearized") @ v
    expected = hvp.HessianOperator(loss, weights, x, engine="eager") @ v
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_function_that_asks_for_values_is_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded on zeros, whose values mean nothing."""

    def asking(x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) == 0 else x * 3

    monkeypatch.setitem(decompositions._FORMULAS, torch.ops.aten.cumsum.default, lambda x, dim: asking(x.cumprod(dim)))
    parts: list[Partition] = []
    monkeypatch.setattr(traced, "partition", lambda trace: parts.append(partition(trace)) or parts[-1])
    loss, weights = problem(lambda y: y.cumsum(-1))
    _ = hvp.HessianOperator(loss, weights, IMAGES, engine="linearized") @ weights
    assert decompositions.decomposed(parts[0], torch.ops.aten.cumsum.default) is None
    monkeypatch.setitem(decompositions._FORMULAS, torch.ops.aten.cumsum.default, lambda x, dim: x * 2)
    assert decompositions.decomposed(parts[0], torch.ops.aten.cumsum.default) is not None
