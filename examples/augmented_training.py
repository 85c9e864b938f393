"""A ResNet-18 trained on images that a U-Net augments; the U-Net's weights are the hyperparameters.

    L_T(w, lambda) = cross-entropy of a(x, noise; lambda), with new noise at every step,
    L_V(w, lambda) = cross-entropy of the original validation images + spread * R(lambda).

R comes from the public code; the paper does not mention it: mean |mean_s a_s(x) - x| - mean std_s a_s(x) over samples s
of the noise. Without R the noise has no first-order effect at the identity: the last convolution is zero there, and the
derivative with respect to it sees only the mean of its input, so the U-Net first learns a deterministic change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from examples import models
from examples.image_sets import Batch, ImageSet
from hvp_engine.hypergradients import SGD, Unrolled
from hvp_engine.hypergradients.estimator import Estimate

Trees = dict[str, Tensor]

ROWS = ("none", "fixed noise", "identity", "3 Neumann terms", "3 Neumann products", "3 unrolled", "3 CG products")
"""How hypergradients are computed; two rows tune nothing: the plain image, and fixed noise (not in the paper).

The paper's "3 Neumann" and "3 unrolled" are not comparable: Algorithm 3 makes 3 products, which are 4 terms of the
series, whereas 3 unrolled steps are 3 terms. "3 Neumann terms" and "3 unrolled" both have 3 terms and the same step
size; "3 Neumann products" is Algorithm 3 to the letter. The identity is the first term, so all rows but CG have the
same scale.
"""

WAYS = ("clean", "averaged")


@dataclass(frozen=True)
class Recipe:
    """The optimizers and learning rates of a recipe.

    Arguments:
        weight_optimizer: "Adam", or "SGD" with Nesterov's momentum 0.9 and weight decay 5e-4.
        weight_rate: its learning rate.
        cuts: fractions of the training steps after which the weights' learning rate is divided by 5.
        hyper_rate: learning rate of RMSprop, whose first step is ten times as long. At the paper's 1e-2 the small size
            has saturated the tanh within ten hyper steps, for good: a constant shift of 1, and no hypergradient.
        step_size: of the Neumann series and the unrolled steps.
        spread: the weight of R in the validation loss.
    """

    weight_optimizer: str
    weight_rate: float
    hyper_rate: float
    step_size: float
    cuts: tuple[float, ...] = ()
    spread: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Arguments:
        recipes: by the name of `--recipe`.
        hyper_steps, inner_steps, warmup_steps: as for `hvp.Tuner`.
        train, validation: images; None is what the other leaves.
        width, stem_stride: of the ResNet-18.
        batch, validation_batch: images of a batch.
        seeds: runs of each row.
        samples: augmentations of an image for R and for mean predictions.
        noise: standard deviation of the fixed noise, in those of the pixels.
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
    rows: tuple[str, ...] = ROWS
    warmup_steps: int = 0
    noise: float = 0.5
    spread_images: int = 32
    samples: int = 5
    scored: int = 1000
    tested: int = 10_000
    watched: int = 500
    evaluations: int = 10
    checkpoint_every: int = 20


class FixedNoise(nn.Module):
    """Used instead of the U-Net: adds the noise, times `amount`, to all colours."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.amount * x[:, 3:]


class Augmentation:
    """A ResNet-18 trained on images that a U-Net augments; `row` says how the U-Net is tuned."""

    def __init__(self, settings: Settings, recipe: Recipe, images: ImageSet, device: torch.device, row: str):
        self.settings, self.recipe, self.row = settings, recipe, row
        self.module = models.resnet18(images.shape, images.classes, settings.width, settings.stem_stride).to(device)
        unet = models.UNet()  # in every row, for the same random numbers afterwards
        self.unet = (FixedNoise(settings.noise) if row == "fixed noise" else unet).to(device)
        self.plain = images.train[0][: settings.scored]
        self.classify, self.augment = hvp.functional(self.module), hvp.functional(self.unet)

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

    def untuned(self, weights: Trees, augmentation: Trees, train_batch: Batch, val_batch: Batch) -> Estimate:
        """The two losses, and a hypergradient of zero."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            loss = self.train_loss(leaves, augmentation, train_batch)
            gradient = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.stack([part.double().norm() for part in gradient]).norm()
        with torch.no_grad():
            val_loss = self.val_loss(weights, augmentation, val_batch)
        return Estimate({name: torch.zeros_like(h) for name, h in augmentation.items()}, loss.detach(), val_loss, norm)

    def tuner(self) -> hvp.Tuner:
        """Algorithm 1 with the row's hypergradients."""
        settings, recipe = self.settings, self.recipe
        steps = settings.warmup_steps + settings.inner_steps * settings.hyper_steps
        cuts = [round(cut * steps) for cut in recipe.cuts]
        return hvp.Tuner(
            self.module,
            self.unet,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: weight_optimizer(recipe, tensors),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=recipe.hyper_rate),
            weight_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, cuts, gamma=0.2),
            inner_steps=settings.inner_steps,
            warmup_steps=settings.warmup_steps,
            **self._approximation(),
        )

    def _approximation(self) -> dict[str, Any]:
        size = self.recipe.step_size
        if self.row in ("none", "fixed noise"):
            return {"estimator": self.untuned}
        if self.row == "3 unrolled":
            return {"estimator": Unrolled(self.train_loss, self.val_loss, 3, SGD(size))}
        solvers = {
            "identity": hvp.Neumann(0, size),
            "3 Neumann terms": hvp.Neumann(2, size),
            "3 Neumann products": hvp.Neumann(3, size),
            "3 CG products": hvp.ConjugateGradient(3),
        }
        return {"solver": solvers[self.row]}

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

    def progress(self, part: Batch) -> dict[str, float]:
        """What the curves show: scores of plain predictions, and what the augmentation does."""
        few = part[0][: self.settings.spread_images]
        shift, deviation = moments(self.samples(few, self.settings.samples), few)
        return self.scores(part, ["clean"]) | {"shift": float(shift), "deviation": float(deviation)}

    @torch.no_grad()
    def samples(self, images: Tensor, count: int) -> Tensor:
        """`count` augmentations of each image: (count, N, 3, H, W)."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.stack([self.unet(with_noise(images)) for _ in range(count)])


def with_noise(images: Tensor) -> Tensor:
    """The images with a channel of standard normal noise after the colours."""
    return torch.cat([images, torch.randn_like(images[:, :1])], 1)


def moments(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean change and standard deviation of samples (S, N, 3, H, W) of images (N, 3, H, W)."""
    shift = (samples.mean(0) - images).abs().mean()
    return shift, (samples.var(0) + 1e-12).sqrt().mean()


def weight_optimizer(recipe: Recipe, tensors: list[Tensor]) -> torch.optim.Optimizer:
    if recipe.weight_optimizer == "Adam":
        return torch.optim.Adam(tensors, lr=recipe.weight_rate)
    return torch.optim.SGD(tensors, lr=recipe.weight_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
