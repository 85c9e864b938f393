"""What the experiments share: their options, tuning with progress and checkpoints, and writing of results.

An experiment is a module with an :class:`Experiment`, whose function gets a :class:`Run` and the settings of a size. A
run writes its results to a folder of its own, `OUT/NAME[-DATASET]-SIZE[-RECIPE]-seedN`; `OUT/SUMMARY.md` has those of
every run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import hvp_engine as hvp
from examples.files import few_colours, write, write_picture, write_table
from examples.summary import summarize
from hvp_engine.errors import HvpError


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Arguments:
        name: the name of its module, which is also used on the command line.
        source: figures, tables or sections of the paper.
        title: one line.
        run: a function of the :class:`Run` and the settings.
        sizes: the settings of "small" and "paper", or a mapping to them from the data sets.
        datasets: values of `--dataset`; empty if there is no choice.
        recipes: values of `--recipe`, for an experiment with more than one set of optimizers and learning rates, or
            parts; the first is the default, which may be "".
    """

    name: str
    source: str
    title: str
    run: Callable[[Run, Any], None]
    sizes: Mapping[str, Any]
    datasets: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()

    def settings(self, options: Options) -> Any:
        """The settings of the size, and of the data set where each has its own."""
        found = self.sizes[options.size]
        return found[options.dataset] if isinstance(found, Mapping) else found


@dataclass(frozen=True)
class Options:
    """The command line."""

    size: str
    out: Path
    data: Path | None = None
    dataset: str = ""
    recipe: str = ""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume: bool = False


class Run:
    """One run of an experiment: its options, and where its results go.

    Attributes:
        options: the command line.
        folder: the folder of its results.
        costs: what :meth:`cost` recorded, by name.
    """

    def __init__(self, experiment: Experiment, options: Options, settings: Any):
        self.experiment, self.options, self.settings = experiment, options, settings
        parts = (experiment.name, options.dataset, options.size, options.recipe, f"seed{options.seed}")
        self.folder = options.out / "-".join(part for part in parts if part)
        self._comparisons: list[dict[str, str]] = []
        self._notes: list[str] = []
        self.costs: dict[str, dict[str, float]] = {}
        self._pictures: list[str] = []
        self._spent = {"seconds": 0.0, "processor_seconds": 0.0}
        self._started = time.perf_counter(), time.process_time()

    @property
    def results(self) -> Path:
        """The file of results, which exists once the run has finished."""
        return self.folder / "results.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, which is deleted once the run has finished."""
        return self.folder / "checkpoints"

    def start(self) -> None:
        """Make the folder; forget an earlier run unless it is to be resumed."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not self.options.resume:
                self.results.unlink(missing_ok=True)
                shutil.rmtree(self.checkpoints)
            elif self._times.exists():
                self._spent = json.loads(self._times.read_text())
        except OSError as error:
            raise HvpError(f"--out: expected a folder that can be written; got {self.options.out}: {error}") from error
        torch.manual_seed(self.options.seed)

    def tune(
        self,
        name: str,
        tuner: hvp.Tuner,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        hyper_steps: int,
        *,
        evaluate: Callable[[hvp.Tuner], Mapping[str, float]] | None = None,
        evaluate_every: int = 1,
        callbacks: Sequence[hvp.tuning.Callback | Callable[[hvp.Tuner, hvp.Record], bool | None]] = (),
        stop: Callable[[hvp.Record], bool] = lambda record: False,
        checkpoint_every: int = 50,
    ) -> hvp.History:
        """`tuner.fit` with a progress bar, checkpoints, and the history as `NAME.csv`; `stop` can end it early.

        The table has the first and the last hyper step and those that are evaluated, or all if none is. With `--resume`
        it continues from its checkpoint, and ends as if it had never been interrupted.
        """
        path = self.checkpoints / f"{name}.pt"
        if self.options.resume:  # no steps: only what the checkpoint holds
            tuner.fit(train_loader, val_loader, 0, progress=False, checkpoint=path)
        history = tuner.history
        metrics = dict(history[-1].metrics) if history else {}
        if not (history and stop(history[-1])):
            with self.progress(name, hyper_steps, "hyper step", tuner.hyper_steps) as bar:

                def advance(tuner: hvp.Tuner, record: hvp.Record) -> bool:
                    metrics.update(record.metrics)
                    losses = {"train": record.train_loss, "val": record.val_loss}
                    bar.set_postfix({key: f"{value:.4g}" for key, value in (losses | metrics).items()}, refresh=False)
                    bar.update(tuner.hyper_steps - bar.n)
                    return stop(record)

                history = tuner.fit(
                    train_loader,
                    val_loader,
                    hyper_steps,
                    progress=False,
                    checkpoint=path,
                    checkpoint_every=checkpoint_every,
                    callbacks=[*callbacks, advance],
                    evaluate=evaluate,
                    evaluate_every=evaluate_every,
                )
        every = 1 if evaluate is None else evaluate_every
        ends = [*history[:1], *history[-1:]]
        kept = [record for record in history if (record.hyper_step + 1) % every == 0 or record in ends]
        self.table(name, [record.row() for record in kept])
        training = sum(record.training_seconds for record in history)
        self.cost(name, len(history), training, sum(record.hypergradient_seconds for record in history))
        return history

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, something that JSON can hold; with `--resume`, its result from before the
        interruption."""
        path = self.checkpoints / f"{name}.json"
        if self.options.resume and path.exists():
            return json.loads(path.read_text())
        found = compute()
        write(path, json.dumps(found).encode())
        return found

    def spent(self) -> dict[str, float]:
        """Seconds of wall-clock and of processor time, including those before an interruption."""
        started, processor_started = self._started
        return {
            "seconds": self._spent["seconds"] + time.perf_counter() - started,
            "processor_seconds": self._spent["processor_seconds"] + time.process_time() - processor_started,
        }

    def interrupted(self) -> None:
        """Record the time spent so far, for the run that resumes this one."""
        write(self._times, json.dumps(self.spent()).encode())

    @property
    def _times(self) -> Path:
        return self.checkpoints / "times.json"

    def cost(self, name: str, hyper_steps: int, training_seconds: float, hypergradient_seconds: float) -> None:
        """Record what hypergradients cost compared with training, without evaluations."""
        seconds = training_seconds + hypergradient_seconds
        self.costs[name] = {
            "hyper_steps": hyper_steps,
            "seconds": seconds,
            "share_of_hypergradients": hypergradient_seconds / max(seconds, 1e-12),
            "ratio_to_plain_training": seconds / max(training_seconds, 1e-12),
        }

    def progress(self, name: str, total: int, unit: str = "step", done: int = 0) -> Any:
        """A progress bar with the time left."""
        return tqdm(total=total, initial=done, desc=f"{name:<24}", unit=unit, dynamic_ncols=True)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `NAME.csv`."""
        write_table(self.folder / f"{name}.csv", rows)

    def picture(self, name: str, figure: Figure) -> None:
        """Write `NAME.png`, and show it in the summary."""
        write_picture(self.folder / f"{name}.png", figure)
        self._pictures.append(f"{name}.png")

    def show(self, picture: Path) -> None:
        """Show a PNG in the summary that other code has written to the folder; it is compressed."""
        write(picture, few_colours(picture.read_bytes()))
        self._pictures.append(picture.name)

    def compare(self, what: str, ours: str, paper: str = "") -> None:
        """Add a line to the summary's table: what was measured, the result, and the paper's."""
        self._comparisons.append({"what": what, "paper": paper, "ours": ours})

    def note(self, text: str) -> None:
        """Add a remark below the table."""
        self._notes.append(text)

    def finish(self) -> None:
        """Write `results.json` and the summary, and delete the checkpoints."""
        options = self.options
        content = {
            "name": self.experiment.name,
            "dataset": options.dataset,
            "recipe": options.recipe,
            "source": self.experiment.source,
            "title": self.experiment.title,
            "size": options.size,
            "seed": options.seed,
            "settings": dataclasses.asdict(self.settings),
            "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "hvp_engine": hvp.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **self.spent(),
            "comparisons": self._comparisons,
            "notes": self._notes,
            "costs": self.costs,
            "pictures": self._pictures,
        }
        write(self.results, json.dumps(_finite(content), indent=1).encode())
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        summarize(options.out)


def execute(experiment: Experiment, options: Options, settings: Any = None) -> Run:
    """Run `experiment` with the settings of its size, or with others. Resuming a finished run changes nothing."""
    run = Run(experiment, options, experiment.settings(options) if settings is None else settings)
    if options.resume and run.results.exists():
        print(f"{run.folder}: finished already")
        return run
    with torch.random.fork_rng():
        run.start()
        try:
            experiment.run(run, run.settings)
        except BaseException:
            run.interrupted()
            raise
        run.finish()
    print(f"{run.folder}: written")
    return run


def _finite(value: Any) -> Any:
    """`value` for JSON, with null for NaN and infinity, and text for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
