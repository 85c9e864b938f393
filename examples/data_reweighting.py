"""Learning a weight for each training example when many labels are wrong and a small validation set is clean.

    python examples/data_reweighting.py [--examples 1000] [--wrong 0.4] [--hyper-steps 150] [--seed 0]

The training loss is sum(sigmoid(h_i) * loss_i) / n: one hyperparameter for each example, found by Algorithm 1.
"""

import argparse

import torch
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from hvp_engine.demo.images import digits

DECAY = 0.02


def load(examples, wrong, seed):
    """Training, validation and test set as (x, labels), and which training labels were replaced by another class."""
    generator = torch.Generator().manual_seed(seed)
    mnist = digits()
    order = torch.randperm(len(mnist), generator=generator)
    x, labels = avg_pool2d(mnist.images[order], 2).flatten(1), mnist.labels[order].clone()
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], 1)
    corrupted = torch.rand(examples, generator=generator) < wrong
    shift = torch.randint(1, 10, (examples,), generator=generator)
    labels[:examples] = (labels[:examples] + corrupted * shift) % 10
    parts = (slice(0, examples), slice(examples, examples + 300), slice(examples + 300, examples + 2300))
    return [(x[part], labels[part]) for part in parts], corrupted


def train_loss(weights, hyper, batch):
    x, labels = batch
    losses = cross_entropy(x @ weights, labels, reduction="none")
    return (torch.sigmoid(hyper) * losses).mean() + DECAY * weights.square().sum() / 2


def val_loss(weights, hyper, batch):
    x, labels = batch
    return cross_entropy(x @ weights, labels)


def fit(weights, hyper, batch, steps=200):
    """The weights, trained further with these hyperparameters."""
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = train_loss(weights, hyper, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def run(examples=1000, wrong=0.4, hyper_steps=150, seed=0):
    """For each method: its test accuracy, and the mean weight that it gives to right and to wrong training labels."""
    (train, validation, test), corrupted = load(examples, wrong, seed)

    def accuracy(weights):
        return float((test[0] @ weights).argmax(1).eq(test[1]).double().mean())

    plain = fit(torch.zeros(train[0].shape[1], 10), torch.zeros(examples), train)
    weights, hyper = plain.clone(), torch.zeros(examples)
    tuner = hvp.Tuner(
        weights,
        hyper,
        train_loss,
        val_loss,
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=3e-2),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1),
        solver=hvp.Neumann(10),
        inner_steps=5,
    )
    tuner.fit([train], [validation], hyper_steps, progress=False)
    only_right = fit(plain, torch.where(corrupted, -30.0, 30.0), train)
    only_validation = fit(plain, torch.zeros(len(validation[1])), validation)
    learned = torch.sigmoid(hyper)
    return [
        ("all weights 1/2", accuracy(plain), 0.5, 0.5),
        ("validation set alone", accuracy(only_validation), None, None),
        ("learned weights", accuracy(weights), float(learned[~corrupted].mean()), float(learned[corrupted].mean())),
        ("wrong labels known", accuracy(only_right), 1.0, 0.0),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="digits for training, at most 2,700")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of training labels that are wrong")
    parser.add_argument("--hyper-steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'method':<24}{'test accuracy':>15}{'weight if right':>17}{'weight if wrong':>17}")
    for name, accuracy, right, wrong in rows:
        weights = "" if right is None else f"{right:>17.2f}{wrong:>17.2f}"
        print(f"{name:<24}{accuracy:>15.1%}{weights}")


if __name__ == "__main__":
    main()
