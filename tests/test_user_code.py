"""Messages name the line of the user's code, not torch's advice."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from problems_with_known_answers import randn
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.user_code import innermost_line


def branch(w: Tensor) -> Tensor:
    if w.sum() > 0:  # this line
        return w * 2
    return w


def scale(w: Tensor) -> Tensor:
    return w * w.sum().item()  # that line


class Layer(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.detach().abs().sum())]  # the line of a module


LINES = {"branch": (branch, "branch", "this line"), "scale": (scale, "scale", "that line")}
LINES["module"] = (Layer(), "forward", "the line of a module")


@pytest.mark.parametrize("name", LINES)
def test_a_trace_that_fails_names_the_innermost_line_of_the_users_code(name: str) -> None:
    function, where, comment = LINES[name]

    def loss(w: Tensor) -> Tensor:
        return function(w).pow(3).sum()

    with pytest.raises(hvp.TraceError) as caught:
        hvp.HessianOperator(loss, torch.ones(3), engine="linearized")
    message = str(caught.value)
    assert f"test_user_code.py:{line_of(comment)}, in {where}: `" in message and comment in message
    assert "make_fx" not in message and "tracing_mode" not in message and "engine='eager'" in message


def line_of(comment: str) -> int:
    with open(__file__) as lines:
        return next(number for number, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {comment}"))


def test_of_an_error_outside_of_it_nothing_is_named() -> None:
    assert innermost_line(RuntimeError("never raised")) == "the loss"


class Encoding(UserDict):
    """Not registered as a tree, as a tokenizer's batch."""


@pytest.mark.parametrize("side", ["train", "test"])
def test_an_influence_matrix_of_a_tokenizers_batch(side: str) -> None:
    batch = {"ids": randn(4, 3, seed=1), "text": "x"}
    w = randn(3, seed=2)

    def loss(w: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (batch["ids"] @ w).square().mean()

    H = hvp.HessianOperator(loss, w, batch) + 1.0 * hvp.I
    examples = {"train": batch, "test": batch, side: Encoding(batch)}
    with pytest.raises(TypeError, match=rf"^{side}_examples: .*got Encoding.*dict\(batch\)"):
        hvp.influence_matrix(H, loss, loss, w, examples["train"], examples["test"])
    assert hvp.influence_matrix(H, loss, loss, w, dict(Encoding(batch)), batch).matrix.shape == (4, 4)
