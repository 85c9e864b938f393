"""What a Tuner is made of at one moment, for checkpoints: taken apart, checked, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvp_engine._support.random_state import RandomState
from hvp_engine.errors import CheckpointError
from hvp_engine.tuning import data_stream as batches
from hvp_engine.tuning.checkpoint import compact, compare_tensors
from hvp_engine.tuning.descent import Descent
from hvp_engine.tuning.history import History

if TYPE_CHECKING:
    from hvp_engine.tuning.tuner import Tuner


@dataclass(frozen=True)
class Position:
    """What moves in the middle of a step, before an optimizer does: cheap to take after every step.

    `moves` tells whether an optimizer's step has begun since.
    """

    moves: tuple[int, int]
    counters: dict[str, int]
    random: RandomState
    streams: dict[str, batches.Position]
    estimator: dict[str, Any]
    buffers: dict[str, Tensor]


def moves(tuner: Tuner) -> tuple[int, int]:
    """Steps begun by the two optimizers."""
    return tuner.weight_side.steps, tuner.hyper_side.steps


def broken(tuner: Tuner) -> bool:
    """Whether there is no going on from here: a weight is NaN or infinite, or a hyperparameter NaN.

    (An infinite hyperparameter may be meant: a log-decay of -inf is no decay.)
    """
    lost = any(not bool(weight.isfinite().all()) for weight in tuner.weights)
    return lost or any(bool(hyper.isnan().any()) for hyper in tuner.hyper)


def position(tuner: Tuner) -> Position:
    """Where `tuner` is now."""
    counters = {"hyper_steps": tuner.hyper_steps, "steps_to_go": tuner.steps_to_go, "failures": tuner.failures}
    estimator = tuner.estimator.state_dict() if hasattr(tuner.estimator, "state_dict") else {}
    return Position(
        moves=moves(tuner),
        counters=counters,
        random=RandomState.now(tuner.device),
        streams={name: stream.position() for name, stream in tuner.streams.items()},
        estimator=estimator,
        buffers={name: buffer.clone() for name, buffer in tuner.buffers().items()},
    )


def state_dict(tuner: Tuner, at: Position) -> dict[str, Any]:
    """Everything, as tensors and plain values; tensors are not copied."""
    return {
        "weights": _named(tuner.weight_names, tuner.weights),
        "hyper": _named(tuner.hyper_names, tuner.hyper),
        "initial_weights": _named(tuner.weight_names, tuner.initial_weights),
        "initial_buffers": tuner.initial_buffers,
        "buffers": at.buffers,
        "weight_side": tuner.weight_side.state_dict(),
        "hyper_side": tuner.hyper_side.state_dict(),
        "history": tuner.history.state_dict(),
        "counters": at.counters,
        "random": at.random.state_dict(),
        "streams": {name: stream.state_dict() for name, stream in at.streams.items()} | tuner.stream_states,
        "estimator": at.estimator,
        "estimator_type": type(tuner.estimator).__name__,
    }


def load_state_dict(tuner: Tuner, state: Mapping[str, Any], source: str) -> None:
    """Make `tuner` what it was; everything is checked before anything moves. `source` is what messages begin with."""
    _check(tuner, state, source)
    with torch.no_grad():
        for name, tensor in zip(tuner.weight_names, tuner.weights, strict=True):
            tensor.copy_(state["weights"][name])
        for name, tensor in zip(tuner.hyper_names, tuner.hyper, strict=True):
            tensor.copy_(state["hyper"][name])
        for name, buffer in tuner.buffers().items():
            buffer.copy_(state["buffers"][name])
    tuner.initial_weights = [state["initial_weights"][name] for name in tuner.weight_names]
    tuner.initial_buffers = state["initial_buffers"]
    tuner.weight_side.load_state_dict(state["weight_side"])
    tuner.hyper_side.load_state_dict(state["hyper_side"])
    tuner.history = History.from_state_dict(state["history"])
    tuner.hyper_steps = state["counters"]["hyper_steps"]
    tuner.steps_to_go = state["counters"]["steps_to_go"]
    tuner.failures = state["counters"]["failures"]
    if hasattr(tuner.estimator, "load_state_dict"):
        tuner.estimator.load_state_dict(state["estimator"])
    tuner.streams, tuner.stream_states = {}, dict(state["streams"])
    RandomState.from_state_dict(state["random"]).restore(tuner.device)


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: compact(tensor) for name, tensor in zip(names, tensors, strict=True)}


_PARTS = {
    "weights", "hyper", "initial_weights", "initial_buffers", "buffers", "weight_side", "hyper_side", "history",
    "counters", "random", "streams", "estimator", "estimator_type",
}  # fmt: skip


def _check(tuner: Tuner, state: Mapping[str, Any], source: str) -> None:
    if missing := _PARTS - state.keys():
        raise CheckpointError(
            f"{source}: expected a complete checkpoint; got one without {', '.join(sorted(missing))}: use another file"
        )
    compare_tensors(source, "weights", _named(tuner.weight_names, tuner.weights), state["weights"])
    compare_tensors(source, "hyperparameters", _named(tuner.hyper_names, tuner.hyper), state["hyper"])
    compare_tensors(source, "buffers", tuner.buffers(), state["buffers"])
    _check_side(tuner.weight_side, state["weight_side"], f"{source}: weight")
    _check_side(tuner.hyper_side, state["hyper_side"], f"{source}: hyper")
    if state["estimator_type"] != type(tuner.estimator).__name__:
        raise _other(f"{source}: estimator", type(tuner.estimator).__name__, state["estimator_type"])


def _check_side(side: Descent, state: Mapping[str, Any], name: str) -> None:
    mine = side.state_dict()
    for part in ("optimizer", "scheduler"):
        if mine[f"{part}_type"] != state[f"{part}_type"]:
            raise _other(f"{name}_{part}", mine[f"{part}_type"], state[f"{part}_type"])
    expected, found = ([len(group["params"]) for group in s["optimizer"]["param_groups"]] for s in (mine, state))
    if expected != found:
        raise _other(f"{name}_optimizer", f"groups of {expected} tensors", f"groups of {found}")


def _other(name: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: expected {expected} as in this Tuner; got {found} in the checkpoint: build the Tuner as it was when "
        "the checkpoint was written, or use another file"
    )
