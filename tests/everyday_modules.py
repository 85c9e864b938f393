"""Modules as people build them, each with an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from everyday_parts import (
    Autocast,
    Cells,
    Checkpointed,
    Counting,
    Encoder,
    Labelled,
    Last,
    LowRank,
    Masked,
    Mixture,
    Packed,
    PlainHardsigmoid,
    Residual,
    SqueezeExcite,
    Tied,
    Twice,
    UNet,
    Whole,
    hooked,
    parametrized,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def images() -> Tensor:
    return torch.randn(3, 2, 6, 6)


def rows() -> Tensor:
    return torch.randn(5, 4)


def sequences() -> Tensor:
    return torch.randn(3, 5, 4)


def words() -> Tensor:
    return torch.randint(7, (3, 5))


def call(module: nn.Module, w: dict[str, Tensor], x: Any) -> Tensor:
    return torch.func.functional_call(module, w, (x,))


def convolutional(*middle: nn.Module, features: int = 64) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.Flatten(), nn.Linear(features, 2))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "MLP, ReLU in place": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), rows),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)), rows),
    "BatchNorm1d, evaluation": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()).eval(), rows),
    "BatchNorm without momentum": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None)), rows),
    "BatchNorm2d": (lambda: convolutional(nn.BatchNorm2d(4), nn.ReLU()), images),
    "BatchNorm2d, evaluation": (lambda: convolutional(nn.BatchNorm2d(4), nn.ReLU()).eval(), images),
    "GroupNorm": (lambda: convolutional(nn.GroupNorm(2, 4), nn.SiLU()), images),
    "InstanceNorm2d": (lambda: convolutional(nn.InstanceNorm2d(4, affine=True), nn.SiLU()), images),
    "LocalResponseNorm": (lambda: convolutional(nn.LocalResponseNorm(2)), images),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), rows),
    "Dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2)), rows),
    "Dropout2d": (lambda: convolutional(nn.Dropout2d(0.3), nn.Tanh()), images),
    "AlphaDropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(8, 2)), rows),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 4, 3, padding="same"), nn.GELU(), nn.Conv1d(4, 2, 1)), sequences),
    "dilated causal Conv1d": (
        lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(5, 4, 2, dilation=2)),
        sequences,
    ),
    "depthwise Conv2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Hardswish(), nn.Conv2d(4, 2, 1)),
        images,
    ),
    "Conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.MaxPool3d(2)),
        lambda: torch.randn(2, 2, 4, 4, 4),
    ),
    "ConvTranspose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.Tanh()),
        images,
    ),
    "ConvTranspose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(5, 3, 3), nn.Tanh()), sequences),
    "reflected padding": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh()),
        images,
    ),
    "circular padding": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        images,
    ),
    "max pooling": (lambda: convolutional(nn.ReLU(inplace=True), nn.MaxPool2d(2), features=16), images),
    "adaptive pooling": (lambda: convolutional(nn.Tanh(), nn.AdaptiveAvgPool2d(1), features=4), images),
    "Upsample": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3), nn.Tanh()),
        images,
    ),
    "PixelShuffle": (lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.PReLU()), images),
    "residual block": (Residual, images),
    "residual block, evaluation": (lambda: Residual().eval(), images),
    "squeeze and excite, Sigmoid": (lambda: SqueezeExcite(nn.Sigmoid()), images),
    "squeeze and excite, Hardsigmoid": (lambda: SqueezeExcite(nn.Hardsigmoid()), images),
    "U-Net": (UNet, images),
    "channels_last": (
        lambda: convolutional(nn.BatchNorm2d(4), nn.ReLU()).to(memory_format=torch.channels_last),
        images,
    ),
    "nn.RNN": (lambda: Last(nn.RNN(4, 3, batch_first=True)), sequences),
    "nn.LSTM": (lambda: Last(nn.LSTM(4, 3, 2, batch_first=True)), sequences),
    "nn.LSTM, both ways, dropout": (lambda: Last(nn.LSTM(4, 3, 2, dropout=0.2, bidirectional=True)), sequences),
    "nn.LSTM, projected": (lambda: Last(nn.LSTM(4, 3, proj_size=2)), sequences),
    "nn.GRU": (lambda: Last(nn.GRU(4, 3, batch_first=True)), sequences),
    "packed GRU": (Packed, sequences),
    "RNNCell": (lambda: Cells(nn.RNNCell(4, 3)), sequences),
    "LSTMCell": (lambda: Cells(nn.LSTMCell(4, 3), pair=True), sequences),
    "GRUCell": (lambda: Cells(nn.GRUCell(4, 3)), sequences),
    "MultiheadAttention, padding mask": (lambda: Masked(False), sequences),
    "MultiheadAttention, padding mask and weights": (lambda: Masked(True), sequences),
    "TransformerEncoder": (lambda: Encoder(0.0, False), sequences),
    "TransformerEncoder, dropout, norm first": (lambda: Encoder(0.2, True), sequences),
    "TransformerEncoder, evaluation": (lambda: Encoder(0.2, False).eval(), sequences),
    "Transformer": (Whole, sequences),
    "Embedding and mean": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 2)),
        words,
    ),
    "EmbeddingBag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 2), nn.Tanh()), words),
    "EmbeddingBag, max": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4, mode="max"), nn.Linear(4, 2), nn.Tanh()), words),
    "Embedding, max_norm": (lambda: nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 2), nn.Tanh()), words),
    "tied embedding": (Tied, words),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), rows),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()), rows),
    "spectral_norm, evaluation": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()).eval(),
        rows,
    ),
    "old spectral_norm": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh()), rows),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()), rows),
    "a parametrization": (parametrized, rows),
    "a forward hook": (hooked, rows),
    "Bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), rows),
    "a counting buffer": (Counting, rows),
    "checkpoint": (Checkpointed, rows),
    "autocast": (Autocast, rows),
    "mixture of experts": (lambda: Mixture(False), rows),
    "mixture of experts, dense": (lambda: Mixture(True), rows),
    "low-rank adapter": (LowRank, rows),
    "AdaptiveLogSoftmax": (lambda: Labelled(nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6])), rows),
    "compiled part": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), backend="eager"), rows),
}


TWINS: dict[str, Callable[[nn.Module, dict[str, Tensor], Any], Tensor]] = {
    "squeeze and excite, Hardsigmoid": lambda module, w, x: call(SqueezeExcite(PlainHardsigmoid()), w, x),
    "EmbeddingBag": lambda module, w, x: torch.tanh(F.linear(w["0.weight"][x].mean(1), w["1.weight"], w["1.bias"])),
    "EmbeddingBag, max": lambda module, w, x: torch.tanh(
        F.linear(w["0.weight"][x].max(1).values, w["1.weight"], w["1.bias"])
    ),
    "weight_norm": lambda module, w, x: torch.tanh(
        F.linear(
            x,
            (v := w["0.parametrizations.weight.original1"])
            * w["0.parametrizations.weight.original0"]
            / (v * v).sum(1, keepdim=True).sqrt(),
            w["0.bias"],
        )
    ),
}
"""Of modules that torch does not differentiate twice, or wrongly: `twin(module, weights, input)`, the same function."""
