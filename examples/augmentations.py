"""What changes the training images of augmented_training.py: U-Nets, fixed noise, random shifts.

All take images with a channel of noise after the colours, (N, C + 1, H, W), and return images (N, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def with_noise(images: Tensor) -> Tensor:
    """The images with a channel of standard normal noise after the colours."""
    return torch.cat([images, torch.randn_like(images[:, :1])], 1)


def moments(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean change and standard deviation of samples (S, N, C, H, W) of images (N, C, H, W)."""
    shift = (samples.mean(0) - images).abs().mean()
    return shift, (samples.var(0) + 1e-12).sqrt().mean()


def _convolutions(before: int, channels: int) -> nn.Module:
    first, second = nn.Conv2d(before, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class UNet(nn.Module):
    """Images with a channel of noise, (N, C + 1, H, W) with even H and W, to images (N, C, H, W).

    6,659 weights for C = 3. The output is the image plus a residual in [-1, 1]. The last convolution starts at zero, so
    the network starts as the identity.
    """

    def __init__(self, colours: int = 3) -> None:
        super().__init__()
        self.outer, self.inner = _convolutions(colours + 1, 8), _convolutions(8, 16)
        self.up, self.merge = nn.ConvTranspose2d(16, 8, 2, stride=2), _convolutions(16, 8)
        self.residual = nn.Conv2d(8, colours, 1)
        for parameter in self.residual.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1] + torch.tanh(self.unbounded(x))

    def unbounded(self, x: Tensor) -> Tensor:
        """u(x, noise): the residual before tanh."""
        outer = self.outer(x)
        inner = self.inner(F.max_pool2d(outer, 2))
        merged = self.merge(torch.cat([self.up(inner), outer], 1))
        return self.residual(merged)


class OddUNet(UNet):
    """A :class:`UNet` whose residual is odd in the noise e: x + tanh((u(x, e) - u(x, -e)) / 2).

    Whatever its weights, the mean of the residual over the noise is zero for every image and pixel, so it cannot learn
    a deterministic change. It starts so that noise moves a pixel of the images `x`, (N, C + 1, H, W), by `deviation` in
    the mean over pixels and images. At zero the residual has no gradient: it is a saddle.
    """

    def __init__(self, x: Tensor, deviation: float) -> None:
        super().__init__(x.shape[1] - 1)
        self.residual.reset_parameters()
        images, noise = x[:, :-1].cpu(), torch.randn(8, *x[:, -1:].shape)
        with torch.no_grad():
            for _ in range(5):  # tanh makes the deviation less than proportional to the scale
                found = torch.stack([self(torch.cat([images, e], 1)) for e in noise]).std(0).mean()
                self.residual.weight *= deviation / found

    def forward(self, x: Tensor) -> Tensor:
        images, noise = x[:, :-1], x[:, -1:]
        residual = self.unbounded(x) - self.unbounded(torch.cat([images, -noise], 1))
        return images + torch.tanh(residual / 2)


class FixedNoise(nn.Module):
    """Adds the noise, times `amount`, to all colours."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1] + self.amount * x[:, -1:]


class Shifts(nn.Module):
    """Moves each image by up to `shift` pixels in both directions; images in colour are mirrored half of the time.

    What is not a shift is not used: the noise that comes with the images.
    """

    def __init__(self, shift: int):
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        images, (height, width) = x[:, :-1], x.shape[2:]
        padded = F.pad(images, (self.shift,) * 4, value=float(images.min()))
        down, right = torch.randint(2 * self.shift + 1, (2, len(x), 1), device=x.device)
        rows = (down + torch.arange(height, device=x.device))[:, :, None]
        columns = (right + torch.arange(width, device=x.device))[:, None]
        moved = padded[torch.arange(len(x), device=x.device)[:, None, None], :, rows, columns].movedim(3, 1)
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < (0.5 if images.shape[1] == 3 else 0.0)
        return torch.where(mirrored, moved.flip(3), moved)
