"""A learned regularizer: a small network gives each weight a decay that depends on the position of its pixel.

    python examples/learned_regularizer.py [--examples 200] [--hyper-steps 100] [--seed 0]

Logistic regression on few digits, with sum(exp(h(row, column)) * w^2) / 2 added to its training loss, compared with no
decay and with one decay for all weights that is tuned in the same way.
"""

import argparse

import torch
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from hvp_engine.demo.images import digits

SIDE = 14


def load(examples, seed):
    """Training, validation and test set as (x, labels)."""
    generator = torch.Generator().manual_seed(seed)
    mnist = digits()
    order = torch.randperm(len(mnist), generator=generator)
    x, labels = avg_pool2d(mnist.images[order], 28 // SIDE).flatten(1), mnist.labels[order]
    x = (x - x.mean()) / x.std()
    parts = (slice(0, examples), slice(examples, examples + 500), slice(examples + 500, examples + 2500))
    return [(x[part], labels[part]) for part in parts]


def positions():
    """Row, column and distance from the middle of every pixel, and their squares: (pixels, 5)."""
    line = torch.linspace(-1, 1, SIDE)
    row, column = (grid.flatten() for grid in torch.meshgrid(line, line, indexing="ij"))
    return torch.stack([row, column, row**2, column**2, (row**2 + column**2).sqrt()], 1)


class OneDecay(torch.nn.Module):
    """One log-decay for all weights."""

    def __init__(self):
        super().__init__()
        self.log_decay = torch.nn.Parameter(torch.tensor(-4.0))

    def forward(self, where):
        return self.log_decay.expand(len(where), 1)


class DecayByPosition(torch.nn.Module):
    """A network from the position of a pixel to the log-decays of its ten weights, between -7 and -1, initially -4."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(5, 16), torch.nn.Linear(16, 10)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, where):
        return -4 + 3 * torch.tanh(self.out(torch.tanh(self.hidden(where))))


def run(examples=200, hyper_steps=100, seed=0):
    """For each regularizer: hyperparameters, validation loss, test loss and test accuracy."""
    train, validation, test = load(examples, seed)
    where = positions()
    rows = []
    for name, make in (("none", None), ("one decay", OneDecay), ("learned by position", DecayByPosition)):
        torch.manual_seed(seed)
        regularizer = make() if make else OneDecay()
        log_decay = hvp.functional(regularizer)

        def train_loss(weights, hyper, batch, log_decay=log_decay, make=make):
            loss = cross_entropy(batch[0] @ weights["w"] + weights["b"], batch[1])
            return loss + (log_decay(hyper, where).exp() * weights["w"].square()).sum() / 2 if make else loss

        def val_loss(weights, hyper, batch):
            return cross_entropy(batch[0] @ weights["w"] + weights["b"], batch[1])

        weights = {"w": torch.zeros(SIDE * SIDE, 10), "b": torch.zeros(10)}
        tuner = hvp.Tuner(
            weights,
            regularizer,
            train_loss,
            val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-2),
            hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=2e-2),
            solver=hvp.ConjugateGradient(20),
            inner_steps=10,
            warmup_steps=200,
        )
        if make:
            tuner.fit([train], [validation], hyper_steps, progress=False)
        else:
            for _ in range(200 + 10 * hyper_steps):
                tuner.train_step(train)
        count = sum(p.numel() for p in regularizer.parameters()) if make else 0
        right = (test[0] @ weights["w"] + weights["b"]).argmax(1).eq(test[1]).double().mean()
        losses = [float(val_loss(weights, None, part)) for part in (validation, test)]
        rows.append((name, count, *losses, float(right)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="digits for training, at most 2,500")
    parser.add_argument("--hyper-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'regularizer':<22}{'hyperparameters':>17}{'validation loss':>17}{'test loss':>11}{'test accuracy':>15}")
    for name, count, validation, test, accuracy in rows:
        print(f"{name:<22}{count:>17}{validation:>17.4f}{test:>11.4f}{accuracy:>15.1%}")


if __name__ == "__main__":
    main()
