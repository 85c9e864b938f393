"""Meta-learning in the manner of iMAML: an initialization from which new classes are learned from a few examples.

    python examples/imaml.py [--meta-steps 100] [--shots 1] [--test-tasks 60] [--seed 0]

A task is to tell three characters apart from a few examples of each; a character is a digit turned by 0, 90, 180 or
270 degrees. The network of a task minimizes cross-entropy + STRENGTH / 2 ||w - theta||^2, and the outer gradient of
theta goes through that minimum by `hvp.best_response`, whatever the number of inner steps. Meta-training sees the 28
characters of the digits 0 to 6; testing also uses the 12 of the digits 7, 8 and 9.

Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", 2019.
"""

import argparse

import torch
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from hvp_engine.demo.images import digits

STRENGTH = 0.3
WAYS = 3
QUERIES = 15
INNER_STEPS = 25
TASKS_PER_STEP = 4

network = torch.nn.Sequential(torch.nn.Linear(196, 64), torch.nn.Tanh(), torch.nn.Linear(64, WAYS))
net = hvp.functional(network)


def task(images, labels, classes, shots, generator):
    """Support and query examples of three random characters, numbered 0 to 2 in random order."""
    chosen = classes[torch.randperm(len(classes), generator=generator)[:WAYS]]
    support, query = [], []
    for digit in chosen:
        members = (labels == digit).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)[: shots + QUERIES]]
        support.append(images[members[:shots]])
        query.append(images[members[shots:]])
    numbers = torch.arange(WAYS)
    return (torch.cat(support), numbers.repeat_interleave(shots)), (
        torch.cat(query),
        numbers.repeat_interleave(QUERIES),
    )


def inner_loss(weights, theta, batch):
    distance = sum((w - theta[name]).square().sum() for name, w in weights.items())
    return cross_entropy(net(weights, batch[0]), batch[1]) + STRENGTH / 2 * distance


def adapt(theta, support):
    """Weights near the minimum of the inner loss, by gradient descent with momentum from theta."""
    weights = {name: t.detach().clone().requires_grad_() for name, t in theta.items()}
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.3, momentum=0.7)
    fixed = {name: t.detach() for name, t in theta.items()}
    for _ in range(INNER_STEPS):
        optimizer.zero_grad()
        inner_loss(weights, fixed, support).backward()
        optimizer.step()
    return weights


def outer_loss(theta, support, query):
    """The query loss of the adapted weights, connected to theta by the implicit function theorem."""
    weights = adapt(theta, support)
    responses = hvp.best_response(
        inner_loss(weights, theta, support), list(weights.values()), list(theta.values()), hvp.ConjugateGradient(5)
    )
    return cross_entropy(net(dict(zip(theta, responses, strict=True)), query[0]), query[1])


def evaluate(theta, images, labels, classes, shots, tasks):
    """Mean query accuracy after adaptation."""
    generator = torch.Generator().manual_seed(12345)
    accuracies = []
    for _ in range(tasks):
        support, query = task(images, labels, classes, shots, generator)
        scores = net(adapt(theta, support), query[0])
        accuracies.append(scores.argmax(1).eq(query[1]).double().mean())
    return float(torch.stack(accuracies).mean())


def run(meta_steps=100, shots=1, seed=0, test_tasks=60):
    """For each initialization: accuracy on tasks with digits of meta-training, and with new ones."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mnist = digits()
    small = avg_pool2d(mnist.images, 2)
    images = torch.cat([small.rot90(turn, (2, 3)).flatten(1) for turn in range(4)])
    images = (images - images.mean()) / images.std()
    labels = torch.cat([mnist.labels + 10 * turn for turn in range(4)])  # a character: digit + 10 * turn
    characters = torch.arange(40)
    seen, new = characters[characters % 10 < 7], characters[characters % 10 >= 7]
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}

    def row(name):
        return name, *(evaluate(theta, images, labels, classes, shots, test_tasks) for classes in (seen, new))

    rows = [row("random initialization")]
    optimizer = torch.optim.Adam(list(theta.values()), lr=3e-3)
    for _ in range(meta_steps):
        optimizer.zero_grad()
        for _ in range(TASKS_PER_STEP):
            (outer_loss(theta, *task(images, labels, seen, shots, generator)) / TASKS_PER_STEP).backward()
        optimizer.step()
    return [*rows, row(f"after {meta_steps} meta-steps")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meta-steps", type=int, default=100)
    parser.add_argument("--shots", type=int, default=1, help="examples of each class to learn from")
    parser.add_argument("--test-tasks", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'initialization':<26}{'accuracy, digits 0-6':>22}{'accuracy, digits 7-9':>22}")
    for name, seen, new in rows:
        print(f"{name:<26}{seen:>22.1%}{new:>22.1%}")


if __name__ == "__main__":
    main()
