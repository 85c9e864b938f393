"""Which training images help or harm a classifier of digits, and which of their labels are wrong.

    python examples/influence.py [--examples 1000] [--wrong 0.1] [--refits 10] [--seed 0] [--plot influence.png]

One Hessian of a logistic regression, factorized once, gives the influence of every training image on the loss of
every validation image. Sorted by influence, the wrong labels come first. Retraining without single images checks the
numbers.
"""

import argparse

import torch
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from hvp_engine.demo.images import digits

DECAY = 0.01


def load(examples, wrong, seed):
    """Training, validation and test set as (x, labels), the images, and which training labels were replaced."""
    generator = torch.Generator().manual_seed(seed)
    mnist = digits()
    order = torch.randperm(len(mnist), generator=generator)
    images, labels = mnist.images[order], mnist.labels[order].clone()
    x = avg_pool2d(images, 4).flatten(1).double()
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    corrupted = torch.rand(examples, generator=generator) < wrong
    labels[:examples] = (labels[:examples] + corrupted * torch.randint(1, 10, (examples,), generator=generator)) % 10
    parts = (slice(0, examples), slice(examples, examples + 300), slice(examples + 300, examples + 2300))
    return [(x[part], labels[part]) for part in parts], images, corrupted


def data_loss(weights, batch):
    x, labels = batch
    return cross_entropy(x @ weights, labels)


def objective(weights, batch, share):
    """`share` times the mean over the batch, so that leaving an image out removes its part and nothing else."""
    return share * data_loss(weights, batch) + DECAY * weights.square().sum() / 2


def fit(weights, batch, share=1.0):
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(weights, batch, share)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def correlation_with_refits(weights, train, validation, predicted, refits, generator):
    """Correlation between predicted changes of the validation loss and those of retraining without one image each."""
    order = predicted.argsort()
    chosen = [*order[: refits // 2].tolist(), *order[-(refits - refits // 2) :].tolist()]
    before, measured = data_loss(weights, validation), []
    for index in chosen:
        rest = torch.arange(len(train[1])) != index
        refitted = fit(weights, (train[0][rest], train[1][rest]), share=1 - 1 / len(train[1]))
        measured.append(data_loss(refitted, validation) - before)
    return float(torch.corrcoef(torch.stack([predicted[chosen], torch.stack(measured)]))[0, 1])


def run(examples=1000, wrong=0.1, refits=10, seed=0):
    """The table (for each way to sort the training images, how many wrong labels are among the first, and the test
    accuracy without those) and what the plot needs."""
    (train, validation, test), images, corrupted = load(examples, wrong, seed)
    weights = fit(torch.zeros(train[0].shape[1], 10, dtype=torch.float64), train)
    H = hvp.HessianOperator(objective, weights, train, 1.0)
    found = hvp.influence_matrix(H, data_loss, data_loss, weights, train, validation, hvp.Exact())

    def accuracy(weights):
        return float((test[0] @ weights).argmax(1).eq(test[1]).double().mean())

    def without(worst):
        keep = torch.ones(examples, dtype=torch.bool)
        keep[worst] = False
        return accuracy(fit(weights, (train[0][keep], train[1][keep])))

    count = int(corrupted.sum())
    generator = torch.Generator().manual_seed(seed + 1)
    on_training = hvp.influence_matrix(H, data_loss, data_loss, weights, train, train, hvp.Exact())
    scores = {
        "influence on validation loss": found.matrix.mean(1),
        "influence on its own loss": -on_training.matrix.diagonal(),
        "own training loss": cross_entropy(train[0] @ weights, train[1], reduction="none"),
        "at random": torch.rand(examples, generator=generator),
        "wrong labels known": corrupted.double(),
    }
    rows = [("nothing left out", 0, 0.0, accuracy(weights))]
    for name, score in scores.items():
        worst = score.argsort(descending=True)[:count]
        rows.append((name, count, float(corrupted[worst].double().mean()), without(worst)))
    predicted = found.of_leaving_out().mean(1)
    correlation = correlation_with_refits(weights, train, validation, predicted, refits, generator)
    return rows, correlation, (found.matrix, train, validation, images, corrupted, weights)


def plot(path, matrix, train, validation, images, corrupted, weights):
    """Draw four validation images of high loss, each with the three most helpful and most harmful training images."""
    from matplotlib.figure import Figure

    losses = cross_entropy(validation[0] @ weights, validation[1], reduction="none")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(4, 7)
    for row, index in zip(axes, losses.argsort(descending=True)[:4].tolist(), strict=True):
        order = matrix[:, index].argsort()
        shown = [(len(train[1]) + index, f"validation: {int(validation[1][index])}", "black")]
        for kind, training in (("helps", order[:3].tolist()), ("harms", order.flip(0)[:3].tolist())):
            for i in training:
                mark = ", wrong label" if corrupted[i] else ""
                shown.append((i, f"{kind}: {int(train[1][i])}{mark}", "tab:blue" if kind == "helps" else "tab:red"))
        for axis, (place, title, color) in zip(row, shown, strict=True):
            axis.imshow(images[place, 0].numpy(), cmap="gray_r")
            axis.set_title(title, color=color, fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="digits for training, at most 2,700")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of training labels that are wrong")
    parser.add_argument("--refits", type=int, default=10, help="images without which to train anew, as a check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="write a picture of helpful and harmful images, as PNG")
    options = vars(parser.parse_args())
    path = options.pop("plot")
    rows, correlation, shown = run(**options)
    print(f"{'left out, the first by':<32}{'images':>8}{'of them wrong':>15}{'test accuracy':>15}")
    for name, count, share, accuracy in rows:
        print(f"{name:<32}{count:>8}{share:>15.0%}{accuracy:>15.1%}")
    print(f"predicted against measured change, {options['refits']} refits: correlation {correlation:.3f}")
    if path:
        plot(path, *shown)


if __name__ == "__main__":
    main()
