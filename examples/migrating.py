"""Replacing a hand-written inverse-Hessian loop: the ten lines before, the ten lines after, with the same numbers.

    python examples/migrating.py [--examples 2000] [--iterations 20] [--seed 0]

One weight decay for each weight of a small network on real digits, at weights after some training.
"""

import argparse
import time

import torch
from torch.nn.functional import avg_pool2d, cross_entropy

import hvp_engine as hvp
from hvp_engine.demo.images import digits

ALPHA = 0.1

# --- before: what many training scripts carry -------------------------------------------------------------------------


def neumann_inverse_hvp(v, f, w, iterations, alpha):
    p = v
    for _ in range(iterations):
        hessian_v = torch.autograd.grad(f, w, grad_outputs=v, retain_graph=True)
        v = [v_i - alpha * h_i for v_i, h_i in zip(v, hessian_v, strict=True)]
        p = [p_i + v_i for p_i, v_i in zip(p, v, strict=True)]
    return [alpha * p_i for p_i in p]  # a factor that many scripts forget


def hypergradient_before(train_loss, val_loss, w, hyper, iterations):
    v = torch.autograd.grad(val_loss, w)
    f = torch.autograd.grad(train_loss, w, create_graph=True)
    p = neumann_inverse_hvp(v, f, w, iterations, ALPHA)
    return [-g for g in torch.autograd.grad(f, hyper, grad_outputs=p, retain_graph=True)]


# --- after, in two steps: one import in place of the loop; or one call in place of everything -------------------------


def hypergradient_import(train_loss, val_loss, w, hyper, iterations):
    v = torch.autograd.grad(val_loss, w)
    f = torch.autograd.grad(train_loss, w, create_graph=True)
    p = hvp.approx_inverse_hvp(v, f, w, iterations, ALPHA)
    return [-g for g in torch.autograd.grad(f, hyper, grad_outputs=p, retain_graph=True)]


def hypergradient_after(train_loss, val_loss, w, hyper, iterations):
    return hvp.hypergradient(train_loss, val_loss, w, hyper, hvp.Neumann(iterations, ALPHA))


# ----------------------------------------------------------------------------------------------------------------------


def problem(examples, seed):
    """Training and validation loss of the network as functions without arguments, its weights and its log-decays."""
    torch.manual_seed(seed)
    mnist = digits()
    order = torch.randperm(len(mnist))[: 2 * examples]
    x, labels = avg_pool2d(mnist.images[order], 2).flatten(1) - 0.13, mnist.labels[order]
    network = torch.nn.Sequential(torch.nn.Linear(196, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    weights = list(network.parameters())
    decays = [torch.full_like(w, -6.0, requires_grad=True) for w in weights]

    def train_loss():
        penalty = sum((decay.exp() * w.square()).sum() for decay, w in zip(decays, weights, strict=True))
        return cross_entropy(network(x[:examples]), labels[:examples]) + penalty / 2

    def val_loss():
        return cross_entropy(network(x[examples:]), labels[examples:])

    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        train_loss().backward(inputs=weights)
        optimizer.step()
    return train_loss, val_loss, weights, decays


def run(examples=2000, iterations=20, seed=0, repeats=3):
    """For each way: its name, its relative difference from the hand-written loop, and seconds."""
    train_loss, val_loss, weights, decays = problem(examples, seed)
    ways = {
        "hand-written loop": hypergradient_before,
        "hvp.approx_inverse_hvp": hypergradient_import,
        "hvp.hypergradient": hypergradient_after,
    }
    seconds, results = {}, {}
    for name, way in list(ways.items()) * repeats:
        start = time.perf_counter()
        grads = way(train_loss(), val_loss(), weights, decays, iterations)
        seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
        results[name] = torch.cat([g.flatten() for g in grads])
    expected = results["hand-written loop"]
    return [(name, float((g - expected).norm() / expected.norm()), seconds[name]) for name, g in results.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="digits for training, and as many for validation")
    parser.add_argument("--iterations", type=int, default=20, help="Hessian-vector products")
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'way':<24}{'relative difference':>21}{'seconds':>10}")
    for name, difference, seconds in rows:
        print(f"{name:<24}{difference:>21.1e}{seconds:>10.3f}")


if __name__ == "__main__":
    main()
