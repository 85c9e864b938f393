"""The networks that are measured beside those of the paper's experiments, and nothing about how."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import models
from examples.augmentations import UNet

DIGIT, COLOR = (1, 28, 28), (3, 32, 32)
"""Shapes of an image."""


def resnet(depth: int) -> nn.Module:
    """The ResNet for CIFAR of `depth` layers, on batch statistics only.

    Running ones would be updated in place, which torch.func's transforms refuse, and no method that is compared here
    should be excluded for that.
    """
    return torch.func.replace_all_batch_norm_modules_(models.resnet(depth, COLOR))


def unet() -> nn.Module:
    """The U-Net away from the identity, where it begins: there gradients reach only its last layer."""
    module = UNet()
    module.residual.reset_parameters()
    return module


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
