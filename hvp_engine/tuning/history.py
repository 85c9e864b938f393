"""The history of a tuning run: one record for each hyper step."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvp_engine._support.arguments import shown
from hvp_engine.solvers.solution import Status


@dataclass(frozen=True)
class Record:
    """One hyper step.

    Attributes:
        hyper_step: its number, counted from 0; a hyper step that was left out has no record.
        weight_steps: training steps made so far.
        train_loss, val_loss, gradient_norm: where the hypergradient was computed, on its batches; gradient_norm is
            ||dL_T/dw||.
        hypergradient_norm: before clipping.
        unfinished: how much the validation loss would change if training went on to its end, to first order; NaN if
            the estimator does not know.
        residual_norm, status, alpha: of the linear solve; NaN, "" and None for an estimator without one.
        training_seconds, hypergradient_seconds: of the training steps since the last record, and of this hyper step.
        metrics: what the evaluations returned; empty if there were none after this step.
    """

    hyper_step: int
    weight_steps: int
    train_loss: float
    val_loss: float
    gradient_norm: float
    hypergradient_norm: float
    unfinished: float
    residual_norm: float
    status: str
    alpha: float | None
    training_seconds: float
    hypergradient_seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def joined(self, metrics: Mapping[str, float]) -> Record:
        """The record with these metrics added."""
        if not isinstance(metrics, Mapping):
            raise TypeError(f"evaluate: expected a dict of numbers by name; got {shown(metrics)}")
        if taken := metrics.keys() & self.row().keys():
            raise ValueError(
                f"evaluate: expected names that are no fields of the record; got {sorted(taken)[0]!r}: rename it"
            )
        numbers = {}
        for name, metric in metrics.items():
            try:
                numbers[name] = float(metric)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"evaluate: expected a number as {name!r}; got {shown(metric)}") from None
        return dataclasses.replace(self, metrics={**self.metrics, **numbers})

    def row(self) -> dict[str, Any]:
        """The record as a flat dict, in which metrics are fields like the others."""
        row = dataclasses.asdict(self)
        return row | row.pop("metrics")

    def line(self) -> str:
        """The record as one line of text; if the solve went wrong, with the remedy."""
        text = (
            f"hyper step {self.hyper_step}: train {self.train_loss:.4g}, val {self.val_loss:.4g}, "
            f"|dL_T/dw| {self.gradient_norm:.2e}, |hypergradient| {self.hypergradient_norm:.2e}"
        )
        if not math.isnan(self.unfinished):
            text += f", unfinished {self.unfinished:+.1e}"
        if self.status:
            text += f", residual {self.residual_norm:.1e} ({self.status.lower().replace('_', ' ')})"
        if self.alpha is not None:
            text += f", alpha {self.alpha:.3g}"
        text += "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        text += f", {self.training_seconds:.2f} + {self.hypergradient_seconds:.2f} s"
        if self.status in (Status.DIVERGED.name, Status.NEGATIVE_CURVATURE.name):
            text += f" -> {Status[self.status].value.partition('; ')[2]}"
        return text


class History(list[Record]):
    """The records of a run, in order.

    >>> import hvp_engine as hvp
    >>> hvp.History().rows()
    []
    """

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict for each record, for example for `pandas.DataFrame`."""
        return [record.row() for record in self]

    def write_csv(self, path: str | Path) -> None:
        """Write a table with a header; a metric that was not evaluated is an empty cell."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def write_json(self, path: str | Path) -> None:
        """Write a list of objects; NaN and infinity, which JSON does not have, become null."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [{name: plain(value) for name, value in row.items()} for row in self.rows()]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")

    def state_dict(self) -> list[dict[str, Any]]:
        """One dict of fields for each record, for checkpoints."""
        return [dataclasses.asdict(record) for record in self]

    @classmethod
    def from_state_dict(cls, state: list[dict[str, Any]]) -> History:
        """The history that was saved."""
        return cls(Record(**fields) for fields in state)
