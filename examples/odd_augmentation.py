"""Learned augmentation (Fig. 7, Table 3) where there is something to learn: few images, a residual odd in the noise.

The U-Net of augmentation.py learns deterministic changes first, since noise has no effect of first order where it
starts. Here the residual is x + tanh((u(x, e) - u(x, -e)) / 2), of mean zero for every pixel, and starts so that noise
moves a pixel by 0.3 standard deviations. All that tuning can learn is where and how much to disturb an image. The rows
beside it say what that is worth: the start itself, fixed noise of three amounts, random shifts, training on the
validation labels too; and every tuned row is trained again from scratch with its final augmentation.

Rates, amounts and bounds were fixed beforehand. What is chosen (the amount of fixed noise, when to stop) is chosen on
validation images that nothing else uses; nothing is chosen on test images.
"""

from __future__ import annotations

from dataclasses import replace

from examples import augmentation
from examples.augmented_training import Recipe, Settings
from examples.experiment import Experiment

_BESIDE = (
    "none",
    "fixed noise of 0.3",
    "fixed noise",
    "fixed noise of 1",
    "random shifts",
    "validation labels too",
    "odd, not tuned",
    "odd, T1-T2",
)

_MNIST = Settings(
    recipes={"": Recipe("Adam", 2e-3, 3e-3, 0.1, falls=True, hyper_optimizer="Adam")},
    hyper_steps=300,
    inner_steps=3,
    train=100,
    validation=2000,
    held_back=1000,
    network="CNN",
    width=16,
    stem_stride=1,
    halved=True,
    batch=50,
    validation_batch=200,
    seeds=7,
    rows=(*_BESIDE, "identity"),
    retrained=True,
    watched=1000,
    samples=3,
    tested=5000,
    evaluations=6,
)
"""Digits of 14 x 14 pixels."""

_CIFAR10 = replace(
    _MNIST,
    hyper_steps=100,
    train=500,
    network="ResNet-18",
    width=8,
    shift=2,
    seeds=2,
    validation_batch=100,
    rows=(
        "none",
        "fixed noise",
        "random shifts",
        "odd, not tuned",
        "odd, T1-T2",
        "odd, 3 Neumann terms",
        "odd, 3 CG products",
    ),
    tested=2000,
)
"""Pictures of 16 x 16 pixels, so that the network needs no stride in its stem to be as fast as in augmentation.py."""

EXPERIMENT = Experiment(
    name="odd_augmentation",
    source="Fig. 7, Tab. 3",
    title="augmentation by a network that is odd in its noise, of few images",
    run=augmentation.run,
    sizes={
        "small": {"mnist": _MNIST, "cifar10": _CIFAR10},
        "paper": {
            "mnist": replace(_MNIST, seeds=20),
            "cifar10": replace(
                _CIFAR10,
                hyper_steps=2000,
                train=5000,
                validation=5000,
                held_back=5000,
                width=64,
                halved=False,
                shift=4,
                seeds=3,
                rows=(*_BESIDE, "odd, 3 Neumann terms", "odd, 3 CG products", "identity"),
                tested=10_000,
            ),
        },
    },
    datasets=("mnist", "cifar10"),
)
