"""Modules as people build them, each with an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint


def images() -> Tensor:
    return torch.randn(3, 2, 6, 6)


def rows() -> Tensor:
    return torch.randn(5, 4)


def sequences() -> Tensor:
    return torch.randn(3, 5, 4)


def words() -> Tensor:
    return torch.randint(7, (3, 5))


class Last(nn.Module):
    """The first output of a module that has several."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class Cells(nn.Module):
    """A cell in a loop over time."""

    def __init__(self, cell: nn.Module, pair: bool = False):
        super().__init__()
        self.cell, self.pair = cell, pair

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if self.pair else state


class Packed(nn.Module):
    """A recurrent net on sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)
        return self.net(packed)[1]


class Masked(nn.Module):
    """Attention with a padding mask."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(4, 2, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=self.weights)[0]


class Encoder(nn.Module):
    """A transformer's encoder with a padding mask and a causal one."""

    def __init__(self, dropout: float, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout, "gelu", batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return self.encoder(x, mask=mask, is_causal=True)


class Whole(nn.Module):
    """An encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(1))


class Residual(nn.Module):
    """A residual block as torchvision writes it: `out += identity`, ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class SqueezeExcite(nn.Module):
    """A gate for each channel."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.conv, self.reduce, self.expand, self.gate = (
            nn.Conv2d(2, 4, 3),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(2, 4, 1),
            gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x), inplace=True)
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True)))


class UNet(nn.Module):
    """Down, up, and a skip by `cat`."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([x, self.up(F.gelu(self.middle(F.silu(self.down(x)))))], 1))


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.net, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(self.embedding(x)).tanh())


class Counting(nn.Module):
    """A buffer that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x).sigmoid()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(lambda h: self.net(h).tanh(), x, use_reentrant=False))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.net(x)


class Mixture(nn.Module):
    """Experts: each row goes to its best two."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.router, self.experts, self.dense = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), dense

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if self.dense:
                out = out + expert(x).tanh() * (scores * (chosen == index)).sum(-1, keepdim=True)
            else:
                row, place = torch.where(chosen == index)
                out.index_add_(0, row, expert(x[row]).tanh() * scores[row, place, None])
        return out


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.dropout(x) @ self.a.T @ self.b.T * 0.5


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda module, args, output: output.tanh())
    return layer


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
    "Bilinear": (lambda: _Twice(nn.Bilinear(4, 4, 3)), rows),
    "a counting buffer": (Counting, rows),
    "checkpoint": (Checkpointed, rows),
    "autocast": (Autocast, rows),
    "mixture of experts": (lambda: Mixture(False), rows),
    "mixture of experts, dense": (lambda: Mixture(True), rows),
    "low-rank adapter": (LowRank, rows),
    "AdaptiveLogSoftmax": (lambda: _Labelled(nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6])), rows),
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


class PlainHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def call(module: nn.Module, w: dict[str, Tensor], x: Any) -> Tensor:
    return torch.func.functional_call(module, w, (x,))


class _Twice(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x).tanh()


class _Labelled(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, torch.tensor([0, 2, 4, 7, 8])).loss
