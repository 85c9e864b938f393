"""Everyday losses by the operator that they are there for, and what torch does not differentiate twice."""

from __future__ import annotations

import torch
from everyday_losses import CLASSES, LOSSES, ROWS, Loss, hidden, logits, maps, one_hot
from torch import Tensor
from torch.nn import functional as F


def asserted(values: Tensor) -> Tensor:
    assert torch.isfinite(values).all(), "not finite"
    return values


LOSSES |= {
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
    "complex": lambda w, x: (torch.exp(1j * logits(w, x)) * torch.complex(x["t"], x["t"])).real.pow(3).mean(),
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


def alignments(scores: Tensor, first: int, second: int) -> Tensor:
    """-log of the probability of two different labels: of all blank^a first^b blank^c second^d blank^e, one by one."""
    sums = F.pad(scores.cumsum(0), (0, 0, 1, 0))
    a, b, c, d = torch.combinations(torch.arange(len(sums) + 1), 4).unbind(1)
    c, d = c - 1, d - 1  # so that the blanks between the labels may be none
    blank, one, two = sums[:, 0], sums[:, first], sums[:, second]
    total = blank[a] + one[b] - one[a] + blank[c] - blank[b] + two[d] - two[c] + blank[-1] - blank[d]
    return -total.logsumexp(0)


TWINS: dict[str, Loss] = {
    "ctc_loss": lambda w, x: sum(
        alignments(maps(w, x)[row].flatten(1).T.log_softmax(-1), row + 1, row + 2) / 4 for row in range(2)
    ),
    "multi_margin": lambda w, x: (
        ((1 - (z := logits(w, x)).gather(1, x["c"][:, None]) + z).clamp(min=0) * (1 - one_hot(x))).sum() / (3 * ROWS)
    ),
    "multilabel_margin": lambda w, x: (
        (1 - (z := logits(w, x))[:, ::2, None] + z[:, None, 1:2]).clamp(min=0).sum() / (3 * ROWS)
    ),
    "cdist": lambda w, x: distances(hidden(w, x), x["x"][:, :5]).mean(),
    "cdist squared": lambda w, x: distances(hidden(w, x), w["e"]).square().mean(),
    "cdist of itself": lambda w, x: torch.exp(-((h := hidden(w, x))[:, None] - h).square().sum(-1)).mean(),
    "pdist": lambda w, x: (
        torch.exp(-((h := hidden(w, x))[:, None] - h).square().sum(-1)).triu(1).sum() / (ROWS * (ROWS - 1) / 2)
    ),
    "hardsigmoid": lambda w, x: (maps(w, x) / 6 + 0.5).clamp(0, 1).square().mean(),
    "embedding_bag mean": lambda w, x: w["e"][x["words"]].mean(1).square().mean(),
    "embedding_bag sum": lambda w, x: w["e"][x["words"]].sum(1).square().mean(),
    "prototypes by cdist": lambda w, x: F.cross_entropy(
        -(distances(hidden(w, x), (m := one_hot(x)).T @ hidden(w, x) / m.sum(0)[:, None]) ** 2), x["c"]
    ),
}
"""Of losses that torch does not differentiate twice: the same function, written so that it does."""
