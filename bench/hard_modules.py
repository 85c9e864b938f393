"""Modules with something in them that second derivatives, tracing or the caller's state could trip over; small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.functional import affine_grid, grid_sample, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class Recurrent(nn.Module):
    """nn.LSTM or nn.GRU with a readout."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn, self.readout = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0][:, -1])


class Scanned(nn.Module):
    """A recurrent cell by torch's scan, or by a loop."""

    def __init__(self, loop: bool = False):
        super().__init__()
        self.cell, self.readout = nn.Linear(5, 3), nn.Linear(3, 2)
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        def step(state: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(self.cell(torch.cat([state, inputs], -1)))
            return state, state.clone()

        state = x.new_zeros(len(x), 3)
        if not self.loop:
            return self.readout(scan(step, state, x, dim=1)[0])
        for inputs in x.unbind(1):
            state, _ = step(state, inputs)
        return self.readout(state)


class Attention(nn.Module):
    """nn.MultiheadAttention with a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.readout = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.attention(x, x, x, need_weights=False)[0].mean(1))


class BareAttention(nn.Module):
    """scaled_dot_product_attention, called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.readout = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, dim=-1)
        return self.readout(scaled_dot_product_attention(query, key, value).mean(1))


class Tied(nn.Module):
    """Two layers that share one weight matrix, as a language model's embedding and decoder do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Words(nn.Module):
    """An embedding of word numbers, with dense or sparse gradients."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.embedding, self.readout = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.embedding(x)).mean(1))


class SpatialTransformer(nn.Module):
    """grid_sample at places that depend on weights, of an image that `learned_image` makes depend on them too."""

    def __init__(self, learned_image: bool):
        super().__init__()
        self.locate = nn.Linear(32, 6) if not learned_image else None
        self.filter = nn.Conv2d(2, 2, 1) if learned_image else None
        self.readout = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        identity = torch.tensor([[1.0, 0, 0.1], [0, 1, -0.2]], dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
        image = x if self.filter is None else torch.tanh(self.filter(x))
        where = identity if self.locate is None else identity + 0.1 * self.locate(x.flatten(1)).view(-1, 2, 3)
        sampled = grid_sample(image, affine_grid(where, list(x.shape), align_corners=False), align_corners=False)
        return self.readout(sampled.flatten(1))


class RunningScale(nn.Module):
    """A buffer that every forward changes and the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * hidden.square().mean(0))
        return self.second(hidden / self.scale)


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass; `reentrant` None keeps them."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.last(torch.tanh(self.middle(hidden)))
        return self.last(checkpoint(lambda h: torch.tanh(self.middle(h)), hidden, use_reentrant=self.reentrant))


class Complex(nn.Module):
    """A complex weight, as of a spectral layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex128))
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of rank 1 (LoRA)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(1, inputs)), nn.Parameter(torch.randn(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class WeightNorm(nn.Module):
    """A linear layer whose weight is v g / ||v||, rows by themselves; as parametrizations.weight_norm makes it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.bias = linear.bias
        self.g = nn.Parameter(torch.linalg.vector_norm(linear.weight.detach(), dim=1, keepdim=True))
        self.v = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.v * self.g / torch.linalg.vector_norm(self.v, dim=1, keepdim=True)).T + self.bias


class Positive(nn.Module):
    """A parametrization by the exponential."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class VisionTransformer(nn.Module):
    """Patches, a class token, positions and one encoder layer without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), 1, 4), patches], 1) + self.positions
        return self.readout(self.encoder(tokens)[:, 0])


class ResidualNetwork(nn.Module):
    """A stem, one residual block with BatchNorm and a strided shortcut, max-pooling, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4))
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.max_pool2d(torch.relu(self.block(x) + self.shortcut(x)), 2)
        return self.readout(x.mean((2, 3)))


class Autocast(nn.Module):
    """A module under autocast."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: Any) -> Tensor:
        with torch.autocast(inputs[0].device.type, dtype=self.dtype):
            return self.module(*inputs)
