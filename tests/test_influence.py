"""Influence functions: closed forms, leave-one-out training of a convex problem, ways to the gradients, the example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from test_examples_first import FOLDER, example
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import hvp_engine as hvp

EXAMPLES, FEATURES, DECAY = 40, 4, 0.02


def data_loss(w: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return binary_cross_entropy_with_logits(x @ w["slope"] + w["offset"], y)


def objective(w: dict[str, Tensor], batch: tuple[Tensor, Tensor], share: float = 1.0) -> Tensor:
    return share * data_loss(w, batch) + DECAY * sum(t.square().sum() for t in w.values()) / 2


def fit(batch: tuple[Tensor, Tensor], share: float = 1.0, start: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The minimum, by Newton's method."""
    start = {"offset": torch.zeros((), dtype=DTYPE), "slope": torch.zeros(FEATURES, dtype=DTYPE)} | (start or {})
    w = torch.cat([start["slope"], start["offset"][None]])

    def value(w: Tensor) -> Tensor:
        return objective({"slope": w[:-1], "offset": w[-1]}, batch, share)

    while float((gradient := torch.func.grad(value)(w)).norm()) > 1e-13:
        w = w - torch.linalg.solve(torch.func.hessian(value)(w), gradient)
    return {"offset": w[-1], "slope": w[:-1]}


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = randn(count, FEATURES, seed=seed)
    return x, (x[:, 0] - 0.5 * x[:, 1] + randn(count, seed=seed + 1) > 0).to(DTYPE)


@pytest.fixture(scope="module")
def logistic() -> tuple[dict[str, Tensor], Any, Any]:
    train, test = data(EXAMPLES, seed=1), data(9, seed=3)
    return fit(train), train, test


def matrix_by_hand(w: dict[str, Tensor], train: Any, test: Any) -> Tensor:
    def gradients(batch: Any) -> Tensor:
        x, y = batch
        error = torch.sigmoid(x @ w["slope"] + w["offset"]) - y
        return torch.cat([error[:, None], error[:, None] * x], 1)  # in the order of the names

    x = torch.cat([torch.ones(EXAMPLES, 1, dtype=DTYPE), train[0]], 1)
    p = torch.sigmoid(train[0] @ w["slope"] + w["offset"])
    hessian = x.T @ ((p * (1 - p))[:, None] * x) / EXAMPLES + DECAY * torch.eye(FEATURES + 1, dtype=DTYPE)
    return -gradients(train) @ torch.linalg.solve(hessian, gradients(test).T)


def influence(w: Any, train: Any, test: Any, **options: Any) -> hvp.Influence:
    operator = hvp.HessianOperator(objective, w, train)
    return hvp.influence_matrix(operator, data_loss, data_loss, w, train, test, **options)


# Values


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("solver", [None, hvp.Exact()], ids=["default", "exact"])
def test_against_the_closed_form(logistic: Any, solver: Any, chunk: int) -> None:
    w, train, test = logistic
    found = influence(w, train, test, solver=solver, chunk=chunk)
    torch.testing.assert_close(found.matrix, matrix_by_hand(*logistic), rtol=1e-8, atol=1e-10)
    assert found.solution.converged and found.solution.value is None
    assert found.solution.hvps >= 5


def test_leaving_out_one_example_and_training_anew(logistic: Any) -> None:
    """Correlation, sign and size of every (training, test) pair, where leaving out takes 1/n and nothing else."""
    w, train, test = logistic
    before = torch.stack([data_loss(w, (test[0][j : j + 1], test[1][j : j + 1])) for j in range(9)])
    predicted = influence(w, train, test).of_leaving_out()
    for share, least, size in ((1 - 1 / EXAMPLES, 0.98, 0.25), (1.0, 0.95, 0.35)):  # the second: a mean over the rest
        measured = []
        for index in range(EXAMPLES):
            rest = torch.arange(EXAMPLES) != index
            anew = fit((train[0][rest], train[1][rest]), share, w)
            measured.append(torch.stack([data_loss(anew, (test[0][j : j + 1], test[1][j : j + 1])) for j in range(9)]))
        changes = torch.stack(measured) - before
        assert float(torch.corrcoef(torch.stack([predicted.flatten(), changes.flatten()]))[0, 1]) > least
        assert relative_error(predicted, changes) < size


def test_damping_is_the_solvers(logistic: Any) -> None:
    w, train, test = logistic
    damped = influence(w, train, test, solver=hvp.ConjugateGradient(100, damping=0.3)).matrix
    operator = hvp.HessianOperator(lambda w: objective(w, train) + 0.15 * sum(t.square().sum() for t in w.values()), w)
    expected = hvp.influence_matrix(operator, data_loss, data_loss, w, train, test).matrix
    torch.testing.assert_close(damped, expected, rtol=1e-8, atol=1e-10)


def test_other_operators(logistic: Any) -> None:
    """The same matrix from the Gauss-Newton operator, the linear model's, and a callable."""
    w, train, test = logistic
    expected = matrix_by_hand(w, train, test)
    pair = (w["slope"], w["offset"])

    def loss(w: Any, batch: Any) -> Tensor:
        return data_loss({"slope": w[0], "offset": w[1]}, batch)

    linear = hvp.LinearModelOperator(train[0], pair, loss="logistic", decay=DECAY)
    for operator in (linear, lambda v: linear @ v):
        found = hvp.influence_matrix(operator, loss, loss, pair, train, test)
        torch.testing.assert_close(found.matrix, expected, rtol=1e-8, atol=1e-10)
    gauss_newton = hvp.GaussNewtonOperator(lambda w, x: x @ w[0] + w[1], binary_cross_entropy_with_logits, pair, *train)
    found = hvp.influence_matrix(gauss_newton, loss, loss, pair, train, test, hvp.Exact(damping=DECAY))
    torch.testing.assert_close(found.matrix, expected, rtol=1e-8, atol=1e-10)


# Gradients of single examples


class Net(torch.nn.Module):
    """A small convolutional net in which a batch statistic, a mask or a look at values can be switched on."""

    def __init__(self, extra: torch.nn.Module):
        super().__init__()
        self.conv, self.extra, self.head = torch.nn.Conv2d(1, 3, 2), extra, torch.nn.Linear(27, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.extra(self.conv(x))).flatten(1))


class Looking(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if float(x.detach().sum()) > 0 else x


@pytest.mark.parametrize(
    ("extra", "training"),
    [
        (torch.nn.Identity(), True),
        (torch.nn.BatchNorm2d(3), False),
        (torch.nn.BatchNorm2d(3), True),
        (Looking(), True),
    ],
    ids=["plain", "batchnorm, evaluation", "batchnorm, training", "control flow"],
)
def test_networks_by_vmap_or_by_a_loop(extra: torch.nn.Module, training: bool) -> None:
    """With the identity for A the matrix is the inner products of gradients, one by one by plain autograd."""
    torch.manual_seed(0)
    module = Net(extra).to(DTYPE).train(training)
    net = hvp.functional(module)
    train, test = ((randn(6, 1, 4, 4, seed=s), torch.arange(6) % 3) for s in (5, 6))
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    random_state = torch.get_rng_state()

    def loss(w: Any, batch: Any) -> Tensor:
        return cross_entropy(net(w, batch[0]), batch[1])

    found = hvp.influence_matrix(lambda v: v, loss, loss, module, train, test, hvp.ConjugateGradient(2), chunk=4)
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in module.parameters())

    def gradients(batch: Any) -> Tensor:
        rows = []
        for k in range(6):
            value = cross_entropy(module(batch[0][k : k + 1]), batch[1][k : k + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))]))
        return torch.stack(rows)

    torch.testing.assert_close(found.matrix, -gradients(train) @ gradients(test).T, rtol=1e-10, atol=1e-12)


def test_examples_of_any_tree_and_unused_weights() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor(5.0)]

    def loss(w: Any, batch: Any) -> Tensor:
        return (w[0] * batch["a"]["x"]).sum() * batch["scale"]

    examples = {"a": {"x": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}, "scale": 2.0}
    found = hvp.influence_matrix(lambda v: [4 * v[0], v[1]], loss, loss, weights, examples, examples, hvp.Exact())
    torch.testing.assert_close(found.matrix, torch.tensor([[-1.0, 0.0], [0.0, -9.0]]))


# Bad input


def test_bad_arguments_are_named(logistic: Any) -> None:
    w, train, test = logistic
    operator = hvp.HessianOperator(objective, w, train)

    def call(**changes: Any) -> None:
        options = {"train_loss": data_loss, "test_loss": data_loss, "train_examples": train, "test_examples": test}
        hvp.influence_matrix(operator, weights=w, **(options | changes))

    with pytest.raises(ValueError, match=r"^chunk: expected an int >= 1; got 0"):
        call(chunk=0)
    with pytest.raises(TypeError, match=r"^test_loss: expected a function of \(weights, batch\)"):
        call(test_loss=1.0)
    with pytest.raises(ValueError, match=r"^train_examples: expected tensors .* one length.*\(40, 4\), \(39,\)"):
        call(train_examples=(train[0], train[1][1:]))
    with pytest.raises(ValueError, match=r"^test_loss: expected a scalar tensor; got shape \(4,\)"):
        call(test_loss=lambda w, batch: w["slope"])
    stranger = torch.ones((), requires_grad=True)
    with pytest.raises(hvp.GraphError, match=r"^test_loss: .*reaches none of the"):
        call(test_loss=lambda w, batch: stranger * batch[0].sum())
    with pytest.raises(hvp.GraphError, match=r"^train_loss: expected a loss that depends on the weights"):
        call(train_loss=lambda w, batch: batch[0].sum())


# The example


def test_the_example_finds_wrong_labels_and_predicts_refits() -> None:
    rows, correlation, _ = example("influence").run(examples=200, refits=4)
    table = {name: figures for name, *figures in rows}
    assert correlation > 0.95
    _, at_random, accuracy_at_random = table["at random"]
    for name in ("influence on validation loss", "influence on its own loss"):
        _, found, accuracy = table[name]
        assert found > at_random + 0.25 and accuracy > accuracy_at_random


def test_the_example_is_listed() -> None:
    assert "](influence.py)" in (FOLDER / "README.md").read_text()


def test_the_example_prints_and_plots(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any) -> None:
    path = tmp_path / "influence.png"
    monkeypatch.setattr("sys.argv", ["influence.py", "--examples", "60", "--refits", "2", "--plot", str(path)])
    example("influence").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "correlation" in lines[-1] and "nan" not in "".join(lines)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_bad_test_example_is_named_by_its_own_index_in_any_chunk() -> None:
    x = torch.arange(1.0, 8.0)
    bad = torch.where(x == 6.0, torch.nan, x)

    def loss(w: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return ((w - batch) ** 2).mean() / 2

    with pytest.raises(hvp.NonFiniteError, match=r"^test_examples: .* first at index 5"):
        hvp.influence_matrix(lambda v: v, loss, loss, x.mean(), x, bad, chunk=2)
