"""Fig. 4: the Neumann series as a picture, from the identity to the true inverse Hessian.

A network with one hidden layer of tanh on the Boston table, in float64 at a minimum that LBFGS finds, where the
Hessian is positive definite. The pictures show tanh of the entries of alpha sum_j (I - alpha H)^j, as the paper's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import hvp_engine as hvp
from examples.experiment import Experiment, Run
from hvp_engine import datasets
from hvp_engine.preparation import standardize


@dataclass(frozen=True)
class Settings:
    hidden: int = 13
    log_decay: float = -4.0
    training_steps: int = 5000
    products: tuple[int, ...] = (1, 5, 20, 100, 1000, 10_000)


def train(run: Run, settings: Settings) -> tuple[Any, dict[str, Tensor]]:
    """The regularized loss as a function of the weights, and its minimum."""
    device = run.options.device
    table = datasets.boston(run.options.data)
    inputs, targets = (standardize(x)[0].to(device) for x in (table.features, table.targets))
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
    return loss, {name: weight.detach() for name, weight in weights.items()}


def figures(approximation: Tensor, inverse: Tensor) -> dict[str, float]:
    """How near the matrix is to the inverse, and how much of its squared norm lies on its diagonal."""
    return {
        "error": float((approximation - inverse).norm() / inverse.norm()),
        "diagonal_share": float(approximation.diagonal().square().sum() / approximation.square().sum()),
    }


def run(run: Run, settings: Settings) -> None:
    with run.progress("training", 1) as bar:
        loss, weights = train(run, settings)
        operator = hvp.HessianOperator(loss, weights)
        gradient_norm = torch.cat([g.flatten() for g in operator.gradient.values()]).norm()
        bar.set_postfix(loss=f"{float(loss(weights)):.4f}", gradient=f"{float(gradient_norm):.1e}")
        bar.update()
    hessian = operator.dense()
    eigenvalues = torch.linalg.eigvalsh(hessian)
    if eigenvalues[0] <= 0:
        run.note("The Hessian has negative eigenvalues here, so the series has no limit.")
    inverse, one = torch.linalg.inv(hessian), torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    alpha = float(1 / eigenvalues[-1])
    matrices, rows = {}, []
    with run.progress("series", sum(settings.products), "product") as bar:
        for products in settings.products:
            # All columns are one right-hand side, of the operator that works on each.
            solution = hvp.solve(lambda columns: hessian @ columns, one, hvp.Neumann(products, alpha=alpha))
            matrices[f"{products:,} product{'s' if products > 1 else ''}"] = solution.value
            rows.append({"products": products} | figures(solution.value, inverse))
            bar.update(products)
            bar.set_postfix(error=f"{rows[-1]['error']:.3f}")
    matrices["true inverse"] = inverse
    run.table("errors", [*rows, {"products": "inverse"} | figures(inverse, inverse)])
    run.picture("inverse_hessian", draw(matrices, rows))
    size, condition = len(hessian), float(eigenvalues[-1] / eigenvalues[0])
    run.compare("weights, condition, gradient norm at w*", f"{size}, {condition:.3g}, {float(gradient_norm):.1e}")
    for row in rows:
        text = f"{row['error']:.3f}, {row['diagonal_share']:.0%}"
        run.compare(f"{row['products']:,} HVPs: relative error, share of the diagonal", text, "structure approaches")
    share = figures(inverse, inverse)["diagonal_share"]
    run.compare("true inverse: share of the diagonal in the squared norm", f"{share:.0%}", "dominant diagonal")


def draw(matrices: dict[str, Tensor], rows: list[dict[str, Any]]) -> Figure:
    """tanh of each matrix, and the errors by products."""
    figure = Figure(figsize=(14, 7.2), layout="constrained")
    columns = (len(matrices) + 2) // 2
    axes = figure.subplots(2, columns).flatten()
    for axis in axes[len(matrices) + 1 :]:
        axis.set_axis_off()
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=False):
        picture = axis.imshow(matrix.tanh().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(picture, ax=axes[columns - 1], shrink=0.7, label="tanh of the entries")
    axis = axes[len(matrices)]
    products = [row["products"] for row in rows]
    axis.semilogx(products, [row["error"] for row in rows], "o-", label="relative error (Frobenius)")
    axis.semilogx(products, [row["diagonal_share"] for row in rows], "o-", label="share of the diagonal")
    axis.set(xlabel="products", ylim=(0, 1.05))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle("Neumann series of the inverse Hessian: one hidden layer of tanh on Boston housing")
    return figure


EXPERIMENT = Experiment(
    name="inverse_hessian_pictures",
    source="Fig. 4",
    title="the inverse Hessian by products of the Neumann series",
    run=run,
    sizes={"small": Settings(), "paper": Settings(training_steps=50_000)},
)
