"""Whether everything that a loss reads beside its arguments is still as it was when the loss was traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine._support.precision import dtype_settings
from hvp_engine._support.reading import changed, free_variables
from hvp_engine.differentiation.problem import Problem


class Surroundings:
    """What a loss reads beside its arguments, as it was when the loss was traced; see :func:`free_variables`.

    A trace has baked in numbers, and holds tensors themselves: a number that is another one now, or a name that stands
    for another tensor, makes it wrong. (What is written into a tensor in place, a trace sees.)

    Cost: some 0.1 us for each value.

    Arguments:
        problem: whose loss was traced.
        modules: that the loss has called.
    """

    def __init__(self, problem: Problem, modules: Sequence[torch.nn.Module]):
        self._device_type = problem.weights[0].device.type
        self._settings = dtype_settings(self._device_type)
        self._called = modules
        self._all = variables = free_variables([problem.loss, *modules])
        self._modes = [variable for variable in variables if variable.key == "training"]
        self._others = [variable for variable in variables if variable.key != "training"]

    def __deepcopy__(self, memo: dict[int, object]) -> Surroundings:
        """The same one: it looks at the globals of the loss's functions, which copies of these share."""
        return self

    def outdated(self) -> bool:
        """Whether modules are in another mode, training or evaluation, or torch computes in other dtypes: then the loss
        is traced anew."""
        return changed(self._modes) is not None or dtype_settings(self._device_type) != self._settings

    def changed(self) -> str | None:
        """The name of the first other value that is not what it was: then the loss is no function of its arguments."""
        return changed(self._others)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among them, buffers left out."""
        buffers = {id(buffer) for buffer in self.buffers}
        found = (variable.value for variable in self._others if isinstance(variable.value, Tensor))
        return [tensor for tensor in found if id(tensor) not in buffers]

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers of all modules among them, which a loss may change."""
        modules = (variable.value for variable in self._others if isinstance(variable.value, torch.nn.Module))
        found = {id(buffer): buffer for module in (*self._called, *modules) for buffer in module.buffers()}
        return list(found.values())

    def same(self) -> bool:
        """Whether all is what it was: neither outdated nor changed."""
        return changed(self._all) is None and dtype_settings(self._device_type) == self._settings
