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
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def batch() -> Tensors:
    generator = torch.Generator().manual_seed(1)
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
    "logsumexp": lambda w, x: logits(w, x).logsumexp((0, 1)),
    "logcumsumexp": lambda w, x: logits(w, x).logcumsumexp(0).mean(),
    "cumsum": lambda w, x: logits(w, x).cumsum(0).square().mean(),
    "cumprod": lambda w, x: (1 + logits(w, x)).cumprod(0).mean(),
    "prod": lambda w, x: (1 + logits(w, x)).prod(-1).square().mean(),
    "topk": lambda w, x: F.cross_entropy(logits(w, x), x["c"], reduction="none").topk(3).values.mean(),
    "sort": lambda w, x: (logits(w, x)[:, 0].sort().values - x["y"].sort().values).square().mean(),
    "median": lambda w, x: F.mse_loss(logits(w, x), x["t"], reduction="none").median(),
    "kthvalue": lambda w, x: (logits(w, x) ** 2).kthvalue(3, 0).values.sum(),
    "quantile of losses": lambda w, x: F.cross_entropy(logits(w, x), x["c"], reduction="none").quantile(0.7),
    "amax": lambda w, x: (logits(w, x) - x["t"]).square().amax(0).sum(),
    "scatter_add": lambda w, x: torch.zeros(CLASSES).scatter_add(0, x["c"], logits(w, x)[:, 0]).square().sum(),
    "index_add_": lambda w, x: torch.zeros(CLASSES, 3).index_add_(0, x["c"], logits(w, x)).square().sum(),
    "scatter_reduce": lambda w, x: (
        torch.zeros(CLASSES).scatter_reduce(0, x["c"], logits(w, x)[:, 0], "mean", include_self=False).square().sum()
    ),
    "index_put_ accumulating": lambda w, x: (
        torch.zeros(CLASSES, 3).index_put_((x["c"],), logits(w, x), accumulate=True).square().sum()
    ),
    "cdist": lambda w, x: torch.cdist(hidden(w, x), x["x"][:, :5]).mean(),
    "cdist squared": lambda w, x: torch.cdist(hidden(w, x), w["e"]).square().mean(),
    "cdist of itself": lambda w, x: torch.exp(-torch.cdist(h := hidden(w, x), h).pow(2)).mean(),
    "pdist": lambda w, x: torch.exp(-F.pdist(hidden(w, x)).square()).mean(),
    "pairwise_distance": lambda w, x: F.pairwise_distance(logits(w, x), x["t"]).mean(),
    "distances by hand": lambda w, x: (((h := hidden(w, x))[:, None] - h) ** 2).sum(-1).neg().exp().mean(),
    "determinant": lambda w, x: torch.det(torch.eye(6) + 0.1 * w["s"]),
    "log determinant": lambda w, x: torch.logdet(torch.eye(6) + w["s"] @ w["s"].T),
    "slogdet": lambda w, x: torch.linalg.slogdet(torch.eye(5) + (h := hidden(w, x)).T @ h).logabsdet,
    "Cholesky": lambda w, x: torch.linalg.cholesky(torch.eye(6) + w["s"] @ w["s"].T).diagonal().log().sum(),
    "solve": lambda w, x: torch.linalg.solve(torch.eye(6) + w["s"] @ w["s"].T, x["x"].T).square().mean(),
    "inverse": lambda w, x: torch.linalg.inv(torch.eye(6) * 3 + w["s"]).square().sum(),
    "cholesky_solve": lambda w, x: torch.cholesky_solve(
        x["x"].T, torch.linalg.cholesky(torch.eye(6) + w["s"] @ w["s"].T)
    ).mean(),
    "solve_triangular": lambda w, x: (
        torch.linalg.solve_triangular(w["s"].tril(-1) + torch.eye(6), x["x"].T, upper=False).square().mean()
    ),
    "eigenvalues": lambda w, x: torch.linalg.eigvalsh(w["s"] + w["s"].T).exp().sum(),
    "nuclear norm": lambda w, x: torch.linalg.svdvals(w["a"]).sum(),
    "spectral norm": lambda w, x: torch.linalg.matrix_norm(w["s"], 2) ** 2,
    "matrix_exp": lambda w, x: torch.linalg.matrix_exp(w["s"]).square().mean(),
    "pinv": lambda w, x: torch.linalg.pinv(w["a"]).square().sum(),
    "qr": lambda w, x: (torch.linalg.qr(w["a"]).R.diagonal().abs() + 1).log().sum(),
    "lstsq": lambda w, x: torch.linalg.lstsq(hidden(w, x), x["y"][:, None]).solution.square().sum(),
    "FFT": lambda w, x: torch.fft.rfft(hidden(w, x)).abs().square().mean(),
    "spectral convolution": lambda w, x: (
        torch.fft.irfft(torch.fft.rfft(x["x"]) * torch.fft.rfft(w["a"][:, 0])).pow(2).mean()
    ),
    "complex": lambda w, x: (
        torch.view_as_real(torch.exp(1j * logits(w, x)) * torch.complex(x["t"], x["t"])).square().mean()
    ),
    "rotary": lambda w, x: (
        torch.view_as_real(torch.view_as_complex(maps(w, x).reshape(-1, 2)) * torch.polar(torch.ones(1), x["y"][:1]))
        .pow(3)
        .mean()
    ),
    "STFT": lambda w, x: (
        torch.stft(maps(w, x).flatten(1), 16, 8, window=torch.hann_window(16), return_complex=True)
        .abs()
        .add(1e-3)
        .log()
        .mean()
    ),
    "interpolate": lambda w, x: F.interpolate(maps(w, x), scale_factor=2, mode="bilinear").square().mean(),
    "interpolate bicubic": lambda w, x: F.interpolate(maps(w, x), size=(9, 9), mode="bicubic").square().mean(),
    "interpolate nearest": lambda w, x: F.interpolate(maps(w, x), scale_factor=2).tanh().square().mean(),
    "pixel_shuffle": lambda w, x: F.pixel_shuffle(maps(w, x), 2).square().mean(),
    "grid_sample": lambda w, x: (
        F.grid_sample(
            x["image"],
            F.affine_grid(
                torch.eye(2, 3) + 0.1 * w["s"][None, :2, :3].expand(2, 2, 3), (2, 2, 6, 6), align_corners=False
            ),
            align_corners=False,
        )
        .square()
        .mean()
    ),
    "unfold": lambda w, x: F.unfold(maps(w, x), 3).square().mean(),
    "Dice": lambda w, x: (
        1
        - (2 * ((p := maps(w, x).sigmoid()) * (x["image"].repeat(1, 2, 1, 1) > 0)).sum((2, 3)) + 1)
        .div(p.sum((2, 3)) + (x["image"].repeat(1, 2, 1, 1) > 0).sum((2, 3)) + 1)
        .mean()
    ),
    "total variation": lambda w, x: torch.sqrt(
        (m := maps(w, x)).diff(dim=2)[..., :-1].square() + m.diff(dim=3)[:, :, :-1].square() + 1e-6
    ).mean(),
    "Gram matrices": lambda w, x: F.mse_loss((m := maps(w, x).flatten(2)) @ m.mT / 36, torch.eye(4).expand(2, 4, 4)),
    "max and average pooling": lambda w, x: (F.max_pool2d(m := maps(w, x), 2) - F.avg_pool2d(m, 2)).square().mean(),
    "adaptive pooling": lambda w, x: (
        F.adaptive_max_pool2d(maps(w, x), 2).mul(F.adaptive_avg_pool2d(maps(w, x), 2)).mean()
    ),
    "lp_pool2d": lambda w, x: F.lp_pool2d(maps(w, x), 2.0, 2).mean(),
    "hardswish": lambda w, x: F.hardswish(maps(w, x)).square().mean(),
    "hardsigmoid": lambda w, x: F.hardsigmoid(maps(w, x)).square().mean(),
    "mish": lambda w, x: F.mish(maps(w, x)).square().mean(),
    "selu, elu, celu": lambda w, x: (F.selu(m := maps(w, x)) + F.elu(m) + F.celu(m)).square().mean(),
    "softsign, tanhshrink": lambda w, x: (F.softsign(m := maps(w, x)) + F.tanhshrink(m)).square().mean(),
    "hardshrink, softshrink": lambda w, x: (F.hardshrink(m := maps(w, x)) + F.softshrink(m)).square().mean(),
    "relu6, rrelu": lambda w, x: (F.relu6(m := maps(w, x)) + F.rrelu(m)).square().mean(),
    "prelu": lambda w, x: F.prelu(maps(w, x), w["b"][:4]).square().mean(),
    "maxout": lambda w, x: maps(w, x).unflatten(1, (2, 2)).amax(1).square().mean(),
    "embedding": lambda w, x: F.embedding(x["words"], w["e"]).mean(1).square().mean(),
    "embedding with max_norm": lambda w, x: F.embedding(x["words"], w["e"] * 1, max_norm=0.5).mean(1).square().mean(),
    "padded embedding": lambda w, x: F.embedding(x["words"], w["e"], padding_idx=0).tanh().square().mean(),
    "embedding_bag mean": lambda w, x: F.embedding_bag(x["words"], w["e"], mode="mean").square().mean(),
    "embedding_bag sum": lambda w, x: F.embedding_bag(x["words"], w["e"], mode="sum").square().mean(),
    "word2vec": lambda w, x: -F.logsigmoid((w["e"][x["words"][:, 1:]] * w["e"][x["words"][:, :1]]).sum(-1)).mean(),
    "tied embedding": lambda w, x: F.cross_entropy(
        (w["e"][x["words"][:, :-1]].tanh() @ w["e"].T).flatten(0, 1), x["words"][:, 1:].flatten()
    ),
    "ctc_loss": lambda w, x: F.ctc_loss(
        maps(w, x).flatten(2).permute(2, 0, 1).log_softmax(-1), torch.tensor([[1, 2], [2, 3]]), (36, 36), (2, 2)
    ),
    "functional vmap": lambda w, x: torch.vmap(lambda row: (row @ w["a"]).tanh().sum() ** 2)(x["x"]).mean(),
    "einsum bilinear": lambda w, x: torch.einsum("ni,ij,nj->n", x["x"], w["s"], x["x"]).tanh().mean(),
    "F.bilinear": lambda w, x: F.bilinear(x["x"], x["x"], w["s"][None], None).tanh().square().mean(),
    "numpy-like where": lambda w, x: torch.where(x["c"][:, None] == torch.arange(3), logits(w, x), 0.0).square().sum(),
    "boolean indexing of rows": lambda w, x: logits(w, x)[x["c"] == 1].square().mean(),
    "nonzero": lambda w, x: logits(w, x)[(x["c"] == 1).nonzero(as_tuple=True)].square().mean(),
    "masked_select": lambda w, x: logits(w, x).masked_select(x["t"] > 0).square().mean(),
    "loop over classes": lambda w, x: sum(logits(w, x)[x["c"] == k].mean(0).square().sum() for k in range(CLASSES)),
    "loss.item() logged": lambda w, x: (value := F.mse_loss(logits(w, x), x["t"])) * (1 if value.item() > -1 else 2),
    "if any NaN": lambda w, x: h.square().mean() if not torch.isnan(h := logits(w, x)).any() else h.sum(),
    "assert finite": lambda w, x: asserted(logits(w, x)).square().mean(),
    "len(unique)": lambda w, x: logits(w, x).square().sum() / len(x["c"].unique()),
    "class counts by bincount": lambda w, x: F.cross_entropy(logits(w, x), x["c"], 1 / x["c"].bincount(minlength=3)),
    "labels as list": lambda w, x: (
        torch.stack([logits(w, x)[i, k] for i, k in enumerate(x["c"].tolist())]).exp().mean()
    ),
    "torch.tensor inside": lambda w, x: (logits(w, x) * torch.tensor([1.0, 2.0, 3.0])).square().mean(),
    "randn inside": lambda w, x: (logits(w, x) + 0.1 * torch.randn(ROWS, 3)).square().mean(),
    "randn_like inside": lambda w, x: (h := logits(w, x)).add(torch.randn_like(h)).square().mean(),
    "random permutation": lambda w, x: (logits(w, x)[torch.randperm(ROWS)] - x["t"]).square().mean(),
    "Gumbel softmax": lambda w, x: F.gumbel_softmax(logits(w, x), tau=0.7).square().sum(-1).mean(),
    "straight-through": lambda w, x: (
        ((p := logits(w, x).softmax(-1)) + (p.round() - p).detach() - x["t"]).square().mean()
    ),
    "dropout": lambda w, x: (F.dropout(hidden(w, x), 0.3) @ w["c"]).square().mean(),
    "DropConnect": lambda w, x: (x["x"] @ F.dropout(w["a"], 0.3)).square().mean(),
    "feature_alpha_dropout": lambda w, x: F.alpha_dropout(maps(w, x), 0.2, training=True).square().mean(),
    "drop path": lambda w, x: (maps(w, x) * torch.bernoulli(torch.full((2, 1, 1, 1), 0.8)) / 0.8).square().mean(),
    "clip of gradients in loss": lambda w, x: logits(w, x).clamp(-0.3, 0.3).square().mean(),
    "nan_to_num": lambda w, x: torch.nan_to_num(logits(w, x).log(), nan=0.0).square().mean(),
    "float32 inside": lambda w, x: (logits(w, x).to(torch.float64) - x["t"]).square().mean(),
    "erf, lgamma": lambda w, x: torch.lgamma(1.5 + logits(w, x).erf()).mean(),
    "atan2": lambda w, x: torch.atan2(*logits(w, x)[:, :2].unbind(1)).square().mean(),
    "cross": lambda w, x: torch.linalg.cross(logits(w, x), x["t"]).square().mean(),
    "meshgrid kernel": lambda w, x: torch.exp(
        -(torch.stack(torch.meshgrid(w["b"], w["b"], indexing="ij")).diff(dim=0) ** 2)
    ).mean(),
}


def distances(a: Tensor, b: Tensor) -> Tensor:
    """As `torch.cdist`, whose derivative where two rows are the same is zero."""
    squares = ((a[:, None] - b) ** 2).sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


REFUSED = {"ctc_loss": "ctc_loss"}
"""Losses without a second derivative, and what the message names."""

TWINS: dict[str, Loss] = {
    "multi_margin": lambda w, x: (
        ((1 - (z := logits(w, x)).gather(1, x["c"][:, None]) + z).clamp(min=0) * (1 - one_hot(x))).sum() / (3 * ROWS)
    ),
    "multilabel_margin": lambda w, x: (
        (1 - (z := logits(w, x))[:, ::2, None] + z[:, None, 1:2]).clamp(min=0).sum() / (3 * ROWS)
    ),
    "cdist": lambda w, x: distances(hidden(w, x), x["x"][:, :5]).mean(),
    "cdist squared": lambda w, x: distances(hidden(w, x), w["e"]).square().mean(),
    "cdist of itself": lambda w, x: torch.exp(-((h := hidden(w, x))[:, None] - h).square().sum(-1)).mean(),
    "pdist": lambda w, x: torch.exp(-((h := hidden(w, x))[:, None] - h).square().sum(-1))[
        *torch.triu_indices(ROWS, ROWS, 1)
    ].mean(),
    "hardsigmoid": lambda w, x: (maps(w, x) / 6 + 0.5).clamp(0, 1).square().mean(),
    "embedding_bag mean": lambda w, x: w["e"][x["words"]].mean(1).square().mean(),
    "embedding_bag sum": lambda w, x: w["e"][x["words"]].sum(1).square().mean(),
    "prototypes by cdist": lambda w, x: F.cross_entropy(
        -(distances(hidden(w, x), (m := one_hot(x)).T @ hidden(w, x) / m.sum(0)[:, None]) ** 2), x["c"]
    ),
}
"""Of losses that torch does not differentiate twice: the same function, written so that it does."""


def asserted(values: Tensor) -> Tensor:
    assert torch.isfinite(values).all(), "not finite"
    return values


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
