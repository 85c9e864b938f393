"""Fig. 4: the Neumann series as a picture, from the identity to the true inverse Hessian.

A network with one hidden layer of tanh on the Boston housing data, in float64, at a minimum found by LBFGS and Newton
steps, with standardized inputs and with raw ones, the hard case. The pictures show tanh of the entries of alpha sum_j
(I - alpha H)^j, as the paper's do, and once more with each matrix divided by the mean of its diagonal, since the first
few are too small to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import hvp_engine as hvp
from examples import datasets
from examples.experiment import Experiment, Run
from hvp_engine.demo.preparation import standardize


@dataclass(frozen=True)
class Settings:
    hidden: int = 13
    log_decay: float = -4.0
    training_steps: int = 5000
    newton_steps: int = 300
    products: tuple[int, ...] = (1, 5, 20, 100, 1000, 10_000)


def train(run: Run, settings: Settings, standardized: bool) -> tuple[Any, dict[str, Tensor]]:
    """The regularized loss as a function of the weights, and its minimum."""
    device = run.options.device
    table = datasets.boston(run.options.data)
    both = [standardize(x)[0] if standardized else x for x in (table.features, table.targets)]
    inputs, targets = (x.to(device) for x in both)
    module = torch.nn.Sequential(
        torch.nn.Linear(inputs.shape[1], settings.hidden), torch.nn.Tanh(), torch.nn.Linear(settings.hidden, 1)
    ).to(device, torch.float64)
    net = hvp.functional(module)
    decay = torch.tensor(settings.log_decay, dtype=torch.float64, device=device).exp()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        penalty = sum(weight.square().sum() for weight in weights.values())
        return (net(weights, inputs).squeeze(1) - targets).square().mean() + decay * penalty / 2

    weights = dict(module.named_parameters())
    optimizer = torch.optim.LBFGS(
        list(weights.values()),
        max_iter=settings.training_steps,
        max_eval=2 * settings.training_steps,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return loss, polished(loss, {name: weight.detach() for name, weight in weights.items()}, settings.newton_steps)


def polished(loss: Any, weights: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Weights after Newton steps with |H| for H, which leave saddle points, each halved until the loss falls."""
    value = loss(weights)
    for _ in range(steps):
        operator = hvp.HessianOperator(loss, weights, engine="eager")
        gradient = torch.cat([g.flatten() for g in operator.gradient.values()])
        eigenvalues, vectors = torch.linalg.eigh(operator.dense())
        step = vectors @ ((vectors.T @ gradient) / eigenvalues.abs())
        for _ in range(30):
            parts = step.split([weight.numel() for weight in weights.values()])
            moved = {n: w - part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}
            if loss(moved) < value:
                break
            step = step / 2
        else:
            return weights
        weights, value = moved, loss(moved)
    return weights


def figures(approximation: Tensor, inverse: Tensor) -> dict[str, float]:
    """How close the matrix is to the inverse, and how much of its squared norm is on its diagonal."""
    return {
        "error": float((approximation - inverse).norm() / inverse.norm()),
        "diagonal_share": float(approximation.diagonal().square().sum() / approximation.square().sum()),
    }


def series(run: Run, settings: Settings, case: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Title and matrix of a picture for each partial sum and the inverse, and their figures."""
    with run.progress(f"training, {case}", 1) as bar:
        torch.manual_seed(run.options.seed)
        loss, weights = train(run, settings, case == "standardized")
        operator = hvp.HessianOperator(loss, weights)
        gradient_norm = torch.cat([g.flatten() for g in operator.gradient.values()]).norm()
        bar.set_postfix(loss=f"{float(loss(weights)):.4f}", gradient=f"{float(gradient_norm):.1e}")
        bar.update()
    hessian = operator.dense()
    eigenvalues = torch.linalg.eigvalsh(hessian)
    inverse, one = torch.linalg.inv(hessian), torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    alpha = float(1 / eigenvalues[-1])
    matrices, rows = {}, []
    with run.progress(f"series, {case}", sum(settings.products), "product") as bar:
        for products in settings.products:
            # All columns are one right-hand side, of the operator that works on each.
            solution = hvp.solve(lambda columns: hessian @ columns, one, hvp.Neumann(products, alpha=alpha))
            matrices[f"{products:,} product{'s' if products > 1 else ''}"] = solution.value
            rows.append({"products": products} | figures(solution.value, inverse))
            bar.update(products)
            bar.set_postfix(error=f"{rows[-1]['error']:.3f}")
    matrices["true inverse"] = inverse
    rows.append({"products": "inverse"} | figures(inverse, inverse))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    negative = int((eigenvalues < 0).sum())
    run.compare(
        f"{case}: weights; smallest and largest eigenvalue; condition; gradient norm",
        f"{len(hessian)}; {smallest:.2e}, {largest:.2e}; {largest / abs(smallest):.2e}; {float(gradient_norm):.1e}",
    )
    if negative:
        run.note(f"{case}: eigenvalues below zero, with which the series has no limit: {negative}.")
    return matrices, rows


def run(run: Run, settings: Settings) -> None:
    cases = {case: series(run, settings, case) for case in ("standardized", "raw")}
    for case, (_, rows) in cases.items():
        run.table(case, rows)
        for row in rows[:-1]:
            text = f"{row['error']:.4f}; {row['diagonal_share']:.0%}"
            what = f"{case}, {row['products']:,} HVPs: relative error (Frobenius); share of the diagonal"
            run.compare(what, text, "structure approaches")
        share = f"{rows[-1]['diagonal_share']:.0%}"
        run.compare(f"{case}, true inverse: share of the diagonal in the squared norm", share, "dominant diagonal")
    run.picture("inverse_hessian", draw(cases))


def draw(cases: dict[str, tuple[dict[str, Tensor], list[dict[str, Any]]]]) -> Figure:
    """Draw tanh of the matrices, first as they are and then divided by the mean of their diagonals, and the errors."""
    (standardized, standardized_rows), (raw, raw_rows) = cases.values()
    scaled = [{title: m / m.diagonal().mean() for title, m in case.items()} for case in (standardized, raw)]
    lines = [
        ("standardized inputs\ntanh of the entries", standardized, None),
        ("the same, divided by\nthe mean of the diagonal", scaled[0], standardized_rows),
        ("raw inputs, divided by\nthe mean of the diagonal", scaled[1], raw_rows),
    ]
    columns = len(standardized) + 1
    figure = Figure(figsize=(2.75 * columns, 8.6), layout="constrained")
    axes = figure.subplots(len(lines), columns)
    for line, (label, matrices, rows) in zip(axes, lines, strict=True):
        for axis, (title, matrix) in zip(line, matrices.items(), strict=False):
            axis.imshow(matrix.tanh().cpu().numpy(), cmap="bwr", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(title=title, xticks=[], yticks=[])
        line[0].set_ylabel(label)
        if rows is None:
            line[-1].set_axis_off()
            figure.colorbar(axis.images[0], ax=line[-1], location="left", fraction=0.5, label="tanh")
            continue
        products = [row["products"] for row in rows[:-1]]
        for key, name in (("error", "relative error"), ("diagonal_share", "share of diagonal")):
            line[-1].semilogx(products, [row[key] for row in rows[:-1]], "o-", ms=3, label=name)
        line[-1].set(xlabel="products", ylim=(0, 1.05))
        line[-1].grid(alpha=0.25)
        line[-1].legend(frameon=False, fontsize=8)
    figure.suptitle("Neumann series of the inverse Hessian: one hidden layer of tanh on Boston housing")
    return figure


EXPERIMENT = Experiment(
    name="inverse_hessian_pictures",
    source="Fig. 4",
    title="the inverse Hessian by products of the Neumann series",
    run=run,
    sizes={"small": Settings(), "paper": Settings(training_steps=50_000)},
)
