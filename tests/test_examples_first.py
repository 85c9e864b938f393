"""The first audience's examples at reduced size: what their tables claim, and that the scripts print them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hvp_engine as hvp

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NAMES = ["minimal", "migrating", "data_reweighting", "imaml", "learned_regularizer", "relaxed_choice"]


@pytest.fixture(autouse=True)
def unchanged_global_state():
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(dtype)


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_the_minimal_version_and_the_library_give_the_same_hypergradient(iterations):
    """Both terms of the hypergradient are there, and weights of several shapes; nothing is at a minimum."""
    minimal = example("minimal")
    assert "hvp_engine" not in vars(minimal) and "hvp" not in vars(minimal)
    torch.manual_seed(0)
    x, x_val, y, y_val = torch.randn(4, 20, 3, dtype=torch.float64)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    weights = dict(module.named_parameters())
    hyper = {name: torch.full_like(w, -1.0, requires_grad=True) for name, w in weights.items()}
    net = hvp.functional(module)

    def train_loss(weights, hyper, batch):
        return ((net(weights, x) - y) ** 2).mean() + sum((hyper[k].exp() * w**2).sum() for k, w in weights.items())

    def val_loss(weights, hyper, batch):
        return ((net(weights, x_val) - y_val) ** 2).mean() + sum((hyper[k] * w).sum() for k, w in weights.items())

    lists = list(weights.values()), list(hyper.values())
    recorded = train_loss(weights, hyper, None), val_loss(weights, hyper, None)
    naive = minimal.hypergradient(*recorded, *lists, iterations, alpha=0.1)
    recorded = train_loss(weights, hyper, None), val_loss(weights, hyper, None)
    solver = hvp.Neumann(iterations, alpha=0.1)
    torch.testing.assert_close(hvp.hypergradient(*recorded, *lists, solver), tuple(naive), rtol=1e-12, atol=1e-14)
    for engine in ("eager", "linearized"):
        found = hvp.Hypergradient(train_loss, val_loss, solver, engine)(weights, hyper, None, None)
        torch.testing.assert_close(list(found.grads.values()), naive, rtol=1e-10, atol=1e-13)


def test_the_minimal_version_converges_to_the_exact_hypergradient(capsys):
    example("minimal").main()
    errors = [float(row.split()[1]) for row in capsys.readouterr().out.splitlines()[1:]]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-14


def test_migrating_keeps_the_numbers():
    rows = example("migrating").run(examples=200, iterations=20, repeats=1)
    assert [name for name, *_ in rows] == ["hand-written loop", "hvp.approx_inverse_hvp", "hvp.hypergradient"]
    assert rows[0][1] == 0.0
    assert all(0 < difference < 1e-5 for _, difference, _ in rows[1:])  # other roundings, so other code was run


def test_reweighting_finds_the_wrong_labels():
    rows = {name: figures for name, *figures in example("data_reweighting").run(examples=400, hyper_steps=60)}
    accuracy, right, wrong = rows["learned weights"]
    assert wrong < 0.4 < 0.6 < right
    assert accuracy > rows["all weights 1/2"][0] + 0.01
    assert rows["wrong labels known"][0] > rows["all weights 1/2"][0] + 0.01


def test_meta_learning_helps_on_new_tasks():
    (_, seen, _), (_, seen_after, _) = example("imaml").run(meta_steps=40, test_tasks=30)
    assert seen_after > seen + 0.03


def test_the_outer_gradient_of_imaml_agrees_with_finite_differences_of_adapted_weights():
    imaml = example("imaml")
    torch.manual_seed(0)
    net = hvp.functional(torch.nn.Linear(4, imaml.WAYS).double())
    imaml.net, imaml.INNER_STEPS = net, 400
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.module.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    support, query = (
        (torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.arange(6) % imaml.WAYS) for _ in range(2)
    )
    imaml.outer_loss(theta, support, query).backward()
    direction = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in theta.items()}
    values = []
    for step in (1e-5, -1e-5):
        moved = {name: (t + step * direction[name]).detach().requires_grad_() for name, t in theta.items()}
        values.append(imaml.outer_loss(moved, support, query).item())
    expected = sum(float((t.grad * direction[name]).sum()) for name, t in theta.items())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-3)


def test_a_learned_regularizer_beats_one_decay_on_the_validation_set():
    rows = {name: figures for name, *figures in example("learned_regularizer").run(examples=100, hyper_steps=30)}
    assert [figures[0] for figures in rows.values()] == [0, 1, 266]
    none, one, learned = (rows[name][1] for name in ("none", "one decay", "learned by position"))
    assert learned < 0.9 * one < 0.9 * none


def test_a_relaxed_choice_becomes_the_best_discrete_one():
    rows = example("relaxed_choice").run(hyper_steps=100)
    _, shares, losses, _ = zip(*rows, strict=True)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) > 0.9
    assert shares.index(max(shares)) == losses.index(min(losses))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_prints_its_table(name, monkeypatch, capsys):
    sizes = {
        "minimal": [],
        "migrating": ["--examples", "50", "--iterations", "2"],
        "data_reweighting": ["--examples", "50", "--hyper-steps", "2"],
        "imaml": ["--meta-steps", "1", "--test-tasks", "2"],
        "learned_regularizer": ["--examples", "50", "--hyper-steps", "1"],
        "relaxed_choice": ["--examples", "50", "--hyper-steps", "1"],
    }
    module = example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *sizes[name]])
    module.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) >= 2
    assert all(len(row) <= len(head) for row in rows)
    assert not any(word in row for row in rows for word in ("nan", "inf"))


def test_every_script_is_listed():
    text = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"]({name}.py)" in text
        assert (FOLDER / f"{name}.py").is_file()
