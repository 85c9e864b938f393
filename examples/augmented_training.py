"""A network trained on images that a U-Net augments; the U-Net's weights are the hyperparameters.

    L_T(w, lambda) = cross-entropy of a(x, noise; lambda), with new noise at every step,
    L_V(w, lambda) = cross-entropy of the original validation images + spread * R(lambda).

R comes from the public code; the paper does not mention it: mean |mean_s a_s(x) - x| - mean std_s a_s(x) over samples s
of the noise. Without R the noise has no first-order effect at the identity: the last convolution is zero there, and the
derivative with respect to it sees only the mean of its input, so the U-Net first learns a deterministic change. A U-Net
whose residual is odd in the noise cannot learn one; it starts with a noise that is felt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from examples import augmentations, models
from examples.augmentations import moments, with_noise
from examples.image_sets import Batch, ImageSet
from examples.training import NoTuning, last_quarter
from hvp_engine.hypergradients import SGD, Unrolled
from hvp_engine.solvers import Solver

Trees = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """How the training images of a row of the table are changed, and how that is tuned.

    Arguments:
        augmentation: "noise", "shifts", "U-Net" or "odd U-Net".
        approximation: of the hypergradient, a key of `SOLVERS` or "3 unrolled"; empty if nothing is tuned.
        amount: of noise, in standard deviations of the pixels; at 0 the images stay as they are.
        everything: train on the validation images too, which the tuned rows use in another way.
    """

    augmentation: str = "noise"
    approximation: str = ""
    amount: float = 0.0
    everything: bool = False


ROWS: dict[str, Row] = {
    "none": Row(),
    "fixed noise of 0.3": Row(amount=0.3),
    "fixed noise": Row(amount=0.5),
    "fixed noise of 1": Row(amount=1.0),
    "random shifts": Row("shifts"),
    "validation labels too": Row(everything=True),
    "odd, not tuned": Row("odd U-Net"),
    "odd, T1-T2": Row("odd U-Net", "identity"),
    "odd, 3 Neumann terms": Row("odd U-Net", "3 Neumann terms"),
    "odd, 3 CG products": Row("odd U-Net", "3 CG products"),
} | {
    name: Row("U-Net", name)
    for name in ("identity", "3 Neumann terms", "3 Neumann products", "3 unrolled", "3 CG products")
}
"""The first six and the odd U-Net are not in the paper, but for "none".

The paper's "3 Neumann" and "3 unrolled" are not comparable: Algorithm 3 makes 3 products, which are 4 terms of the
series, whereas 3 unrolled steps are 3 terms. "3 Neumann terms" and "3 unrolled" both have 3 terms and the same step
size; "3 Neumann products" is Algorithm 3 to the letter. The identity (T1-T2) is the first term, so all rows but CG have
the same scale.
"""

SOLVERS: dict[str, Callable[[float], Solver]] = {
    "identity": lambda size: hvp.Neumann(0, size),
    "3 Neumann terms": lambda size: hvp.Neumann(2, size),
    "3 Neumann products": lambda size: hvp.Neumann(3, size),
    "3 CG products": lambda size: hvp.ConjugateGradient(3),
}
"""By the step size."""

NETWORKS: dict[str, Callable[[ImageSet, Settings], nn.Module]] = {
    "ResNet-18": lambda images, settings: models.resnet18(
        images.shape, images.classes, settings.width, settings.stem_stride
    ),
    "CNN": lambda images, settings: models.small_cnn(images.shape, images.classes, settings.width),
}

PAPER_ROWS = (
    "none",
    "fixed noise",
    "identity",
    "3 Neumann terms",
    "3 Neumann products",
    "3 unrolled",
    "3 CG products",
)

WAYS = ("clean", "averaged")


@dataclass(frozen=True)
class Recipe:
    """The optimizers and learning rates of a recipe.

    Arguments:
        weight_optimizer: "Adam", or "SGD" with Nesterov's momentum 0.9 and weight decay 5e-4.
        weight_rate: its learning rate.
        cuts: fractions of the training steps after which the weights' learning rate is divided by 5; without any it
            falls linearly in the last quarter, if `falls`.
        hyper_optimizer: "RMSprop" or "Adam".
        hyper_rate: its learning rate. RMSprop's first step is ten times as long: at the paper's 1e-2 the small size has
            saturated the tanh within ten hyper steps, for good: a constant shift of 1, and no hypergradient.
        step_size: of the Neumann series and the unrolled steps.
        spread: the weight of R in the validation loss.
    """

    weight_optimizer: str
    weight_rate: float
    hyper_rate: float
    step_size: float
    cuts: tuple[float, ...] = ()
    falls: bool = False
    hyper_optimizer: str = "RMSprop"
    spread: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Arguments:
        recipes: by the name of `--recipe`.
        hyper_steps, inner_steps, warmup_steps: as for `hvp.Tuner`.
        train, validation: images; None is what the other leaves.
        network: a key of `NETWORKS`.
        width, stem_stride: of the network.
        halved: whether images are halved in height and width.
        held_back: validation images that are not tuned on: on them everything is chosen and, instead of the others,
            scored. None by default: the paper has validation accuracies of images that are tuned on.
        retrained: whether each tuned row is trained again from scratch with its final augmentation.
        batch, validation_batch: images of a batch.
        seeds: runs of each row.
        samples: augmentations of an image for R and for mean predictions.
        deviation: by which noise moves a pixel at the start of the odd U-Net, in standard deviations of the pixels.
        shift: largest random shift, in pixels; images in colour are also mirrored.
        spread_images: of a validation batch for R.
        watched, scored, tested: at most so many validation images in curves and in the table, and test images; the
            statistics of plain images are taken of at most `scored`.
    """

    recipes: Mapping[str, Recipe]
    hyper_steps: int
    inner_steps: int
    train: int | None
    validation: int | None
    width: int
    stem_stride: int
    batch: int
    validation_batch: int
    seeds: int = 3
    rows: tuple[str, ...] = PAPER_ROWS
    warmup_steps: int = 0
    network: str = "ResNet-18"
    halved: bool = False
    held_back: int = 0
    retrained: bool = False
    deviation: float = 0.3
    shift: int = 1
    spread_images: int = 32
    samples: int = 5
    scored: int = 1000
    tested: int = 10_000
    watched: int = 500
    evaluations: int = 10
    checkpoint_every: int = 20


class Augmentation:
    """A network trained on images that `unet` augments; `row`, a key of `ROWS`, says what that is and how it is tuned.

    Attributes:
        hyper: what is tuned: the U-Net, or a number that nothing depends on.
    """

    def __init__(self, settings: Settings, recipe: Recipe, images: ImageSet, device: torch.device, row: str):
        self.settings, self.recipe, self.row = settings, recipe, ROWS[row]
        self.module = NETWORKS[settings.network](images, settings).to(device)
        self.plain = images.train[0][: settings.scored]
        self.unet = self._augmentation().to(device)
        self.classify = hvp.functional(self.module)
        tuned = bool(self.row.approximation)
        self.hyper: Any = self.unet if tuned else {"nothing": torch.zeros((), device=device)}
        functional = hvp.functional(self.unet) if tuned else lambda hyper, x: self.unet(x)
        self.augment: Callable[[Trees, Tensor], Tensor] = functional
        self.unet.requires_grad_(tuned)

    def _augmentation(self) -> nn.Module:
        if self.row.augmentation == "noise":
            return augmentations.FixedNoise(self.row.amount)
        if self.row.augmentation == "shifts":
            return augmentations.Shifts(self.settings.shift)
        if self.row.augmentation == "U-Net":
            return augmentations.UNet(self.plain.shape[1])
        return augmentations.OddUNet(with_noise(self.plain), self.settings.deviation)

    def train_loss(self, weights: Trees, augmentation: Trees, batch: Batch) -> Tensor:
        """Cross-entropy of augmented images."""
        images, labels = batch
        return F.cross_entropy(self.classify(weights, self.augment(augmentation, with_noise(images))), labels)

    def val_loss(self, weights: Trees, augmentation: Trees, batch: Batch) -> Tensor:
        """Cross-entropy of the original images, with R of the first few."""
        loss = F.cross_entropy(self.classify(weights, batch[0]), batch[1])
        if not self.recipe.spread:
            return loss
        images = batch[0][: self.settings.spread_images]
        copies = with_noise(images.repeat(self.settings.samples, 1, 1, 1))
        samples = self.augment(augmentation, copies).unflatten(0, (-1, len(images)))
        shift, deviation = moments(samples, images)
        return loss + self.recipe.spread * (shift - deviation)

    def tuner(self) -> hvp.Tuner:
        """Algorithm 1 with the row's hypergradients."""
        settings, recipe = self.settings, self.recipe
        steps = settings.warmup_steps + settings.inner_steps * settings.hyper_steps
        cuts = [round(cut * steps) for cut in recipe.cuts]
        multistep = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=cuts, gamma=0.2)
        return hvp.Tuner(
            self.module,
            self.hyper,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: weight_optimizer(recipe, tensors),
            hyper_optimizer=lambda tensors: getattr(torch.optim, recipe.hyper_optimizer)(tensors, lr=recipe.hyper_rate),
            weight_scheduler=last_quarter(steps) if recipe.falls else multistep,
            inner_steps=settings.inner_steps,
            warmup_steps=settings.warmup_steps,
            **self._approximation(),
        )

    def _approximation(self) -> dict[str, Any]:
        name, size = self.row.approximation, self.recipe.step_size
        if not name:
            return {"estimator": NoTuning(self.train_loss, self.val_loss)}
        if name == "3 unrolled":
            return {"estimator": Unrolled(self.train_loss, self.val_loss, 3, SGD(size))}
        return {"solver": SOLVERS[name](size)}

    @torch.no_grad()
    def scores(self, part: Batch, ways: Sequence[str] = WAYS, size: int = 500) -> dict[str, float]:
        """Accuracy and cross-entropy of plain predictions ("clean") and of the mean over augmented images.

        BatchNorm uses the statistics of training images that are treated in the same way. (With the running statistics
        of training, plain predictions are at chance level once the augmentation shifts all images; neither loss shows
        this, since both use batch statistics.)
        """
        found = {f"{way}_{figure}": 0.0 for way in ways for figure in ("accuracy", "loss")}
        for way in ways:
            count = self.settings.samples if way == "averaged" else 0
            network = self.settled(self.samples(self.plain, 1)[0] if count else self.plain, size)
            for images, labels in zip(part[0].split(size), part[1].split(size), strict=True):
                copies = self.samples(images, count) if count else [images]
                predicted = torch.stack([network(treated).softmax(1) for treated in copies]).mean(0)
                found[f"{way}_accuracy"] += int(predicted.argmax(1).eq(labels).sum()) / len(part[1])
                loss = F.nll_loss(predicted.clamp(min=1e-12).log(), labels, reduction="sum")
                found[f"{way}_loss"] += float(loss) / len(part[1])
        return found

    def settled(self, images: Tensor, size: int) -> nn.Module:
        """The ResNet in evaluation mode, with BatchNorm statistics of `images`, taken in batches of `size`."""
        network = copy.deepcopy(self.module)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all batches
        for batch in images.split(size):
            network.train()(batch)
        return network.eval()

    def progress(self, judged: Batch, test: Batch) -> dict[str, float]:
        """What the curves show: scores of plain predictions, what the augmentation does, accuracy on a `test` part."""
        few = judged[0][: self.settings.spread_images]
        shift, deviation = moments(self.samples(few, self.settings.samples), few)
        found = self.scores(judged, ["clean"]) | {"shift": float(shift), "deviation": float(deviation)}
        if len(test[1]):
            found["test_accuracy"] = self.scores(test, ["clean"])["clean_accuracy"]
        return found

    @torch.no_grad()
    def samples(self, images: Tensor, count: int) -> Tensor:
        """`count` augmentations of each image: (count, N, C, H, W)."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.stack([self.unet(with_noise(images)) for _ in range(count)])


def weight_optimizer(recipe: Recipe, tensors: list[Tensor]) -> torch.optim.Optimizer:
    if recipe.weight_optimizer == "Adam":
        return torch.optim.Adam(tensors, lr=recipe.weight_rate)
    return torch.optim.SGD(tensors, lr=recipe.weight_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
