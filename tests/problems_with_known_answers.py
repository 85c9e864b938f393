"""Problems with known answers, in float64: losses whose Hessians, minima and hypergradients are written out by hand.

The closed forms do not use autograd, so they can judge code that does. Networks have no closed form; for them
:func:`dense_hessian` asks `torch.autograd.functional.hessian`, which shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bench.hard_modules import Attention, BareAttention, Recurrent, Tied, Words

DTYPE = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64 that do not touch the global generator; the same on every device."""
    numbers = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=numbers, dtype=DTYPE, device="cpu").to(torch.get_default_device())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors, each in row-major order, as one float64 vector."""
    return torch.cat([tensor.detach().reshape(-1).to(DTYPE) for tensor in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flat`, in the dtypes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, by the global norm."""
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


# Matrices


def matrix_with(eigenvalues: Sequence[float] | Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=DTYPE)
    basis, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    return basis @ torch.diag(values) @ basis.T


def truncated_sum(matrix: Tensor, v: Tensor, iterations: int, alpha: float, damping: float = 0.0) -> Tensor:
    """alpha * sum_{j=0..iterations} (I - alpha (A + damping I))^j v, by dense matrix powers."""
    identity = torch.eye(len(v), dtype=DTYPE)
    step = identity - alpha * (matrix + damping * identity)
    terms = [torch.linalg.matrix_power(step, power) @ v for power in range(iterations + 1)]
    return alpha * torch.stack(terms).sum(0)


def spd_problems(count: int) -> list[tuple[Tensor, Tensor]]:
    """Random positive definite matrices of condition 1 to 1e6, some with an outlier eigenvalue, and vectors."""
    problems = []
    for seed in range(count):
        size = 5 + seed
        condition = 10.0 ** (6.0 * seed / max(1, count - 1))
        eigenvalues = torch.logspace(0, -1, size, dtype=DTYPE) ** torch.log10(torch.tensor(condition, dtype=DTYPE))
        if seed % 3 == 1:
            eigenvalues = torch.ones(size, dtype=DTYPE)
            eigenvalues[0] = condition  # one outlier above a cluster
        scale = 10.0 ** (seed % 7 - 3)
        problems.append((scale * matrix_with(eigenvalues, seed), randn(size, seed=1000 + seed)))
    return problems


# Losses with a closed-form Hessian


@dataclass(frozen=True)
class Case:
    """`loss(weights)` at `weights` (a list of tensors), whose Hessian is `hessian` in row-major order."""

    loss: Callable[[list[Tensor]], Tensor]
    weights: list[Tensor]
    hessian: Tensor


def linear_case() -> Case:
    """Squared error of a linear model with a bias: H = [X 1]^T [X 1] / n."""
    x, y = randn(20, 4, seed=1), randn(20, seed=2)
    weights = [randn(4, seed=3), randn(1, seed=4)[0]]
    extended = torch.cat([x, torch.ones(20, 1, dtype=DTYPE)], 1)
    return Case(lambda w: (x @ w[0] + w[1] - y).square().mean() / 2, weights, extended.T @ extended / 20)


def logistic_case() -> Case:
    """Binary logistic regression with weight decay 0.1: H = X^T diag(p (1 - p)) X / n + 0.1 I."""
    x, w = randn(30, 5, seed=5), randn(5, seed=6)
    y = (randn(30, seed=7) > 0).to(DTYPE)
    p = 1 / (1 + torch.exp(-x @ w))
    hessian = x.T @ torch.diag(p * (1 - p)) @ x / 30 + 0.1 * torch.eye(5, dtype=DTYPE)
    return Case(
        lambda w: binary_cross_entropy_with_logits(x @ w[0], y) + 0.05 * w[0].square().sum(),
        [w],
        hessian,
    )


def softmax_case() -> Case:
    """Softmax regression, weights (features, classes): H = mean over samples of x x^T (x) (diag(p) - p p^T)."""
    x, w = randn(25, 3, seed=8), randn(3, 4, seed=9)
    labels = torch.randint(4, (25,), generator=generator(10))
    scores = torch.exp(x @ w)
    p = scores / scores.sum(1, keepdim=True)
    hessian = torch.zeros(12, 12, dtype=DTYPE)
    for sample, chances in zip(x, p, strict=True):
        hessian += torch.kron(torch.outer(sample, sample), torch.diag(chances) - torch.outer(chances, chances)) / 25
    return Case(lambda w: cross_entropy(x @ w[0], labels), [w], hessian)


CLOSED_FORMS = {"linear": linear_case, "logistic": logistic_case, "softmax": softmax_case}


# Bilevel problems with a closed-form hypergradient


@dataclass(frozen=True)
class Bilevel:
    """Losses of (weights, hyper, batch), the minimum of the training loss, and what is known about it.

    `direct` and `indirect` are the two terms of the hypergradient at `minimum(hyper)`, neither of them zero.
    """

    train_loss: Callable[[Tensor, Tensor, Any], Tensor]
    val_loss: Callable[[Tensor, Tensor, Any], Tensor]
    hyper: Tensor
    minimum: Callable[[Tensor], Tensor]
    hessian: Tensor
    direct: Tensor
    indirect: Tensor

    @property
    def weights(self) -> Tensor:
        return self.minimum(self.hyper)

    @property
    def hypergradient(self) -> Tensor:
        return self.direct + self.indirect

    @property
    def alpha(self) -> float:
        """A step that converges."""
        return 1.0 / float(torch.linalg.eigvalsh(self.hessian)[-1])


def quadratic_bilevel() -> Bilevel:
    """L_T = w^T A w / 2 - w^T B h, L_V = ||w - c||^2 / 2 + h^T D w + ||h||^2.

    w* = A^-1 B h; dL_V/dh = D w* + 2 h + B^T A^-1 (w* - c + D^T h).
    """
    a = matrix_with([0.5, 0.8, 1.0, 1.3, 2.0], seed=11)
    b, c, d, hyper = randn(5, 3, seed=12), randn(5, seed=13), randn(3, 5, seed=14), randn(3, seed=15)
    w = torch.linalg.solve(a, b @ hyper)
    return Bilevel(
        train_loss=lambda w, h, batch: w @ a @ w / 2 - w @ b @ h,
        val_loss=lambda w, h, batch: (w - c).square().sum() / 2 + h @ d @ w + h.square().sum(),
        hyper=hyper,
        minimum=lambda h: torch.linalg.solve(a, b @ h),
        hessian=a,
        direct=d @ w + 2 * hyper,
        indirect=b.T @ torch.linalg.solve(a, w - c + d.T @ hyper),
    )


def ridge_bilevel() -> Bilevel:
    """One decay for each weight: L_T = ||X w - y||^2 / 2n + sum(e^h w^2) / 2.

    L_V = ||X' w - y'||^2 / 2n' + ||h||^2 / 10; H = X^T X / n + diag(e^h); w* = H^-1 X^T y / n;
    dL_V/dh = h / 5 - e^h w* . H^-1 X'^T (X' w* - y') / n'.
    """
    x, y, x_val, y_val = randn(30, 6, seed=16), randn(30, seed=17), randn(12, 6, seed=18), randn(12, seed=19)
    hyper = randn(6, seed=20) / 2

    def hessian(h: Tensor) -> Tensor:
        return x.T @ x / 30 + torch.diag(torch.exp(h))

    def minimum(h: Tensor) -> Tensor:
        return torch.linalg.solve(hessian(h), x.T @ y / 30)

    w = minimum(hyper)
    inverse = torch.linalg.solve(hessian(hyper), x_val.T @ (x_val @ w - y_val) / 12)
    return Bilevel(
        train_loss=lambda w, h, batch: (x @ w - y).square().sum() / 60 + (torch.exp(h) * w.square()).sum() / 2,
        val_loss=lambda w, h, batch: (x_val @ w - y_val).square().sum() / 24 + h.square().sum() / 10,
        hyper=hyper,
        minimum=minimum,
        hessian=hessian(hyper),
        direct=hyper / 5,
        indirect=-torch.exp(hyper) * w * inverse,
    )


def logistic_bilevel() -> Bilevel:
    """Logistic regression with one decay e^h for each weight: nonlinear, so that H depends on w and w* on h by Newton.

    H = X^T diag(p (1 - p)) X / n + diag(e^h); dL_V/dh = -e^h w* . H^-1 X'^T (p' - y') / n' + h / 25.
    """
    x, x_val = randn(40, 4, seed=21), randn(15, 4, seed=22)
    y, y_val = (x[:, 0] + randn(40, seed=23) > 0).to(DTYPE), (x_val[:, 0] > 0).to(DTYPE)
    hyper = randn(4, seed=24) / 2 - 1

    def sigmoid(scores: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-scores))

    def hessian(w: Tensor, h: Tensor) -> Tensor:
        p = sigmoid(x @ w)
        return x.T @ torch.diag(p * (1 - p)) @ x / 40 + torch.diag(torch.exp(h))

    def minimum(h: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=DTYPE)
        for _ in range(30):
            gradient = x.T @ (sigmoid(x @ w) - y) / 40 + torch.exp(h) * w
            w = w - torch.linalg.solve(hessian(w, h), gradient)
        return w

    w = minimum(hyper)
    inverse = torch.linalg.solve(hessian(w, hyper), x_val.T @ (sigmoid(x_val @ w) - y_val) / 15)
    return Bilevel(
        train_loss=lambda w, h, batch: (
            binary_cross_entropy_with_logits(x @ w, y) + (torch.exp(h) * w.square()).sum() / 2
        ),
        val_loss=lambda w, h, batch: binary_cross_entropy_with_logits(x_val @ w, y_val) + h.square().sum() / 50,
        hyper=hyper,
        minimum=minimum,
        hessian=hessian(w, hyper),
        direct=hyper / 25,
        indirect=-torch.exp(hyper) * w * inverse,
    )


BILEVEL = {"quadratic": quadratic_bilevel, "ridge": ridge_bilevel, "logistic": logistic_bilevel}


# Networks


class LoopedRNN(nn.Module):
    """A tanh RNN as a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.readout = nn.Linear(2 + 4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            state = torch.tanh(self.cell(torch.cat([x[:, t], state], 1)))
        return self.readout(state)


@dataclass(frozen=True)
class Network:
    """A module in float64 with a batch and a loss of its output."""

    module: nn.Module
    x: Tensor
    y: Tensor

    def loss_of(self, output: Tensor) -> Tensor:
        return cross_entropy(output, self.y)


def _conv(**options: Any) -> list[nn.Module]:
    return [nn.Conv2d(2, 3, 2, **options), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 2)]


def _network(module: nn.Module, x: Tensor, training: bool = True) -> Network:
    module = module.to(DTYPE).train(training)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + number) * 0.5)
        for number, buffer in enumerate(module.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(randn(*buffer.shape, seed=200 + number).abs() + 0.5)
    return Network(module, x, torch.arange(len(x)) % 2)


def _batchnorm(training: bool) -> Network:
    layers = [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    return _network(nn.Sequential(*layers), randn(5, 2, 3, 3, seed=33), training)


NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: _network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(6, 3, seed=31)),
    "conv": lambda: _network(nn.Sequential(*_conv()), randn(4, 2, 4, 4, seed=32)),
    "channels_last conv": lambda: _network(
        nn.Sequential(*_conv()).to(memory_format=torch.channels_last), randn(4, 2, 4, 4, seed=32)
    ),
    "batchnorm, training": lambda: _batchnorm(True),
    "batchnorm, evaluation": lambda: _batchnorm(False),
    "lstm": lambda: _network(Recurrent(nn.LSTM), randn(3, 4, 2, seed=34)),
    "gru": lambda: _network(Recurrent(nn.GRU), randn(3, 4, 2, seed=34)),
    "looped rnn": lambda: _network(LoopedRNN(), randn(3, 4, 2, seed=34)),
    "multihead attention": lambda: _network(Attention(), randn(3, 5, 4, seed=35)),
    "bare attention": lambda: _network(BareAttention(), randn(3, 5, 4, seed=35)),
    "tied": lambda: _network(Tied(), randn(5, 4, seed=36)),
    "embedding": lambda: _network(Words(), torch.tensor([[0, 2, 2], [5, 1, 0], [2, 2, 3]])),
    "sparse embedding": lambda: _network(Words(sparse=True), torch.tensor([[0, 2, 2], [5, 1, 0], [2, 2, 3]])),
}


def dense_hessian(network: Network) -> Tensor:
    """The Hessian of the network's loss over its named parameters, by torch's own double loop."""
    module = copy.deepcopy(network.module)
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            layer.sparse = False  # torch's double loop cannot read sparse gradients; the Hessian is the same
    names = [name for name, _ in module.named_parameters()]
    parameters = [parameter.detach() for parameter in module.parameters()]

    def loss(vector: Tensor) -> Tensor:
        state: dict[str, Tensor] = dict(zip(names, unflat(vector, parameters), strict=True))
        state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return network.loss_of(torch.func.functional_call(module, state, (network.x,)))

    return torch.autograd.functional.hessian(loss, flat(parameters))
