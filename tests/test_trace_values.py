"""Sizes and Python numbers that values decide: no trace keeps those of the first batch for the others."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp

pytestmark = [
    pytest.mark.usefixtures("float64_by_default"),
    pytest.mark.filterwarnings("ignore:the weights are far from a minimum"),
]

Batch = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


def scores(w: Tensor, batch: Batch) -> Tensor:
    return (batch[0] @ w).sin()


def assigned(w: Tensor, batch: Batch) -> Tensor:
    y = scores(w, batch) * 1
    y[batch[2]] = w[0, 0]
    return y.pow(3).sum()


DECIDED: dict[str, Loss] = {
    "indexing by a mask": lambda w, b: scores(w, b)[b[2]].square().mean(),
    "masked_select": lambda w, b: scores(w, b).masked_select(b[2]).square().mean(),
    "a number assigned to a mask": assigned,
    "torch.where of a condition": lambda w, b: scores(w, b)[torch.where(b[2])].square().mean(),
    "as many as there are": lambda w, b: scores(w, b).square().sum() / len(b[2].nonzero()),
    "unique": lambda w, b: scores(w, b).square().sum() / len(b[1].unique()),
    "repeat_interleave": lambda w, b: scores(w, b).repeat_interleave(b[1], 0).square().sum(),
    "tolist": lambda w, b: scores(w, b)[[i for i, c in enumerate(b[1].tolist()) if c]].square().sum(),
    "numpy": lambda w, b: (scores(w, b).square() * torch.from_numpy(b[2].numpy() * 2.0)).sum(),
    "asarray": lambda w, b: scores(w, b).square().sum() * float(np.asarray(b[1]).sum()),
}

OWN = torch.tensor([True, False, True])

FIXED: dict[str, Loss] = {
    "a mask that the batch does not change": lambda w, b: scores(w, b)[:, OWN].square().mean(),
    "all but the diagonal": lambda w, b: (scores(w, b) @ scores(w, b).T)[~torch.eye(6, dtype=torch.bool)].exp().mean(),
    "bincount with a minimum": lambda w, b: F.cross_entropy(
        scores(w, b), b[1], 1 / b[1].bincount(minlength=3).clamp_min(1)
    ),
    "repeat_interleave of a given size": lambda w, b: (
        scores(w, b)[:3].repeat_interleave(torch.tensor([1, 2, 3]), 0, output_size=6).square().sum()
    ),
    "indexing by labels": lambda w, b: scores(w, b)[torch.arange(6), b[1]].square().sum(),
    "lstsq": lambda w, b: torch.linalg.lstsq(scores(w, b)[:, :1] + 3, b[0][:, :1]).solution.square().sum(),
}


FACTOR, MASK = torch.tensor(2.0), torch.tensor([True, False, False])

READ: dict[str, Loss] = {
    "item": lambda w, b: scores(w, b).square().sum() * FACTOR.item(),
    "float": lambda w, b: scores(w, b).square().sum() * float(FACTOR),
    "tolist": lambda w, b: scores(w, b).square().sum() * FACTOR.view(1).tolist()[0],
    "numpy": lambda w, b: scores(w, b).square().sum() * float(FACTOR.numpy()),
    "as many as there are": lambda w, b: scores(w, b).square().sum() / len(MASK.nonzero()),
    "as many as there are not": lambda w, b: scores(w, b)[:, ~MASK].square().mean(),
}


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (6,), generator=generator)
    labels[0] = 2
    return torch.randn(6, 4, generator=generator), labels, torch.arange(18).view(6, 3) % (2 + seed % 5) == 0


def hypergradients(loss: Loss, engine: str) -> list[Tensor]:
    def train(w: Tensor, decay: Tensor, batch: Batch) -> Tensor:
        return loss(w, batch) + decay.exp() * w.square().sum()

    def val(w: Tensor, decay: Tensor, batch: Batch) -> Tensor:
        return loss(w, batch)

    w, found = torch.linspace(-1.0, 1.0, 12).view(4, 3), []
    estimate = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.01), engine)
    for seed in range(8):
        FACTOR.fill_(2.0 + seed // 4)
        MASK[1] = seed >= 4
        found.append(estimate(w, torch.tensor(-1.0), batch(seed), batch(seed + 1)).grads)
    return found


@pytest.mark.filterwarnings("error:.*is replaced by")
@pytest.mark.parametrize("name", DECIDED)
def test_what_values_decide_is_not_traced(name: str) -> None:
    with pytest.raises(hvp.TraceError, match=r"values decide the size of what .* gives|by Tensor\.\w+, at"):
        hypergradients(DECIDED[name], "linearized")
    for ours, plain in zip(hypergradients(DECIDED[name], "auto"), hypergradients(DECIDED[name], "eager"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("error:.*is replaced by")
@pytest.mark.parametrize("name", FIXED)
def test_what_no_value_of_the_inputs_decides_is_traced(name: str) -> None:
    found = hypergradients(FIXED[name], "linearized")
    for ours, plain in zip(found, hypergradients(FIXED[name], "eager"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


DRAWN: dict[str, Loss] = {
    "random": lambda w, b: scores(w, b).square().mean() * random.random(),
    "a branch": lambda w, b: scores(w, b).square().mean() if random.random() < 0.5 else scores(w, b).exp().mean(),
    "numpy.random": lambda w, b: scores(w, b).square().mean() * np.random.beta(2.0, 2.0),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_python_and_numpy_draw_is_not_traced(name: str) -> None:
    with pytest.raises(hvp.TraceError, match="draws by Python's random or numpy.random, which a trace would keep"):
        hypergradients(DRAWN[name], "linearized")
    for ours, plain in zip(*(seeded(DRAWN[name], engine) for engine in ("auto", "eager")), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)


def test_auto_draws_what_eager_draws() -> None:
    """Also in the call that tries how fast the validation loss's trace is."""

    def loss(w: Tensor, batch: Batch) -> Tensor:
        return F.dropout(scores(w, batch), 0.3).square().mean()

    for ours, plain in zip(*(seeded(loss, engine) for engine in ("auto", "eager")), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)


def seeded(loss: Loss, engine: str) -> list[Tensor]:
    torch.manual_seed(0)
    return hypergradients(loss, engine)


@pytest.mark.parametrize("engine", ["linearized", "auto"])
@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:.*is replaced by")
def test_what_python_reads_of_a_tensor_that_is_no_input_is_watched(name: str, engine: str) -> None:
    for ours, plain in zip(hypergradients(READ[name], engine), hypergradients(READ[name], "eager"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)
