"""Whether what a loss reads beside its arguments is still what a trace saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvp_engine._support.precision import dtype_settings
from hvp_engine._support.reading import changed, free_variables
from hvp_engine.differentiation.problem import Problem

_FEWEST_USES = 20
"""Calls that a trace should serve before something that it has read changes."""

_MOST_SHORT_LIVES = 2
"""Traces that may serve fewer, since some things change once, as a model does that goes from training to evaluation."""


class Surroundings:
    """What a loss reads beside its arguments, as it was when the loss was traced; see :func:`free_variables`.

    A trace has baked in numbers, and holds tensors themselves: a number that is another one now, or a name that stands
    for another tensor, outdates it. (What is written into a tensor in place, a trace sees.)

    Cost: some 0.1 us for each value.

    Arguments:
        problem: whose loss was traced.
        modules: that the loss has called.
        before: the surroundings of the trace that these replace.
    """

    def __init__(self, problem: Problem, modules: Sequence[torch.nn.Module], before: Surroundings | None = None):
        self._device_type = problem.weights[0].device.type
        self._variables = free_variables([problem.loss, *modules])
        self._settings = dtype_settings(self._device_type)
        self._uses = 0
        self._short_lives: int = 0 if before is None else before._short_lives + before._short_life

    @property
    def _short_life(self) -> bool:
        return self._uses < _FEWEST_USES

    def use(self) -> None:
        """Count a call that the trace serves."""
        self._uses += 1

    def changed(self) -> str | None:
        """The name of the first value that is not what it was."""
        found = changed(self._variables)
        if found is None and dtype_settings(self._device_type) != self._settings:
            return "autocast or torch's default dtype"
        return found

    @property
    def restless(self) -> bool:
        """Whether the next trace would hardly serve longer than those before."""
        return self._short_lives + self._short_life > _MOST_SHORT_LIVES
