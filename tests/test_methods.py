"""The registry of methods: what it says about memory and work, measured; the comparison command, on Boston; memory."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor

from baselines.methods import METHODS, Method, Setting, find, markdown
from bench import compare_methods, compare_problems, documentation, results
from examples import __main__ as examples
from examples import method_memory
from examples.experiment import Options, execute
from hvp_engine.diagnostics.memory import peak_memory
from hvp_engine.hypergradients.estimator import Estimate

MEASURED = ("Neumann", "CG", "unrolled", "linear hypernetwork", "self-tuning network")
ESTIMATORS = [method for method in METHODS if method.make]
X, Y = randn(60, 12, seed=1), randn(60, 3, seed=2)
WEIGHTS, HYPER = randn(12, 3, seed=3) / 10, torch.full((12, 3), -2.0, dtype=DTYPE)


class Counting:
    """Ridge regression with a decay for each weight, which counts what its training loss is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def model(self, weights: Tensor, hyper: Tensor, batch: Any) -> Tensor:
        return X @ weights

    def loss_of_outputs(self, outputs: Tensor, weights: Tensor, hyper: Tensor, batch: Any) -> Tensor:
        return (outputs - Y).square().mean() / 2 + (hyper.exp() * weights.square()).sum() / 2

    def train_loss(self, weights: Tensor, hyper: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        return self.loss_of_outputs(self.model(weights, hyper, batch), weights, hyper, batch)

    def val_loss(self, weights: Tensor, hyper: Tensor, batch: Any) -> Tensor:
        return (weights - 0.2).square().sum()

    def setting(self) -> Setting:
        return Setting(
            self.train_loss, self.val_loss, 0.5, self.model, self.loss_of_outputs, lambda vs: [v / 2 for v in vs], 0.1
        )


def estimate(method: Method, length: int, problem: Counting) -> Estimate:
    assert method.make is not None
    return method.make(problem.setting(), length)(WEIGHTS, HYPER, None, None)


def test_names_are_unique_and_found() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names) and all(find(name).name == name for name in names)
    with pytest.raises(ValueError, match="name: expected one of exact IFT, .*; got 'magic'"):
        find("magic")


def test_every_method_makes_something() -> None:
    assert all((method.make is not None) or (method.search is not None) for method in METHODS)
    assert {method.kind for method in METHODS} == {"implicit", "unrolled", "response", "search"}


@pytest.mark.filterwarnings("ignore:the weights are far")
@pytest.mark.parametrize("method", ESTIMATORS, ids=lambda method: method.name)
def test_memory_grows_where_the_formula_says_so(method: Method) -> None:
    peaks = []
    short, long = (2, 5) if "forward" in method.name else (10, 30)
    for length in (short, long):
        problem = Counting()
        estimate(method, length, problem)
        with peak_memory() as meter:
            estimate(method, length, problem)
        peaks.append(meter.peak_bytes)
    size = WEIGHTS.nbytes
    if " i" in method.memory:
        copies = (peaks[1] - peaks[0]) / (long - short) / size
        assert copies > (0.45 if "truncated" in method.name else 0.9), "at least a copy of the weights for each step"
    else:
        assert peaks[1] - peaks[0] <= 0.02 * peaks[0] + 2 * size


@pytest.mark.filterwarnings("ignore:the weights are far")
@pytest.mark.parametrize("method", [m for m in ESTIMATORS if m.iterative], ids=lambda method: method.name)
def test_work_is_what_the_formula_says(method: Method) -> None:
    """Calls of the training loss, by kind: once for a graph, once a step, again for checkpoints, once more to look."""
    problem, count = Counting(), WEIGHTS.numel()
    found = estimate(method, 7, problem)
    calls = {
        "implicit": 1, "response": 8, "unrolled": 7 * (count if "forward" in method.name else 1),
    }[method.kind]  # fmt: skip
    if method.name != "unrolled, checkpointing":
        assert problem.calls == calls
    else:
        assert 2 * calls <= problem.calls <= 3 * calls
    solution = getattr(found, "solution", None)
    if solution is not None:
        expected = method.gradients(7, count, count)
        assert 3 + 2 * solution.hvps in (expected, expected + 2 * 8), "with or without a spectral estimate"
        assert expected >= 3 + 2 * 7


def test_methods_converge_to_the_same_hypergradient() -> None:
    problem = Counting()
    exact = estimate(find("exact IFT"), 1, problem).grads
    at = torch.linalg.solve  # weights at the minimum, by hand: every column by itself
    columns = [at(X.T @ X / 180 + torch.diag(HYPER[:, k].exp()), X.T @ Y[:, k] / 180) for k in range(3)]
    minimum = torch.stack(columns, 1)
    for method in ESTIMATORS:
        if method.kind == "response" or method.name in ("T1-T2", "unrolled, truncated", "unrolled, forward", "Nystrom"):
            continue
        assert method.make is not None
        grads = method.make(problem.setting(), 500)(minimum, HYPER, None, None).grads
        assert relative_error(grads, exact) < 1e-5, method.name


def test_documentation_has_the_table() -> None:
    assert markdown().count("\n") == len(METHODS) + 1
    assert documentation.TABLES["methods"]() == markdown()


def test_compare_writes_rows_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["boston", "--out", str(tmp_path), "--lengths", "1", "20", "--quick"]
    names = ["exact IFT", "Neumann", "CG", "unrolled"]
    assert compare_methods.main([*arguments, "--methods", *names]) == 0
    printed = capsys.readouterr().out
    assert "| exact IFT | - | 1.00000 |" in printed and "| CG | 20 | 1.00000 |" in printed
    (file,) = tmp_path.glob("compare-*.csv")
    rows = {(r.benchmark, r.problem, r.method, r.size): r.p50 for r in results.read(file)}
    assert {key[2] for key in rows} == set(names)
    assert rows["compare error", "boston, at w*", "CG", 20] < 1e-9 < rows["compare error", "boston, early", "CG", 20]
    assert 0.3 < rows["compare error", "boston, at w*", "Neumann", 20] < 0.9
    assert rows["compare gradients", "boston, at w*", "Neumann", 20] == 3 + 2 * 20
    assert (
        rows["compare memory", "boston, at w*", "unrolled", 20] > 3 * rows["compare memory", "boston, at w*", "CG", 20]
    )
    assert (tmp_path / "compare-boston.png").stat().st_size > 10_000


def test_memory_grows_in_the_comparison_where_the_formula_says_so(tmp_path: Path) -> None:
    settings = method_memory.Settings(lengths=(5, 20), hyperparameters=(5, 20), methods=MEASURED, batch=10)
    run = execute(examples.find("method_memory"), Options("small", tmp_path), settings)
    growth = {}
    for table in ("by_length", "by_hyperparameters"):
        with (run.folder / f"{table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                growth.setdefault((table, row["method"]), []).append(float(row["peak_bytes"]))
    ratio = {key: peaks[-1] / peaks[0] for key, peaks in growth.items()}
    assert {name for name in MEASURED if ratio["by_length", name] > 1.01} == {"unrolled"}
    assert {name for name in MEASURED if ratio["by_hyperparameters", name] > 1.5} == {"linear hypernetwork"}
    assert ratio["by_length", "unrolled"] > 2


def test_large_problems_leave_out_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = compare_problems.build("boston")
    assert all(compare_methods.refusal(method, problem) is None for method in ESTIMATORS)
    monkeypatch.setattr(compare_problems.Comparison, "weight_count", 50_000)
    refused = {method.name for method in ESTIMATORS if compare_methods.refusal(method, problem)}
    assert refused == {"exact IFT", "Larsen", "Bengio", "unrolled, forward", "linear hypernetwork"}


def test_raw_inputs_are_ill_conditioned() -> None:
    """As the documentation says: 1.4e8, against 81 for standardized ones."""
    raw, plain = compare_problems.build("boston-raw"), compare_problems.build("boston")
    assert raw.condition == pytest.approx(1.4e8, rel=0.1) and plain.condition == pytest.approx(81, rel=0.1)


def test_linear_hypernetwork_settles_in_the_comparison() -> None:
    """It ends near the lowest loss that it has seen; at the others' learning rate at twice as much."""
    few = compare_problems.untrained("mnist-logistic", examples=400)
    found = compare_methods.searches(few, 600)["linear hypernetwork"](few.search_problem(one_decay=True), 600)
    assert found.val_loss < 1.1 * found.curve[-1][1] < 0.65


def test_linear_hypernetwork_of_a_decay_for_each_weight_does_not_run_away() -> None:
    """In the comparison: with slopes that are not divided by the root of H it ends above 10."""
    few = compare_problems.untrained("mnist-conv", examples=50)
    found = compare_methods.searches(few, 130)["linear hypernetwork"](few.search_problem(one_decay=False), 130)
    assert found.val_loss < 2
