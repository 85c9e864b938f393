"""Losses as training scripts write them: functions of tensors.

Each is `loss(w, x)`: `w` are weights by name, `x` a batch by name, with the shapes in `SHAPES` and `batch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]

LOSSES: dict[str, Loss] = {}

SHAPES = {"a": (6, 5), "b": (5,), "c": (5, 3), "k": (4, 2, 3, 3), "s": (6, 6), "e": (9, 5)}
"""Of the weights: two layers, a kernel of a convolution, a square matrix, embeddings."""

ROWS, CLASSES, WORDS = 8, 3, 9


def weights() -> Tensors:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def batch() -> Tensors:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return {
        "x": torch.randn(ROWS, 6, generator=generator),
        "y": torch.randn(ROWS, generator=generator),
        "c": torch.tensor([0, 1, 2, 1, 0, 2, 2, 1]),
        "t": torch.randn(ROWS, 3, generator=generator),
        "image": torch.randn(2, 2, 6, 6, generator=generator),
        "words": torch.tensor([[0, 2, 2, 8], [5, 1, 0, 0], [7, 7, 3, 4]]),
    }


def loss(name: str) -> Callable[[Loss], Loss]:
    """Under a name."""

    def register(function: Loss) -> Loss:
        assert name not in LOSSES
        LOSSES[name] = function
        return function

    return register


def hidden(w: Tensors, x: Tensors) -> Tensor:
    """(8, 5)."""
    return torch.tanh(x["x"] @ w["a"] + w["b"])


def logits(w: Tensors, x: Tensors) -> Tensor:
    """(8, 3)."""
    return hidden(w, x) @ w["c"]


def maps(w: Tensors, x: Tensors) -> Tensor:
    """(2, 4, 6, 6)."""
    return F.conv2d(x["image"], w["k"], padding=1)


def one_hot(x: Tensors) -> Tensor:
    return torch.eye(CLASSES)[x["c"]]


LOSSES |= {
    "cross-entropy": lambda w, x: F.cross_entropy(logits(w, x), x["c"]),
    "class weights": lambda w, x: F.cross_entropy(logits(w, x), x["c"], weight=torch.tensor([1.0, 2.0, 0.5])),
    "label smoothing": lambda w, x: F.cross_entropy(logits(w, x), x["c"], label_smoothing=0.1),
    "ignored labels": lambda w, x: F.cross_entropy(logits(w, x), torch.where(x["c"] == 2, -100, x["c"])),
    "one_hot": lambda w, x: -(F.one_hot(x["c"], CLASSES) * logits(w, x).log_softmax(-1)).sum(-1).mean(),
    "one_hot without a number": lambda w, x: F.mse_loss(logits(w, x), F.one_hot(x["c"]).double()),
    "mixup": lambda w, x: (
        0.3 * F.cross_entropy(logits(w, x), x["c"]) + 0.7 * F.cross_entropy(logits(w, x), x["c"].flip(0))
    ),
    "multi-label": lambda w, x: F.multilabel_soft_margin_loss(logits(w, x), one_hot(x)),
    "weighted binary": lambda w, x: F.binary_cross_entropy_with_logits(
        logits(w, x), one_hot(x), pos_weight=torch.tensor([2.0, 1.0, 3.0])
    ),
    "hinge": lambda w, x: F.relu(1 - x["y"].sign() * logits(w, x)[:, 0]).mean(),
    "squared hinge": lambda w, x: (1 - x["y"].sign() * logits(w, x)[:, 0]).clamp(min=0).square().mean(),
    "hinge_embedding": lambda w, x: F.hinge_embedding_loss(logits(w, x)[:, 0], x["y"].sign()),
    "multi_margin": lambda w, x: F.multi_margin_loss(logits(w, x), x["c"]),
    "multilabel_margin": lambda w, x: F.multilabel_margin_loss(logits(w, x), torch.tensor([[0, 2, -1]] * ROWS)),
    "mean square": lambda w, x: F.mse_loss(logits(w, x)[:, 0], x["y"]),
    "root mean square": lambda w, x: F.mse_loss(logits(w, x)[:, 0], x["y"]).sqrt(),
    "weighted mean square": lambda w, x: F.mse_loss(logits(w, x)[:, 0], x["y"], weight=x["y"].abs()),
    "smooth L1": lambda w, x: F.smooth_l1_loss(logits(w, x)[:, 0], x["y"], beta=0.5),
    "huber": lambda w, x: F.huber_loss(logits(w, x)[:, 0], x["y"], delta=0.7),
    "absolute error of squares": lambda w, x: F.l1_loss(logits(w, x)[:, 0] ** 2, x["y"]),
    "log cosh": lambda w, x: torch.log(torch.cosh(logits(w, x)[:, 0] - x["y"])).mean(),
    "Poisson": lambda w, x: F.poisson_nll_loss(logits(w, x)[:, 0], x["y"].abs().round()),
    "gaussian_nll_loss": lambda w, x: F.gaussian_nll_loss(
        logits(w, x)[:, 0], x["y"], F.softplus(logits(w, x)[:, 1]) + 1e-3
    ),
    "explained variance": lambda w, x: (x["y"] - logits(w, x)[:, 0]).var() / x["y"].var(),
    "correlation": lambda w, x: 1 - torch.corrcoef(torch.stack([logits(w, x)[:, 0], x["y"]]))[0, 1],
    "kl_div": lambda w, x: F.kl_div(logits(w, x).log_softmax(-1), x["t"].softmax(-1), reduction="batchmean"),
    "entropy": lambda w, x: -(p := logits(w, x).softmax(-1)).mul(p.log()).sum(-1).mean(),
    "Jensen-Shannon": lambda w, x: F.kl_div(
        ((p := logits(w, x).softmax(-1)) * 0.5 + one_hot(x) * 0.5).log(), p, reduction="batchmean"
    ),
    "cosine_embedding": lambda w, x: F.cosine_embedding_loss(logits(w, x), x["t"], x["y"].sign(), margin=0.1),
    "margin_ranking": lambda w, x: F.margin_ranking_loss(*logits(w, x)[:, :2].unbind(-1), x["y"].sign(), margin=0.2),
    "triplet": lambda w, x: F.triplet_margin_loss(*(h := hidden(w, x)).chunk(2), h.flip(0)[:4], margin=2.0),
    "triplet with distance": lambda w, x: F.triplet_margin_with_distance_loss(
        *(h := hidden(w, x)).chunk(2), h.flip(0)[:4], distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)
    ),
    "Bradley-Terry": lambda w, x: -F.logsigmoid((s := logits(w, x)[:, 0])[:4] - s[4:]).mean(),
    "pairwise ranking": lambda w, x: F.softplus(-(s := logits(w, x)[:, 0])[:, None] + s).triu(1).sum() / 28,
}


@loss("focal")
def _focal(w: Tensors, x: Tensors) -> Tensor:
    entropy = F.cross_entropy(logits(w, x), x["c"], reduction="none")
    return (0.25 * (1 - torch.exp(-entropy)) ** 2 * entropy).mean()


@loss("distillation")
def _distillation(w: Tensors, x: Tensors) -> Tensor:
    student, teacher = F.log_softmax(logits(w, x) / 4, -1), F.softmax(x["t"] / 4, -1)
    return F.kl_div(student, teacher, reduction="batchmean") * 16 + F.cross_entropy(logits(w, x), x["c"])


@loss("self-distillation with a detached teacher")
def _self_distillation(w: Tensors, x: Tensors) -> Tensor:
    with torch.no_grad():
        teacher = logits(w, x).softmax(-1)
    return F.kl_div((logits(w, x) * 1.3).log_softmax(-1), teacher, reduction="batchmean")


@loss("InfoNCE")
def _info_nce(w: Tensors, x: Tensors) -> Tensor:
    a, b = F.normalize(hidden(w, x), dim=-1).chunk(2)
    scores = a @ b.t() / 0.1
    labels = torch.arange(len(a), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


@loss("SimCLR")
def _simclr(w: Tensors, x: Tensors) -> Tensor:
    z = F.normalize(hidden(w, x), dim=1)
    scores = z @ z.T / 0.5
    scores = scores[~torch.eye(ROWS, dtype=torch.bool)].view(ROWS, -1)
    labels = torch.cat([torch.arange(4) + 3, torch.arange(4)])
    return F.cross_entropy(scores, labels)


@loss("SimCLR, fill_diagonal_")
def _simclr_filled(w: Tensors, x: Tensors) -> Tensor:
    z = F.normalize(hidden(w, x), dim=1)
    return F.cross_entropy((z @ z.T / 0.5).fill_diagonal_(-1e9), torch.arange(ROWS).roll(4))


@loss("supervised contrastive")
def _supervised_contrastive(w: Tensors, x: Tensors) -> Tensor:
    z = F.normalize(hidden(w, x), dim=-1)
    scores = z @ z.T / 0.3
    scores = scores - scores.max(dim=1, keepdim=True).values.detach()
    itself = torch.eye(ROWS)
    same = (x["c"][:, None] == x["c"]).double() - itself
    log_p = scores - torch.log((torch.exp(scores) * (1 - itself)).sum(1, keepdim=True))
    return -((same * log_p).sum(1) / same.sum(1).clamp(min=1)).mean()


@loss("Barlow twins")
def _barlow_twins(w: Tensors, x: Tensors) -> Tensor:
    a, b = hidden(w, x).chunk(2)
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    c = a.T @ b / len(a)
    on = torch.diagonal(c).add(-1).pow(2).sum()
    return on + 0.005 * c.flatten()[:-1].view(4, 6)[:, 1:].flatten().pow(2).sum()


@loss("VICReg")
def _vicreg(w: Tensors, x: Tensors) -> Tensor:
    a, b = hidden(w, x).chunk(2)
    std = torch.sqrt(a.var(dim=0) + 1e-4)
    a = a - a.mean(dim=0)
    covariance = (a.T @ a) / (len(a) - 1)
    off = covariance - torch.diag(torch.diag(covariance))
    return F.mse_loss(a, b) + torch.mean(F.relu(1 - std)) + off.pow(2).sum() / 5


@loss("VAE")
def _vae(w: Tensors, x: Tensors) -> Tensor:
    mean, log_var = logits(w, x), logits(w, x).tanh()
    std = torch.exp(0.5 * log_var)
    z = mean + torch.randn_like(std) * std
    kl = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
    return F.mse_loss(z @ w["c"].T @ w["a"].T, x["x"], reduction="sum") + kl


@loss("VQ-VAE")
def _vq_vae(w: Tensors, x: Tensors) -> Tensor:
    z = hidden(w, x)
    nearest = (z.pow(2).sum(1, keepdim=True) + w["e"].pow(2).sum(1) - 2 * z @ w["e"].t()).argmin(1)
    q = w["e"][nearest]
    commitment = F.mse_loss(q.detach(), z) * 0.25 + F.mse_loss(q, z.detach())
    return commitment + F.mse_loss((z + (q - z).detach()) @ w["a"].T, x["x"])


@loss("diffusion")
def _diffusion(w: Tensors, x: Tensors) -> Tensor:
    t = torch.randint(0, 10, (ROWS,))
    kept = torch.cumprod(1 - torch.linspace(1e-2, 0.2, 10), 0)[t][:, None]
    noise = torch.randn_like(x["x"])
    noisy = kept.sqrt() * x["x"] + (1 - kept).sqrt() * noise
    return F.mse_loss(torch.tanh(noisy @ w["a"]) @ w["a"].T, noise)


@loss("mixture density")
def _mixture_density(w: Tensors, x: Tensors) -> Tensor:
    h = hidden(w, x)
    pi, mean, log_std = logits(w, x), h @ w["c"] + 0.1, (h**2) @ w["c"]
    log_p = -0.5 * ((x["y"][:, None] - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(F.log_softmax(pi, 1) + log_p, dim=1).mean()


@loss("quantile")
def _quantile(w: Tensors, x: Tensors) -> Tensor:
    errors = x["y"][:, None] - logits(w, x)
    q = torch.tensor([0.1, 0.5, 0.9])
    return torch.max((q - 1) * errors, q * errors).square().mean()
