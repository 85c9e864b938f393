"""The networks and the sets of hyperparameters of the paper's experiments.

`shape` is that of one image: (1, 28, 28) for MNIST, (3, 32, 32) for CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]
States = list[tuple[Tensor, Tensor]]
"""The outputs and cells of each layer of an LSTM, each (1, rows, units)."""


def linear(shape: Shape, classes: int = 10) -> nn.Module:
    """Logistic regression: 7,850 weights for MNIST, 30,730 for CIFAR-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def one_layer(shape: Shape, classes: int = 10) -> nn.Module:
    """One hidden layer as wide as the input: 623,290 weights for MNIST, 9,470,986 for CIFAR-10."""
    width = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def lenet5(shape: Shape, classes: int = 10) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling: 61,706 weights for MNIST (padded to 32 x 32), 62,006 for CIFAR-10."""
    channels, height, _ = shape
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=(32 - height) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def wide_lenet(shape: Shape, classes: int = 10) -> nn.Module:
    """The LeNet of the paper's code, with 20 channels and 250 hidden units: 247,960 and 323,320 weights."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 20, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20 * (height // 4) * (width // 4), 250),
        nn.ReLU(),
        nn.Linear(250, classes),
    )


def alexnet(shape: Shape, classes: int = 10) -> nn.Module:
    """AlexNet with 3x3 convolutions for CIFAR and the classifier of ImageNet's 6 x 6 x 256: 56,826,698 weights.

    It has no dropout, since it is used to overfit.
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, classes),
    )


def small_cnn(shape: Shape, classes: int = 10, width: int = 16) -> nn.Module:
    """Two convolutions, each with ReLU and max-pooling, and a linear layer: 7,690 weights for digits of 14 x 14."""
    channels, height, breadth = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (breadth // 4), classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the shortcut pads new channels by zeros, or is a 1x1 `projection`."""

    def __init__(self, before: int, channels: int, stride: int, projection: bool):
        super().__init__()
        self.stride, self.padding = stride, (channels - before) // 2
        self.first = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.projection = None
        if projection and before != channels:
            convolution = nn.Conv2d(before, channels, 1, stride=stride, bias=False)
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.projection is not None:
            x = self.projection(x)
        elif self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


def _residual(
    shape: Shape, classes: int, widths: tuple[int, ...], blocks: int, projection: bool, stem_stride: int = 1
) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], widths[0], 3, stride=stem_stride, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    before = widths[0]
    for width in widths:
        for _ in range(blocks):
            layers.append(ResidualBlock(before, width, 1 if width == before else 2, projection))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def resnet(depth: int, shape: Shape, classes: int = 10) -> nn.Module:
    """The CIFAR ResNet of He et al. 2015 with 6n + 2 layers: 658,586 weights for CIFAR-10 at depth 44."""
    return _residual(shape, classes, (16, 32, 64), (depth - 2) // 6, projection=False)


def resnet44(shape: Shape, classes: int = 10) -> nn.Module:
    """:func:`resnet` with the paper's depth."""
    return resnet(44, shape, classes)


def resnet18(shape: Shape, classes: int = 10, width: int = 64, stem_stride: int = 1) -> nn.Module:
    """ResNet-18 with a stem for CIFAR: 11,173,962 weights at width 64, 176,402 at width 8."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    return _residual(shape, classes, widths, 2, projection=True, stem_stride=stem_stride)


class TiedLSTM(nn.Module):
    """Layers of LSTM whose decoder is the embedding: 13,280,400 weights for 10,000 words, 650 units and 2 layers.

    Arguments:
        words, units, layers: sizes.
        scale: the embedding is initialized uniformly in [-scale, scale].
    """

    def __init__(self, words: int = 10_000, units: int = 650, layers: int = 2, scale: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        nn.init.uniform_(self.embedding.weight, -scale, scale)
        self.recurrent = nn.ModuleList(nn.LSTM(units, units, batch_first=True) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(
        self, words: Tensor, states: States | None = None, context: int = 0, masks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, States, Tensor, Tensor]:
        """Logits (rows, time, words) of the next words, the states after them, outputs before and after dropout.

        Arguments:
            words: int64 (rows, context + time).
            states: of the layers, None at the start of a text.
            context: words at the beginning that only set the state, as a constant.
            masks: factors "input", "hidden" (between layers) and "output" of (rows, 1, units), "embedding" of (words,).
        """
        if context:
            with torch.no_grad():
                states, _, _ = self._recur(words[:, :context], states, masks)
        states, raw, dropped = self._recur(words[:, context:], states, masks)
        return F.linear(dropped, self.embedding.weight, self.bias), states, raw, dropped

    def _recur(
        self, words: Tensor, states: States | None, masks: Mapping[str, Tensor] | None
    ) -> tuple[States, Tensor, Tensor]:
        x, after = self.embedding(words), []
        if masks is not None:
            x = x * masks["embedding"][words].unsqueeze(-1) * masks["input"]
        for number, layer in enumerate(self.recurrent):
            raw, state = layer(x, None if states is None else states[number])
            after.append(state)
            x = raw if masks is None else raw * masks["hidden" if number + 1 < len(self.recurrent) else "output"]
        return after, raw, x


def weight_decays(module: nn.Module, log_decay: float) -> dict[str, Tensor]:
    """One log-decay for each weight, in the container of the module's named parameters."""
    return {name: torch.full_like(weight, log_decay).detach() for name, weight in module.named_parameters()}


def images_per_class(shape: Shape, classes: int) -> Tensor:
    """Distilled images, one per class, all zero: 7,840 (MNIST), 30,720 (CIFAR-10), 307,200 (CIFAR-100) pixels.

    (The paper prints 300,720 for CIFAR-100.)
    """
    return torch.zeros(classes, *shape)


def dropout_rates(units: int = 650, rate: float = 0.5, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Logits of the rates that regularize :class:`TiedLSTM`, all with sigmoid(logit) = `rate`: 1,691,951 for 650 units.

    One DropConnect rate for each recurrent weight, shared by the layers; one dropout rate for each unit of input,
    hidden layers and output; one for the embedding.
    """
    shapes = {
        "drop_connect": (4 * units, units),
        "input": (units,),
        "hidden": (units,),
        "output": (units,),
        "embedding": (),
    }
    logit = math.log(rate / (1 - rate))
    return {name: torch.full(shape, logit, device=device) for name, shape in shapes.items()}


def shared_rates(value: float = 0.5, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Seven hyperparameters that regularize :class:`TiedLSTM`: logits of five rates, logarithms of two strengths.

    The rates are those of :func:`dropout_rates`, each a single number; the strengths are those of activation and
    temporal activation regularization. All have the given `value`.
    """
    logit, log = math.log(value / (1 - value)), math.log(value)
    values = dict.fromkeys(("drop_connect", "input", "hidden", "output", "embedding"), logit)
    return {
        name: torch.tensor(start, device=device)
        for name, start in (values | {"activation": log, "temporal": log}).items()
    }


def concrete_mask(logit: Tensor, shape: Shape, temperature: float) -> Tensor:
    """Factors of dropout at the rates p = sigmoid(logit), as a smooth function of p, of mean 1 at a low temperature.

    (1 - z) / (1 - p) with z = sigmoid((logit(p) + logit(u)) / temperature), u uniform: concrete dropout (Gal, Hron,
    Kendall 2017). `logit` broadcasts to `shape`; the mask has its dtype.
    """
    noise = torch.rand(shape, dtype=logit.dtype, device=logit.device).clamp(1e-6, 1 - 1e-6).logit()
    return torch.sigmoid((noise - logit) / temperature) * (1 + logit.exp())
