"""Models whose losses draw a new batch in every call, each by a maker that gives (weights, loss)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Problem = tuple[list[Tensor], Callable[[], Tensor]]
MODELS: dict[str, Callable[[], Problem]] = {}
LEVELS: dict[str, int] = {}
"""The level of models that hide something from the walk; 1 of all others."""


def rows(columns: int = 20) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, columns)


def images(channels: int = 1, size: int = 12) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, channels, size, size)


def classes(count: int = 6) -> Tensor:
    return torch.randint(10, (count,))


def classified(net: nn.Module, inputs: Callable[[], Tensor], penalty: Callable[..., Any] | None = None) -> Problem:
    """Cross-entropy, perhaps with a penalty on the weights."""
    w = list(net.parameters())

    def loss() -> Tensor:
        value = F.cross_entropy(net(inputs()), classes())
        return value if penalty is None else value + penalty(w)

    return w, loss


def model(name: str, level: int = 1) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    def add(make: Callable[[], Problem]) -> Callable[[], Problem]:
        MODELS[name] = make
        if level > 1:
            LEVELS[name] = level
        return make

    return add


def _networks() -> dict[str, Callable[[], nn.Module]]:
    head = (nn.AdaptiveAvgPool2d, nn.Flatten)
    pooled = lambda width: [head[0](1), head[1](), nn.Linear(width, 10)]  # noqa: E731
    spectral, weight = parametrizations.spectral_norm, parametrizations.weight_norm
    return {
        "logistic": lambda: nn.Linear(20, 10),
        "perceptron": lambda: nn.Sequential(
            nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.GELU(), nn.Linear(30, 10)
        ),
        "dropout": lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(0.3), nn.Linear(30, 10)),
        "spectral and weight norm": lambda: nn.Sequential(
            spectral(nn.Linear(20, 15)), nn.Tanh(), weight(nn.Linear(15, 10), dim=None)
        ),
        "LeNet": lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(32, 10),
        ),
        "transposed convolution, bilinear": lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2),
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Softplus(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
            nn.Linear(12, 10),
        ),
        "activations in place": lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.LeakyReLU(inplace=True), nn.Flatten(),
            nn.Linear(512, 10),
        ),
        "batch norm": lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6),
            nn.ReLU(), *pooled(6),
        ),
        "channels last": lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), *pooled(6)
        ).to(memory_format=torch.channels_last),
        "group norm, depthwise": lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.SiLU(), *pooled(8)
        ),
    }  # fmt: skip


_INPUTS = {
    "LeNet": images(),
    "transposed convolution, bilinear": images(),
    "activations in place": images(),
    "batch norm": images(3),
    "channels last": lambda: images(3)().to(memory_format=torch.channels_last),
    "group norm, depthwise": images(4),
}
for _name, _make in _networks().items():
    MODELS[_name] = lambda make=_make, name=_name: classified(make(), _INPUTS.get(name, rows()))  # type: ignore[misc]


def decayed(penalty: Callable[[list[Tensor]], Any]) -> Callable[[], Problem]:
    return lambda: classified(nn.Linear(20, 10), rows(), penalty)


LEVELS["channels last"] = 2  # autograd lays out gradients by as_strided
MODELS["decay w * w"] = decayed(lambda w: 1e-2 * sum((p * p).sum() for p in w))
MODELS["decay w ** 2"] = decayed(lambda w: 1e-2 * sum((p**2).sum() for p in w))


@model("decay for each weight")
def _per_weight_decay() -> Problem:
    decays = [torch.randn(10, 20), torch.randn(10)]
    penalty = lambda w: sum((d.exp() * p**2).sum() for d, p in zip(decays, w, strict=True))  # noqa: E731
    return classified(nn.Linear(20, 10), rows(), penalty)


def embedded(table: nn.Module, after: Callable[[Tensor], Tensor]) -> Problem:
    dense = nn.Linear(8, 10)
    w = [*table.parameters(), *dense.parameters()]
    return w, lambda: F.cross_entropy(dense(after(table(torch.randint(30, (6, 5))))), classes())


MODELS["embedding"] = lambda: embedded(nn.Embedding(30, 8, padding_idx=0), lambda e: e.tanh().mean(1))
MODELS["sums of rows"] = lambda: embedded(nn.Embedding(30, 8), lambda e: e.cumsum(1)[:, -1].tanh())


def recurrent(cell: nn.Module, inputs: Callable[[], Any], last: Callable[[Any], Tensor]) -> Problem:
    dense = nn.Linear(7, 10)

    def loss() -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return F.cross_entropy(dense(last(cell(inputs()))), classes(4))

    return [*cell.parameters(), *dense.parameters()], loss


def packed() -> Any:
    return nn.utils.rnn.pack_padded_sequence(torch.randn(4, 6, 5), torch.tensor([6, 5, 3, 2]), batch_first=True)


MODELS["LSTM"] = lambda: recurrent(
    nn.LSTM(5, 7, 2, batch_first=True), lambda: torch.randn(4, 6, 5), lambda out: out[0][:, -1]
)
MODELS["packed GRU"] = lambda: recurrent(nn.GRU(5, 7, batch_first=True), packed, lambda out: out[1][-1])


@model("cell in a loop")
def _cell() -> Problem:
    cell, dense = nn.LSTMCell(5, 7), nn.Linear(7, 10)

    def loss() -> Tensor:
        x = torch.randn(4, 6, 5)
        h = c = x.new_zeros(4, 7)
        for step in range(6):
            h, c = cell(x[:, step], (h, c))
        return F.cross_entropy(dense(h), classes(4))

    return [*cell.parameters(), *dense.parameters()], loss


def encoder(first: bool, dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True, norm_first=first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def language(tied: bool, masked: bool, **of_layers: Any) -> Problem:
    """A transformer that predicts the next word; `tied` output and input embeddings."""
    net, table = encoder(**of_layers), nn.Embedding(20, 16)
    head = table if tied else nn.Linear(16, 20, bias=False)
    w = [*net.parameters(), *table.parameters(), *([] if tied else head.parameters())]

    def loss() -> Tensor:
        words = torch.randint(20, (3, 9))
        mask = nn.Transformer.generate_square_subsequent_mask(8) if masked else None
        with sdpa_kernel(SDPBackend.MATH):
            found = net(table(words[:, :-1]), mask=mask)
        return F.cross_entropy(F.linear(found, head.weight).flatten(0, 1), words[:, 1:].flatten())

    return w, loss


MODELS["transformer"] = lambda: language(tied=False, masked=False, first=True, dropout=0.0)
MODELS["transformer, tied, masked, dropout"] = lambda: language(tied=True, masked=True, first=False, dropout=0.1)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@model("0-dim weights")
def _zero_dim() -> Problem:
    a, b, c = w = leaves((), (), (3,))
    return w, lambda: (a * b.exp() * torch.randn(()) + a**3) * c.sum() + (c**3).sum()


@model("expanded gradients")
def _expanded() -> Problem:
    a, b = w = leaves((4,), (3, 4))
    return w, lambda: a.sum() ** 2 + b.sum() * a.sum() + (a * b).sum().sin()


@model("weights without use")
def _unused() -> Problem:
    a, _, c = w = leaves((4,), (3,), (2,))
    return w, lambda: (a**3 * torch.randn(4)).sum() + c.sum()


@model("bilinear")
def _bilinear() -> Problem:
    a, b = w = leaves((4,), (4,))
    return w, lambda: (a * b).sum()


@model("loss.item()")
def _item() -> Problem:
    w, entropy = classified(nn.Linear(20, 10), rows())

    def loss() -> Tensor:
        value = entropy()
        return value / value.item() + 0.1 * value

    return w, loss


@model("if on a value")
def _branch() -> Problem:
    first, second = nn.Linear(20, 10), nn.Linear(10, 10)

    def loss() -> Tensor:
        h = second(first(torch.randn(6, 20)))
        if h.abs().sum() > 0:
            h = h.tanh()
        return F.cross_entropy(h, classes())

    return [*first.parameters(), *second.parameters()], loss


@model("masks, indices, sorting, slices that are written", level=2)
def _indexed() -> Problem:
    net = nn.Linear(20, 10)

    def loss() -> Tensor:
        h = net(torch.randn(6, 20)).masked_fill(torch.rand(6, 10) > 0.5, -1.0).tanh()
        z = torch.zeros(6, 10)
        z[:, 2:5] = h[:, :3]
        z[0] = z[0].clone() * h[1]
        sums = h.topk(3).values.square().sum() + h.sort().values.cumsum(0).sin().sum() + torch.logsumexp(h, 1).sum()
        return z.pow(2).sum() + h[torch.tensor([0, 2])].sum().exp() * 0.01 + sums

    return list(net.parameters()), loss


@model("checkpointed", level=2)
def _checkpointed() -> Problem:
    first = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Dropout(0.2))
    second, dense = nn.Sequential(nn.Linear(30, 30), nn.Tanh()), nn.Linear(30, 10)

    def loss() -> Tensor:
        h = checkpoint(second, checkpoint(first, torch.randn(6, 20), use_reentrant=False), use_reentrant=False)
        return F.cross_entropy(dense(h), classes())

    return [p for part in (first, second, dense) for p in part.parameters()], loss


@model("a gradient step inside")
def _meta() -> Problem:
    net, rates = nn.Linear(20, 10), torch.rand(2, requires_grad=True)

    def loss() -> Tensor:
        x, y, p = torch.randn(6, 20), classes(), dict(net.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(net, p, x), y)
        g = torch.autograd.grad(inner, list(p.values()), create_graph=True)
        q = {name: a - rates[i] * b for i, ((name, a), b) in enumerate(zip(p.items(), g, strict=True))}
        return F.cross_entropy(torch.func.functional_call(net, q, x), y)

    return [rates, *net.parameters()], loss


@model("gradient penalty")
def _penalty_of_gradients() -> Problem:
    net = nn.Sequential(nn.Linear(20, 10), nn.Softplus(), nn.Linear(10, 1))

    def loss() -> Tensor:
        x = torch.randn(6, 20, requires_grad=True)
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (g.norm(dim=1) - 1).square().mean() + net(x).mean()

    return list(net.parameters()), loss
