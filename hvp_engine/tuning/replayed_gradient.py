"""The training gradient as CUDA graphs, one for each kind of batches."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.isolation import recorded_modules
from hvp_engine._support.random_state import global_generators, random_state_kept
from hvp_engine._support.torch_compat import foreach_copy_, is_traceable_wrapper_subclass, versions_of
from hvp_engine.differentiation.double_backward import filled
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.problem import Problem, is_constant
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.engines.gradients import gradients_disagree
from hvp_engine.engines.recording import CaptureError, copies
from hvp_engine.engines.replays import Counted
from hvp_engine.engines.surroundings import Reads, Surroundings, address_of
from hvp_engine.tuning.replayed import Grads, Replayed, Take, first_line, kept

Evaluate = Callable[[Sequence[Any]], tuple[Tensor, Grads]]
"""A loss and its gradient, of batches."""

_SMALL = 1 << 16
"""Numbers in a tensor up to which it is put back after a recording, unseen whether it was changed: kernels of batch
normalization do not tell."""

_MOST = 8
"""Kinds of batches that are known at a time, the latest used."""


@dataclass
class _Kind:
    """What is known of batches that look alike.

    Attributes:
        read: the tensors that the loss reads beside the batches, by the address of their memory.
        changes: those that it may change.
        there: which tensors have a gradient.
        addresses: of the tensors that a recording reads where they are.
    """

    met: bool = False
    refused: bool = False
    surroundings: Surroundings | None = None
    schedule: Schedule = field(default_factory=Schedule)
    read: dict[int, Tensor] = field(default_factory=dict)
    changes: list[Tensor] = field(default_factory=list)
    there: list[bool] = field(default_factory=list)
    addresses: tuple[int, ...] = ()
    take: Take | None = None


class ReplayedGradient(Replayed):
    """The training gradient, replayed for batches of a kind that has come several times.

    Like an engine's programs it is compared with what runs without graphs, at first and more and more rarely, and given
    up where they differ.
    """

    def __init__(self, recorder: Counted):
        super().__init__("training gradient", recorder)
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def __call__(
        self, problem: Problem, evaluate: Evaluate, buffers: Callable[[], list[Tensor]]
    ) -> tuple[Tensor, Grads]:
        """The loss and its gradient, of the batches that are the problem's input.

        Arguments:
            evaluate: gives them without graphs.
            buffers: tensors that the loss may change, beside those of modules that it is seen to call.
        """
        if not self._chances and not self._kinds:
            return evaluate(*problem.inputs)
        kind = self._kind_of(problem)
        if kind.take is not None:
            outdated = self._outdated(kind, problem)
            if outdated is None:
                return self._replayed(kind, problem, evaluate)
            take, kind.take, kind.surroundings = kind.take, None, None
            self._drop(take, outdated)
        if not self._chances or kind.refused or not kind.met:
            kind.met = True
            return evaluate(*problem.inputs)
        if kind.surroundings is None:
            with recorded_modules() as modules:
                found, kind.read = _watched(problem, evaluate)
            kind.surroundings = Surroundings(problem, modules)
            return found
        return self._first(kind, kind.surroundings, problem, evaluate, buffers)

    def _kind_of(self, problem: Problem) -> _Kind:
        key = problem.look_of_inputs
        kind = self._kinds.pop(key, None)
        if kind is None and not self._chances:
            return _Kind()
        self._kinds[key] = kind = _Kind() if kind is None else kind
        if len(self._kinds) > _MOST:
            _, oldest = self._kinds.popitem(last=False)
            self.reason = f"there are more than {_MOST} kinds of batches"
            if oldest.take is not None:
                self._drop(oldest.take, self.reason)
        return kind

    def _outdated(self, kind: _Kind, problem: Problem) -> str | None:
        """What is not as it was recorded, in words."""
        assert kind.surroundings is not None
        if (changed := kind.surroundings.changed()) is not None:
            return f"the loss reads {changed}, which changes"
        if kind.surroundings.outdated():
            return "modules change between training and evaluation, or torch the dtypes that it computes in"
        return None if kind.addresses == _addresses(problem, kind) else "tensors are replaced by others"

    def _first(
        self,
        kind: _Kind,
        surroundings: Surroundings,
        problem: Problem,
        evaluate: Evaluate,
        buffers: Callable[[], list[Tensor]],
    ) -> tuple[Tensor, Grads]:
        """The loss and its gradient without a graph; it is recorded if a replay will do all that this has done."""
        tensors, device = problem.split[0], problem.weights[0].device
        changes = {id(tensor): tensor for tensor in (*buffers(), *surroundings.buffers)}
        changes |= {id(tensor): tensor for tensor in _small(kind.read, problem)}
        unchanging = [tensor for tensor in (*tensors, *kind.read.values()) if id(tensor) not in changes]
        reason = _unfit(problem, [*tensors, *kind.read.values(), *changes.values()])
        versions, drawn = [] if reason else versions_of(unchanging), _drawn_on_host(device)
        found, read = _watched(problem, evaluate)
        if reason is None:
            if read.keys() != kind.read.keys():
                reason = "the loss reads other tensors every time"
            elif versions != versions_of(unchanging):
                reason = "the loss changes a tensor that it reads"
            elif drawn is None or drawn != _drawn_on_host(device):
                reason = "the loss draws random numbers on the host"
            elif any(grad is not None and grad.layout is not torch.strided for grad in found[1]):
                reason = "gradients are sparse"
            elif not surroundings.same():
                reason = f"the loss reads {surroundings.changed() or 'a mode'}, which changes"
        if reason is not None:
            kind.surroundings = None
            self._fail(reason)
            return found
        kind.changes, kind.schedule = list(changes.values()), Schedule()
        kind.there = [grad is not None for grad in found[1]]
        try:
            inputs = [tensor.detach().clone() for tensor in tensors]
            batches = problem.inputs_of(inputs)

            def body() -> list[Tensor]:
                loss, grads = evaluate(*batches)
                return [loss, *(grad for grad in grads if grad is not None)]

            kind.take = self._record(body, inputs, kind.changes)
            kind.addresses = _addresses(problem, kind)
            self.reason = ""
        except (CaptureError, torch.OutOfMemoryError) as error:
            kind.refused = True
            self._fail(first_line(error))
        return found

    def _replayed(self, kind: _Kind, problem: Problem, evaluate: Evaluate) -> tuple[Tensor, Grads]:
        if not kind.schedule.due():
            return self._played(kind, problem)
        try:
            with random_state_kept(problem.weights[0].device), kept(kind.changes):
                expected = evaluate(*problem.inputs)
                changed = copies(kind.changes)
        except torch.OutOfMemoryError as error:  # there is room for the graph or for this, not for both
            self._give_up(first_line(error))
            return evaluate(*problem.inputs)
        found = self._played(kind, problem)
        wrong = _disagreement(found, expected, problem) or _difference(kind.changes, changed)
        if not wrong:
            return found
        if changed:
            foreach_copy_(kind.changes, changed)
        self._give_up(wrong)
        warnings.warn(
            f"training gradients are not replayed from now on: {wrong}; a loss must be a function of its arguments: "
            "pass what changes between calls in the batch or the hyperparameters",
            stacklevel=5,
        )
        return expected

    def _played(self, kind: _Kind, problem: Problem) -> tuple[Tensor, Grads]:
        assert kind.take is not None
        loss, *grads = self._play(kind.take, problem.split[0])
        found = iter(grads)
        return loss, [next(found) if there else None for there in kind.there]

    def _give_up(self, reason: str) -> None:
        self._recorder.retire()
        for kind in self._kinds.values():
            kind.take = None  # the caller may hold the kind: its memory is needed now
        self._kinds.clear()
        self.refuse(reason)


def _addresses(problem: Problem, kind: _Kind) -> tuple[int, ...]:
    moved = *problem.weights, *problem.hyperparameters
    return tuple([tensor.data_ptr() for tensor in (*moved, *kind.changes, *kind.read.values())])


def _watched(problem: Problem, evaluate: Evaluate) -> tuple[tuple[Tensor, Grads], dict[int, Tensor]]:
    """The loss and its gradient, and what was read for them beside the batches."""
    with Reads() as reads:
        found = evaluate(*problem.inputs)
    for tensor in problem.split[0]:
        reads.found.pop(address_of(tensor), None)
    return found, reads.found


def _small(read: dict[int, Tensor], problem: Problem) -> list[Tensor]:
    """Those beside weights and hyperparameters that are cheap to put back, whether or not the loss changes them."""
    own = set(map(address_of, (*problem.weights, *problem.hyperparameters)))
    others = [tensor for address, tensor in read.items() if address not in own and tensor.numel() <= _SMALL]
    return [tensor for tensor in others if tensor.layout is torch.strided and 0 not in tensor.stride()]


def _unfit(problem: Problem, tensors: Sequence[Tensor]) -> str | None:
    """Why what the loss reads rules out a recording, if it does."""
    device = problem.weights[0].device
    for tensor in tensors:
        if tensor.device != device:
            return f"the loss reads a tensor on {tensor.device}: move all to {device}, batches in the loader"
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            return f"the loss reads a {type(tensor).__name__} that is made of several tensors"
        if tensor.is_inference():
            return "the loss reads a tensor that was made in inference mode"
    for leaf in problem.split[1]:
        if not is_constant(leaf):
            return f"a batch has a {type(leaf).__name__}, whose changes a graph would not see"
    return None


def _drawn_on_host(device: torch.device) -> tuple[Any, ...] | None:
    """The states of generators that a replay does not draw from, to be compared; None if they cannot be."""
    states = global_generators()
    return states if states is None or device.type != "cpu" else states[1:]


def _disagreement(found: tuple[Tensor, Grads], expected: tuple[Tensor, Grads], problem: Problem) -> str:
    ours, theirs = (Gradient(loss, filled(grads, problem.weights), []) for loss, grads in (found, expected))
    return gradients_disagree(ours, theirs, problem)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    same = all(torch.allclose(a.double(), b.double(), 1e-2, 1e-5, True) for a, b in zip(found, expected, strict=True))
    return "" if same else "buffers differ"
