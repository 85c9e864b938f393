"""A discrete choice, relaxed: at which resolution a classifier should see its images.

    python examples/relaxed_choice.py [--examples 200] [--hyper-steps 200] [--seed 0]

A choice among five resolutions has no gradient, but its relaxation has one: the classifier sees sum_k p_k x_k with p =
softmax(c), where x_k is the image at resolution k, and the logits c are tuned like any hyperparameters (section 4.3 of
the paper). A mixture is not a choice, so the validation loss also contains the entropy of p. It depends on the
hyperparameters directly, so the hypergradient has both of its terms. At the end the most likely resolution is chosen,
and compared with training at each of them.
"""

import argparse
import math

import torch
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

import hvp_engine as hvp
from hvp_engine.demo.images import digits

BLOCKS = (1, 2, 4, 7, 14)
"""Side lengths of the squares of pixels that are averaged."""
NOISE = 1.5
LOG_DECAY = -4.0
ENTROPY = 0.2
"""The weight of the entropy in the validation loss."""


def load(examples, seed):
    """Noisy images of the training, validation and test set, at each resolution, and labels: [(k, n, 784), (n,)]."""
    generator = torch.Generator().manual_seed(seed)
    mnist = digits()
    order = torch.randperm(len(mnist), generator=generator)
    x = (mnist.images[order] - mnist.images.mean()) / mnist.images.std()
    x = x + NOISE * torch.randn(x.shape, generator=generator)
    views = torch.stack([interpolate(avg_pool2d(x, block), 28).flatten(1) for block in BLOCKS])
    views = views / views.std((1, 2), keepdim=True)  # else the finest resolution, with the most noise, is the largest
    labels = mnist.labels[order]
    parts = (slice(0, examples), slice(examples, examples + 1000), slice(examples + 1000, examples + 3000))
    return [(views[:, part], labels[part]) for part in parts]


def cross_entropy_of(weights, choice, batch):
    views, labels = batch
    x = torch.einsum("k,kni->ni", choice.softmax(0), views)
    return cross_entropy(x @ weights["w"] + weights["b"], labels)


def train_loss(weights, choice, batch):
    return cross_entropy_of(weights, choice, batch) + math.exp(LOG_DECAY) * weights["w"].square().sum() / 2


def val_loss(weights, choice, batch):
    return cross_entropy_of(weights, choice, batch) + ENTROPY * torch.special.entr(choice.softmax(0)).sum()


def tune(train, validation, hyper_steps, choice):
    """Train while tuning `choice` for `hyper_steps`; return the weights."""
    weights = {"w": torch.zeros(784, 10), "b": torch.zeros(10)}
    tuner = hvp.Tuner(
        weights,
        choice,
        train_loss,
        val_loss,
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-2),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=5e-2),
        solver=hvp.ConjugateGradient(10),
        inner_steps=5,
        warmup_steps=100,
    )
    tuner.fit([train], [validation], hyper_steps, progress=False)
    if not hyper_steps:
        tuner.train([train], 300, progress=False)
    return weights


def run(examples=200, hyper_steps=200, seed=0):
    """For each resolution: its block, its share in the relaxation, and the validation loss and test accuracy with it
    alone."""
    train, validation, test = load(examples, seed)
    choice = torch.zeros(len(BLOCKS))
    tune(train, validation, hyper_steps, choice)
    rows = []
    for number, block in enumerate(BLOCKS):
        taken = torch.full((len(BLOCKS),), -torch.inf)
        taken[number] = 0.0
        weights = tune(train, validation, 0, taken)
        loss = float(cross_entropy_of(weights, taken, validation))
        right = (test[0][number] @ weights["w"] + weights["b"]).argmax(1).eq(test[1]).double().mean()
        rows.append((block, float(choice.softmax(0)[number]), loss, float(right)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="digits for training, at most 2,000")
    parser.add_argument("--hyper-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'pixels averaged':<16}{'share in the relaxed choice':>28}{'validation loss':>17}{'test accuracy':>15}")
    for block, share, loss, accuracy in rows:
        print(f"{f'{block} x {block}':<16}{share:>28.1%}{loss:>17.4f}{accuracy:>15.1%}")
    taken = max(rows, key=lambda row: row[1])
    print(f"taken: {taken[0]} x {taken[0]}")


if __name__ == "__main__":
    main()
