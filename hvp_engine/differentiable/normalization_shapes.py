"""Which numbers share statistics in each kind of normalization, and how they lie in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["batch_norm", "group_norm", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class NormalizedShape:
    """`samples` of `images` of `channels` x `points`; statistics are those of a sample's `groups` of channels.

    A batch of shape (N, C, H, W) has one sample of N images in batch normalization, and C groups; N samples of one
    image in group normalization. A row is a sample of one image of one point.

    Attributes:
        rows: whether it is layer or root-mean-square normalization. centred: whether a mean is subtracted.
        channels_last: the channels of a point lie together.
    """

    rows: bool
    centred: bool
    channels_last: bool
    samples: int
    images: int
    channels: int
    points: int
    groups: int

    @property
    def count(self) -> int:
        """Numbers that share statistics."""
        return self.images * self.points * (self.channels // self.groups)


class Known(NamedTuple):
    """What a value was computed from, and its statistics: what its derivatives take beside gradients."""

    input: Tensor
    weight: Tensor | None
    mean: Tensor
    variance: Tensor
    size: int
    eps: float


class Tangents(NamedTuple):
    """The gradients of a first derivative's results."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


def keeps_channels_last(kind: Kind, input: Tensor) -> bool:
    """Whether the channels of a point lie together, those of an image do not, and results are to lie alike."""
    if kind in ("layer_norm", "rms_norm") or input.dim() < 3 or input.is_contiguous():
        return False
    return input.movedim(1, -1).is_contiguous()


def normalized_shape(kind: Kind, input: Tensor, size: int) -> NormalizedShape:
    """The shape of an input, dense or channels-last; `size` is the number of groups, or of dimensions of a row."""
    shape = tuple(input.shape)
    if kind in ("layer_norm", "rms_norm"):
        samples, channels = math.prod(shape[: len(shape) - size]), math.prod(shape[len(shape) - size :])
        return NormalizedShape(True, kind == "layer_norm", False, samples, 1, channels, 1, 1)
    count, channels, points, last = shape[0], shape[1], math.prod(shape[2:]), keeps_channels_last(kind, input)
    if kind == "group_norm":
        return NormalizedShape(False, True, last, count, 1, channels, points, size)
    if last or len(shape) == 2:  # one long image
        return NormalizedShape(False, True, True, 1, 1, channels, count * points, channels)
    return NormalizedShape(False, True, False, 1, count, channels, points, channels)


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """`tensor` with its numbers in this order in memory, copied if they are in another one."""
    if not channels_last:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
