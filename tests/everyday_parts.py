"""The parts of which everyday modules are built."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


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


class PlainHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


class Twice(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x).tanh()


class Labelled(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, torch.tensor([0, 2, 4, 7, 8])).loss
