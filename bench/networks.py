"""The networks that are measured, and nothing about how."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear() -> nn.Module:
    """Logistic regression, 784 to 10: 7,850 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def perceptron() -> nn.Module:
    """784-784-10 with ReLU: 623,290 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 784), nn.ReLU(), nn.Linear(784, 10))


def lenet() -> nn.Module:
    """LeNet-5 for 28x28 images: 61,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
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
        nn.Linear(84, 10),
    )


def _norm(channels: int) -> nn.Module:
    # Batch statistics only: running ones would be updated in place, which torch.func's transforms refuse, and no
    # method that is compared here should be excluded for that.
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut without parameters."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.stride = channels // before
        self.padding = (channels - before) // 2
        self.first = nn.Conv2d(before, channels, 3, stride=self.stride, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = _norm(channels), _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


def resnet(depth: int) -> nn.Module:
    """The CIFAR ResNet of He et al. 2015 with 6n + 2 layers: 269,722 weights at depth 20, 658,586 at 44."""
    blocks, before = [], 16
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            blocks.append(ResidualBlock(before, channels))
            before = channels
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        _norm(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _double(before: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Image and a noise channel to an image, depth 2, as a bounded residual: 6,659 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = _double(4, 8), _double(8, 16)
        self.up, self.merge = nn.ConvTranspose2d(16, 8, 2, stride=2), _double(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer(x)
        inner = self.inner(F.max_pool2d(outer, 2))
        merged = self.merge(torch.cat([self.up(inner), outer], 1))
        return x[:, :3] + torch.tanh(self.out(merged))


class LSTM(nn.Module):
    """A language model on nn.LSTM; the embedding serves as the decoder."""

    def __init__(self, words: int, units: int):
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.rnn = nn.LSTM(units, units, num_layers=2, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(words))
        nn.init.normal_(self.embedding.weight, std=units**-0.5)

    def hidden(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embedding(words)), self.embedding.weight, self.bias)


class LoopedLSTM(LSTM):
    """The same with the recurrence as a Python loop, as custom cells are written."""

    def hidden(self, x: Tensor) -> Tensor:
        for layer in range(self.rnn.num_layers):
            from_input, from_state, input_bias, state_bias = self.rnn.all_weights[layer]
            state = cell = x.new_zeros(x.shape[0], self.rnn.hidden_size)
            outputs = []
            for t in range(x.shape[1]):
                gates = F.linear(x[:, t], from_input, input_bias) + F.linear(state, from_state, state_bias)
                enter, forget, candidate, leave = gates.chunk(4, 1)
                cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
                state = torch.sigmoid(leave) * torch.tanh(cell)
                outputs.append(state)
            x = torch.stack(outputs, 1)
        return x


class Transformer(nn.Module):
    """A small language model: two layers of four heads."""

    def __init__(self, words: int, width: int, length: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.layers(self.embedding(words) + self.position))
