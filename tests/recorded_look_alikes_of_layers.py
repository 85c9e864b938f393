"""Losses, layers and rearrangements that look alike: more of `recorded_look_alikes`."""

from __future__ import annotations

import torch
from recorded_look_alikes import LOOK_ALIKES
from torch.nn import functional as F

LOOK_ALIKES |= {
    "huber": (lambda x, p: F.huber_loss(x**2, x.detach(), delta=p), [0.5, 2.0]),
    "smooth_l1": (lambda x, p: F.smooth_l1_loss(x**2, x.detach(), beta=p), [0.5, 2.0]),
    "reduction": (lambda x, p: F.mse_loss(x**2, x.detach(), reduction=p), ["mean", "sum"]),
    "cross-entropy, ignored class": (
        lambda x, p: F.cross_entropy(x**2, torch.tensor([0, 1, 2, 3]), ignore_index=p),
        [0, 1],
    ),
    "cross-entropy, smoothing": (
        lambda x, p: F.cross_entropy(x**2, torch.tensor([0, 1, 2, 3]), label_smoothing=p),
        [0.1, 0.2],
    ),
    "cross-entropy, reduction": (
        lambda x, p: F.cross_entropy(x**2, torch.tensor([0, 1, 2, 3]), reduction=p),
        ["mean", "sum"],
    ),
    "bce": (lambda x, p: F.binary_cross_entropy_with_logits(x**2, torch.full((4, 4), p)), [0.2, 0.7]),
    "kl": (lambda x, p: F.kl_div(x.log_softmax(1), torch.ones(4, 4) / 4, log_target=p), [False, True]),
    "layernorm": (lambda x, p: F.layer_norm(x, (4,), eps=p) ** 3, [0.01, 1.0]),
    "groupnorm": (lambda x, p: F.group_norm(x.view(1, 4, 4), p) ** 3, [1, 2]),
    "batchnorm": (lambda x, p: F.batch_norm(x, None, None, training=True, eps=p) ** 3, [0.01, 1.0]),
    "batchnorm, evaluation": (lambda x, p: F.batch_norm(x**2, torch.full((4,), p), torch.ones(4)) ** 3, [0.0, 1.0]),
    "convolution, stride": (
        lambda x, p: F.conv2d(x.view(1, 1, 4, 4) ** 2, x[:2, :2].reshape(1, 1, 2, 2), stride=p)[..., 0, 0],
        [1, 2],
    ),
    "convolution, scaled": (
        lambda x, p: F.conv2d(x.view(1, 1, 4, 4) ** 2, x[:3, :3].reshape(1, 1, 3, 3), padding=1, dilation=1) * p,
        [1, 2],
    ),
    "convolution, dilation": (
        lambda x, p: F.conv1d(x.view(1, 1, 16), x.view(-1)[:3].view(1, 1, 3), padding=p, dilation=p) ** 2,
        [1, 2],
    ),
    "convolution, groups": (lambda x, p: F.conv1d(x.view(1, 2, 8), torch.ones(2, 2 // p, 3), groups=p) ** 3, [1, 2]),
    "maxpool": (lambda x, p: F.max_pool2d(x.view(1, 1, 4, 4) ** 2, 2, stride=1, padding=p)[..., :2, :2].exp(), [0, 1]),
    "avgpool": (lambda x, p: F.avg_pool2d(x.view(1, 1, 4, 4) ** 2, 3, 1, 1, count_include_pad=p).exp(), [True, False]),
    "pooling, ceil": (lambda x, p: F.avg_pool1d(x.view(1, 1, 16) ** 2, 3, 3, ceil_mode=p).exp().sum(), [True, False]),
    "interpolate": (
        lambda x, p: F.interpolate(x.view(1, 1, 4, 4) ** 2, scale_factor=2, mode="bilinear", align_corners=p).exp(),
        [True, False],
    ),
    "pad": (lambda x, p: F.pad(x**2, (p, 2 - p)).exp() * torch.arange(24.0).view(4, 6), [0, 1, 2]),
    "padding mode": (
        lambda x, p: F.pad(x.view(1, 4, 4) ** 2, (1, 1), mode=p).exp(),
        ["reflect", "replicate", "circular"],
    ),
    "pixel_shuffle": (
        lambda x, p: (
            (F.pixel_shuffle(x.view(1, 4, 2, 2), 2) if p else x.view(1, 1, 4, 4)).sin() * torch.arange(16.0).view(4, 4)
        ),
        [0, 1],
    ),
    "unfold": (lambda x, p: F.unfold(x.view(1, 1, 4, 4) ** 2, 2, dilation=p, padding=p - 1).exp(), [1, 2]),
    "Tensor.unfold": (lambda x, p: x.view(-1).unfold(0, 4, p)[:3].exp(), [2, 4]),
    "einsum": (lambda x, p: torch.einsum(p, x, x.sin()), ["ij,jk->ik", "ij,kj->ik", "ji,jk->ik"]),
    "transposed factor": (lambda x, p: x @ (x.t() if p else x), [0, 1]),
    "baddbmm": (
        lambda x, p: torch.baddbmm(x.view(1, 4, 4), x.view(1, 4, 4), x.view(1, 4, 4).sin(), beta=p, alpha=2),
        [1.0, 2.0],
    ),
    "addmm": (lambda x, p: torch.addmm(x, x.sin(), x, alpha=p), [1.0, 2.0]),
    "addcmul": (lambda x, p: torch.addcmul(x, x, x.sin(), value=p), [1.0, 2.0]),
    "addcdiv": (lambda x, p: torch.addcdiv(x, x, x.exp(), value=p), [1.0, 2.0]),
    "lerp": (lambda x, p: torch.lerp(x**2, x.sin(), p), [0.2, 0.5]),
    "where": (lambda x, p: torch.where(torch.arange(16).view(4, 4) % p == 0, x**3, x.exp()), [2, 3]),
    "masked_fill": (lambda x, p: x.masked_fill(torch.eye(4) > 0, p) ** 3, [1.0, 2.0]),
    "cat": (lambda x, p: torch.cat([x, x**2], p).sin().sum(0)[:4], [0, 1]),
    "order in cat": (
        lambda x, p: torch.cat([x, x**2] if p else [x**2, x]).sin() * torch.arange(32.0).view(8, 4),
        [0, 1],
    ),
    "stack": (
        lambda x, p: torch.stack([x, x**2], p).sin()[0] * torch.arange(16.0).view(4, 4)[:, :].reshape(-1)[:1],
        [0, 1],
    ),
    "split": (lambda x, p: x.split([p, 4 - p])[0][:1].exp(), [1, 2]),
    "chunk": (lambda x, p: x.chunk(2, p)[0].exp().sum(), [0, 1]),
    "repeat": (
        lambda x, p: (x[:2].repeat(2, 1) if p else x[:2].repeat_interleave(2, 0)).exp() * torch.arange(16.0).view(4, 4),
        [0, 1],
    ),
    "expand": (lambda x, p: (x[:1].expand(4, 4) if p else x[:, :1].expand(4, 4)).exp() * x, [0, 1]),
    "topk": (lambda x, p: x.topk(2, p).values.exp().sum(), [0, 1]),
    "sort": (lambda x, p: x.sort(descending=p).values.exp() * torch.arange(16.0).view(4, 4), [False, True]),
    "kthvalue": (lambda x, p: x.kthvalue(p).values.exp(), [1, 2]),
    "scatter": (
        lambda x, p: torch.zeros(4, 4).scatter(p, torch.tensor([[0, 1, 2, 3]] * 4) * 0 + torch.arange(4), x.exp()) ** 2,
        [0, 1],
    ),
    "indexadd": (
        lambda x, p: torch.zeros(4, 4).index_add(0, torch.tensor([0, 1, 1, 2]), x.exp(), alpha=p) ** 2,
        [1, 2],
    ),
    "embedding, padding": (lambda x, p: F.embedding(torch.tensor([0, 1, 2]), x**2, padding_idx=p).exp(), [0, 1]),
    "embedding, frequencies": (
        lambda x, p: F.embedding(torch.tensor([0, 1, 1]), x**2, scale_grad_by_freq=p).exp(),
        [False, True],
    ),
    "cdist": (lambda x, p: torch.cdist(x, x[:2] * 2 + 1, p=p) ** 2, [1.0, 3.0]),
    "pairwise_distance": (lambda x, p: F.pairwise_distance(x, x**2 + 1, p=p), [2.0, 3.0]),
    "cosine_similarity": (lambda x, p: F.cosine_similarity(x, x**2 + 1, dim=p), [0, 1]),
    "renorm": (lambda x, p: torch.renorm(x**2, 2, 0, p) ** 2, [0.5, 1.0]),
    "logit": (lambda x, p: torch.logit(torch.sigmoid(x), eps=p) ** 2, [0.001, 0.2]),
    "nan_to_num": (lambda x, p: torch.nan_to_num(x**3, p), [0.0, 1.0]),
    "xlogy": (lambda x, p: torch.xlogy(x**2 + 1, x**2 + p), [1.0, 2.0]),
    "atan2": (lambda x, p: torch.atan2(x, x**2 + p), [1.0, 2.0]),
    "fft": (lambda x, p: torch.fft.fft(x, dim=p).abs() ** 3, [0, 1]),
    "fft, norm": (lambda x, p: torch.fft.rfft(x, norm=p).abs() ** 3, ["ortho", "backward"]),
    "solve": (lambda x, p: torch.linalg.solve(x + p * torch.eye(4), x) ** 2, [10.0, 20.0]),
    "cholesky": (lambda x, p: torch.linalg.cholesky(x @ x.t() + p * torch.eye(4)) ** 2, [10.0, 20.0]),
    "inverse": (lambda x, p: torch.linalg.inv(x + p * torch.eye(4)), [10.0, 20.0]),
    "dtype": (lambda x, p: (x.to(p) ** 3).double(), [torch.float32, torch.float64]),
    "glu": (lambda x, p: F.glu(x, p) ** 2, [0, 1]),
    "cumprod": (lambda x, p: x.cumprod(p), [0, 1]),
    "quantile": (lambda x, p: x.quantile(p) ** 3, [0.25, 0.5]),
    "logcumsumexp": (lambda x, p: x.logcumsumexp(p), [0, 1]),
    "dropout, p": (lambda x, p: F.dropout(x**2, p).exp(), [0.2, 0.5]),
    "unbind": (lambda x, p: x.unbind(p)[0].exp(), [0, 1]),
    "moveaxis": (lambda x, p: (x.movedim(0, p) * x).exp(), [0, 1]),
    "as_strided": (lambda x, p: torch.as_strided(x**2, (2, 2), (4, 1), p).exp(), [0, 1, 5]),
    "sine or cosine": (lambda x, p: x.sin() if p else x.cos(), [0, 1]),
    "detach": (lambda x, p: (x.detach() if p else x) * x**2, [0, 1]),
    "grid_sample": (
        lambda x, p: F.grid_sample(
            x.view(1, 1, 4, 4) ** 2, torch.linspace(-1.3, 1.2, 18).view(1, 3, 3, 2), padding_mode=p, align_corners=False
        ).exp(),
        ["zeros", "border", "reflection"],
    ),
}
