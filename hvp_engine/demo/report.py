"""The demo's results as a table, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import hvp_engine
from hvp_engine.errors import HvpError

_COLOURS = ("#8a8f98", "#e08a1e", "#1f6fb2", "#b3392f")
_MEGA = 1e6


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and accuracy."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One way to train. `curve` holds (hyper step, validation loss, test loss); time and peak are per hyper step."""

    name: str
    hyperparameters: int
    train: Scores
    validation: Scores
    test: Scores
    curve: tuple[tuple[int, float, float], ...]
    hyper_step_seconds: float | None
    peak_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All runs (no tuning, one decay, one per weight implicit and unrolled), and the peak memory by number of terms."""

    runs: tuple[Run, ...]
    terms: tuple[int, ...]
    implicit_bytes: tuple[int, ...]
    unrolled_bytes: tuple[int, ...]
    pixel_log_decay: Tensor
    initial_log_decay: float
    source: str
    sizes: tuple[int, int, int]
    network: str
    seed: int
    hyper_steps: int
    warmup_steps: int
    inner_steps: int
    device: str
    threads: int
    seconds: float


def table(comparison: Comparison) -> str:
    """The comparison as text."""
    heads = ("train", "validation", "test")
    lines = [
        "",
        f"{comparison.source}: {' / '.join(map(str, comparison.sizes))} for train / validation / test; "
        f"network {comparison.network}; {comparison.warmup_steps} training steps, then {comparison.hyper_steps} hyper "
        f"steps after {comparison.inner_steps} more each; seed {comparison.seed}; {comparison.device}, "
        f"{comparison.threads} threads",
        "",
        f"{'':24}{'decays':>9}" + "".join(f"{head:>18}" for head in heads) + f"{'hyper step':>13}{'its peak':>11}",
        f"{'':24}{'':9}" + f"{'loss / accuracy':>18}" * 3 + f"{'ms':>13}{'MB':>11}",
    ]
    for run in comparison.runs:
        parts = (run.train, run.validation, run.test)
        milliseconds = "-" if run.hyper_step_seconds is None else f"{1e3 * run.hyper_step_seconds:.1f}"
        megabytes = "-" if run.peak_bytes is None else f"{run.peak_bytes / _MEGA:.1f}"
        scores = "".join(f"{f'{part.loss:.4f} / {part.accuracy:.1%}':>18}" for part in parts)
        lines.append(f"{run.name:24}{run.hyperparameters:>9,}{scores}{milliseconds:>13}{megabytes:>11}")
    lines += [
        "",
        "peak MB of one hypergradient" + "".join(f"{terms:>9}" for terms in comparison.terms) + "   products or steps",
        f"{'  implicit, Neumann':28}" + "".join(f"{size / _MEGA:9.1f}" for size in comparison.implicit_bytes),
        f"{'  unrolled SGD':28}" + "".join(f"{size / _MEGA:9.1f}" for size in comparison.unrolled_bytes),
        "",
        *_conclusions(comparison),
    ]
    return "\n".join(lines)


def _conclusions(comparison: Comparison) -> list[str]:
    untuned, single, many, _ = comparison.runs
    implicit, unrolled = comparison.implicit_bytes, comparison.unrolled_bytes
    lines = [
        f"From no tuning to {run.name}: validation loss {untuned.validation.loss:.4f} -> {run.validation.loss:.4f}, "
        f"test loss {untuned.test.loss:.4f} -> {run.test.loss:.4f}."
        for run in (single, many)
    ]
    first, last = comparison.terms[0], comparison.terms[-1]
    return [
        *lines,
        f"The decays were fitted to the {comparison.sizes[1]:,} validation examples: only the test column is unbiased.",
        f"From {first} to {last} terms the peak memory grows by a factor of {implicit[-1] / implicit[0]:.2f} "
        f"(implicit) and {unrolled[-1] / unrolled[0]:.2f} (unrolled).",
        f"All together took {comparison.seconds:.0f} s.",
    ]


def make_folder(folder: Path) -> None:
    """Make the output folder, or raise :class:`HvpError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HvpError(f"--out: expected a folder that can be written; got {folder}: {error}") from error


def write(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write `demo.json` and `demo.png` into `folder`, each completely or not at all."""
    content = dataclasses.asdict(comparison) | {
        "pixel_log_decay": comparison.pixel_log_decay.tolist(),
        "versions": {
            "hvp_engine": hvp_engine.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    figures, picture = folder / "demo.json", folder / "demo.png"
    _write_atomically(figures, lambda file: file.write(json.dumps(content, indent=1).encode()))
    _write_atomically(picture, lambda file: plot(comparison, file))
    return figures, picture


def read(figures: Path) -> Comparison:
    """The comparison that :func:`write` wrote to `demo.json`."""
    content = json.loads(figures.read_text())
    del content["versions"]
    runs = [
        run | {part: Scores(**run[part]) for part in ("train", "validation", "test")} | {"curve": tuple(run["curve"])}
        for run in content["runs"]
    ]
    content |= {name: tuple(content[name]) for name in ("terms", "implicit_bytes", "unrolled_bytes", "sizes")}
    content["pixel_log_decay"] = torch.tensor(content["pixel_log_decay"])
    return Comparison(**content | {"runs": tuple(Run(**run) for run in runs)})


def _write_atomically(target: Path, fill: Callable[[BinaryIO], object]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_matplotlib() -> Any:
    """matplotlib's Figure, or an error that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HvpError(f"the plot needs matplotlib ({error}): `pip install hvp_engine[demo]`") from error
    return Figure


def plot(comparison: Comparison, file: BinaryIO) -> None:
    """Draw losses over the hyper steps, final losses, memory by terms, and decays by pixel, as a PNG."""
    figure = require_matplotlib()(figsize=(12.5, 9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(
        f"One weight decay for each of {comparison.runs[2].hyperparameters:,} weights, tuned by implicit "
        f"differentiation\n{comparison.source}, network {comparison.network}",
        fontsize=14,
    )
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    _draw_curves(axes[0, 0], comparison)
    _draw_losses(axes[0, 1], comparison)
    _draw_memory(axes[1, 0], comparison)
    _draw_pixels(figure, axes[1, 1], comparison)
    figure.savefig(file, format="png", dpi=120)


def _draw_curves(axis: Any, comparison: Comparison) -> None:
    for run, colour in zip(comparison.runs, _COLOURS, strict=True):
        steps, validation, test = zip(*run.curve, strict=True)
        axis.semilogy(steps, validation, "o-", ms=3, color=colour, lw=2, label=run.name)
        axis.semilogy(steps, test, "o", ms=2, color=colour, lw=1.2, ls=(0, (4, 2)))
    axis.plot([], [], color="black", lw=2, label="validation")
    axis.plot([], [], color="black", lw=1.2, ls=(0, (4, 2)), label="test")
    axis.set(title="Loss while training", xlabel="hyper steps", ylabel="cross-entropy")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _draw_losses(axis: Any, comparison: Comparison) -> None:
    for row, (run, colour) in enumerate(zip(comparison.runs, _COLOURS, strict=True)):
        for offset, part, alpha in ((-0.2, run.validation, 1.0), (0.2, run.test, 0.45)):
            axis.barh(row + offset, part.loss, 0.36, color=colour, alpha=alpha)
            label = f"{'validation' if offset < 0 else 'test'} {part.loss:.3f}, {part.accuracy:.1%} right"
            axis.annotate(label, (part.loss, row + offset), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(comparison.runs)), [run.name.replace(", ", ",\n") for run in comparison.runs])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(max(run.validation.loss, run.test.loss) for run in comparison.runs))
    axis.set(title="Loss at the end", xlabel="cross-entropy")


def _draw_memory(axis: Any, comparison: Comparison) -> None:
    curves = (
        (comparison.unrolled_bytes, _COLOURS[3], "unrolled SGD"),
        (comparison.implicit_bytes, _COLOURS[2], "implicit"),
    )
    for sizes, colour, label in curves:
        megabytes = [size / _MEGA for size in sizes]
        axis.plot(comparison.terms, megabytes, "o-", color=colour, lw=2)
        axis.annotate(
            f"{label}: {megabytes[-1]:.1f} MB",
            (comparison.terms[-1], megabytes[-1]),
            (0, 9),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axis.set_xticks(comparison.terms)
    axis.set_ylim(0, 1.15 * max(comparison.unrolled_bytes + comparison.implicit_bytes) / _MEGA)
    axis.set(
        title="Peak memory of one hypergradient",
        xlabel="Hessian-vector products, or unrolled steps",
        ylabel="MB",
    )
    axis.grid(alpha=0.25)


def _draw_pixels(figure: Any, axis: Any, comparison: Comparison) -> None:
    change = (comparison.pixel_log_decay - comparison.initial_log_decay).numpy()
    limit = max(abs(change.min()), abs(change.max()), 1e-6)
    image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set(title="Learned decay of the first layer, by input pixel")
    figure.colorbar(image, ax=axis, shrink=0.8, label="mean change of the log-decay")
