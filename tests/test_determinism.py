"""With torch's deterministic algorithms a hypergradient is the same in every process with equally many threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp

THREADS = (1, 2)


def digest(engine: str) -> str:
    """Of two hypergradients of a convolutional network with an embedding and dropout, by one object."""
    torch.manual_seed(3)
    layers = [
        nn.Embedding(7, 64),
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 8, 3),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Flatten(),
    ]
    module = nn.Sequential(*layers, nn.LazyLinear(100), nn.Tanh(), nn.Linear(100, 3))
    words, labels = torch.randint(7, (16, 8)), torch.arange(16) % 3
    module(words)
    net = hvp.functional(module)
    hyper = {name: torch.full_like(p, -4.0) for name, p in module.named_parameters()}

    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: Tensor) -> Tensor:
        decay = sum((h[name].exp() * weight.square()).sum() for name, weight in w.items())
        return cross_entropy(net(w, batch), labels) + decay

    def val(w: dict[str, Tensor], h: dict[str, Tensor], batch: Tensor) -> Tensor:
        return cross_entropy(net(w, batch), labels)

    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(5), engine)
    content = hashlib.sha256()
    for _ in range(2):
        found = hypergradient(dict(module.named_parameters()), hyper, words, words)
        for gradient in found.grads.values():
            content.update(gradient.numpy().tobytes())
        content.update(repr((found.solution.residual_norm, found.solution.alpha)).encode())
    return content.hexdigest()


def digests() -> list[str]:
    """By each number of threads and engine."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    found = []
    for count in THREADS:
        torch.set_num_threads(count)
        found += [digest(engine) for engine in ("eager", "linearized")]
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    return found


def test_another_process_agrees_bit_for_bit() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(hvp.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", __file__]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    ours = digests()
    assert other.communicate(timeout=120)[0].split() == ours


if __name__ == "__main__":
    print(*digests())
