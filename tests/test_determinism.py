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
    module = nn.Sequential(*layers, nn.LazyLinear(1000), nn.Tanh(), nn.Linear(1000, 3))
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


def main() -> None:
    torch.use_deterministic_algorithms(True)
    for threads in THREADS:
        torch.set_num_threads(threads)
        print(threads, *(digest(engine) for engine in ("eager", "linearized")))


def test_two_processes_agree_bit_for_bit() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(hvp.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", __file__]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    runs = [process.communicate(timeout=120)[0] for process in started]
    assert len(runs[0].split()) == 3 * len(THREADS)
    assert runs[0] == runs[1]


if __name__ == "__main__":
    main()
