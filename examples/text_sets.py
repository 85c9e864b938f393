"""Penn Treebank for the experiments: read from `--data`, reduced to its most frequent words, in rows and sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples import datasets
from examples.datasets import Text
from hvp_engine.errors import DataError

UNKNOWN = "<unk>"


def load(folder: Path | None, words: int) -> Text:
    """The text with the `words` most frequent words of its training part, which include `<unk>` for all others."""
    if folder is None:
        raise DataError(
            "--data: expected a folder with ptb/ptb.train.txt and its siblings (no package has it); got none"
        )
    text = datasets.ptb(folder)
    if words >= len(text.words):
        return text
    if UNKNOWN not in text.words:
        raise DataError(f"{folder}: expected {UNKNOWN} among the words of ptb.train.txt, for the rare ones; got none")
    unknown = text.words.index(UNKNOWN)
    counts = text.train.bincount(minlength=len(text.words))
    counts[unknown] = counts.sum()
    kept = counts.argsort(descending=True, stable=True)[:words].sort().values
    numbers = torch.full((len(text.words),), int((kept == unknown).nonzero()))
    numbers[kept] = torch.arange(words)
    parts = (numbers[part] for part in (text.train, text.validation, text.test))
    return Text(*parts, tuple(text.words[number] for number in kept.tolist()))


def sequences(part: Tensor, count: int, time: int, generator: torch.Generator) -> Tensor:
    """`count` random passages of `time` + 1 consecutive words that do not overlap: int64 (count, time + 1)."""
    whole = len(part) // (time + 1)
    if whole < count:
        raise DataError(f"text: expected at least {count * (time + 1):,} words, {count} sequences; got {len(part):,}")
    chosen = torch.randperm(whole, generator=generator)[:count]
    return part[: whole * (time + 1)].view(whole, time + 1)[chosen]


def batches(part: Tensor, rows: int, time: int, context: int) -> list[Tensor]:
    """The text in `rows` of equal length, read `time` words at a time: int64 (rows, context + time + 1) each.

    A batch begins with the `context` words before the `time` words that are read, and ends with the word after them.
    The first batch takes its context from the end of the text.
    """
    length = len(part) // rows
    steps = (length - 1) // time
    if steps < 1:
        raise DataError(f"text: expected at least {rows * (time + 1):,} words, {rows} rows; got {len(part):,}")
    starts = torch.arange(rows)[:, None] * length + torch.arange(-context, time + 1)
    return [part[(starts + step * time) % len(part)] for step in range(steps)]


@torch.no_grad()
def perplexity(
    network: Callable[..., Any], weights: Mapping[str, Tensor], part: Tensor, rows: int = 20, time: int = 70
) -> float:
    """exp(mean cross-entropy) of every word of a text in `rows`, each read from its start, carrying the state along."""
    length = len(part) // rows
    text, device = part[: rows * length].view(rows, length), next(iter(weights.values())).device
    total, states = 0.0, None
    for words, following in zip(text[:, :-1].split(time, 1), text[:, 1:].split(time, 1), strict=True):
        logits, states, _, _ = network(weights, words.to(device), states)
        total += float(F.cross_entropy(logits.flatten(0, 1), following.to(device).flatten(), reduction="sum"))
    return math.exp(min(total / (rows * (length - 1)), 700.0))
