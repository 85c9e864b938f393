"""Whether two linearizations of one problem agree: the check of every engine against eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout, norm_of
from hvp_engine._support.precision import float32_settings
from hvp_engine._support.random_state import one_thread
from hvp_engine.differentiation.linear_map import Linearization

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative difference of a product, by the coarsest dtype that it is computed in."""

PROBE_SEED = 20_191_106
"""Not 0, by which people draw weights: H w = 0 for a loss such as ||w||, and two roundings of 0 would be compared."""

_REDUCED = {"tf32": torch.float16, "bf16": torch.bfloat16}
"""What float32 is as coarse as where torch lets its operations round their inputs: TF32 keeps as many bits as
float16."""

_LEAST_MOVE = 0.01
"""What weights are taken to be in size, at least, where they are zero."""

_ROUNDING = 10.0
"""Units in the last place of the loss, for tangents of length 1: a smaller product is rounding, as where the loss is
constant and all terms cancel."""

_KINKS = 10.0
"""How many times as far as weights that are moved by a rounding move a result, a rounding elsewhere may move it."""

_COARSEST = max(_TOLERANCES.values())


CHECKED = frozenset(10**exponent for exponent in range(20))
"""Call numbers at which an engine is checked: the first, the tenth, the hundredth, and so on."""


class Schedule:
    """Counts the calls of what is checked at some of them, :data:`CHECKED`."""

    def __init__(self) -> None:
        self.calls = 0

    def due(self) -> bool:
        self.calls += 1
        return self.calls in CHECKED

    def due_alone(self) -> bool:
        """As :meth:`due`, of a check that runs alone: a call that gives up for that is made again, and counted then."""
        if not self.next_is_due():
            return self.due()
        with one_thread():
            return self.due()

    def next_is_due(self) -> bool:
        """Whether the next call is a number at which to check."""
        return self.calls + 1 in CHECKED


def probe(layout: Layout) -> list[Tensor]:
    """The same random tangents every time, from a generator of their own, laid out as solvers' vectors are: parts of
    one vector."""
    generator = torch.Generator(device=layout.device).manual_seed(PROBE_SEED)
    drawn = [
        torch.randn(shape, generator=generator, device=layout.device, dtype=torch.float32) for shape in layout.shapes
    ]
    return FlatVector.of(layout, drawn).tangents


def disagreement(
    candidate: Linearization,
    eager: Linearization,
    weights: Sequence[Tensor],
    dtypes: Iterable[torch.dtype],
    again: Callable[[bool], Linearization],
) -> str | None:
    """What differs by more than the tolerance, in words; None if nothing does.

    `dtypes` are those of the arithmetic: under autocast coarser ones than the weights'.

    Products are compared by their global norm: a convolution's bias before BatchNorm has a product near zero, of
    which single tensors would show nothing but rounding. Gradients are compared by what they are made of: at a minimum
    the terms cancel, and what is left is rounding. H t for a random t tells how large the terms are, for a change of
    the weights by t changes the gradient by as much: so they are about ||H t|| ||w|| / ||t||.

    Where a rounding decides on which side of a kink a unit is, as of ReLU after normalization, two right results may
    differ by more. `again(nudged)` gives eager's linearization once more, at weights that are moved by a rounding or
    where they are; see :func:`is_rounding`.
    """
    dtypes = tuple(dtypes)
    tangents = probe(eager.layout)
    moved = max(_norm(weights) / max(_norm(tangents), torch.finfo(torch.float32).tiny), _LEAST_MOVE)
    found_parts, expected = _parts(candidate, tangents), _parts(eager, tangents)
    made_of = {"gradient": moved * _norm(expected["product"])}
    loss = 0.0 if eager.loss is None else abs(float(eager.loss))
    noise = _ROUNDING * torch.finfo(eager.layout.state_dtype).eps * loss * _norm(tangents)
    for name, theirs in expected.items():
        ours, terms = found_parts[name], made_of.get(name, 0.0)
        if len(ours) != len(theirs):
            return f"the {name} has paths to {len(ours)} tensors, eager's to {len(theirs)}"
        found = difference(ours, theirs, dtypes, terms, noise)

        def once_more(nudged: bool, name: str = name) -> Sequence[Tensor]:
            return _parts(again(nudged), tangents)[name]

        if found is not None and not is_rounding(ours, theirs, once_more):
            return f"the {name} differs from eager's by {found:.2g} (relative)"
    return None


def _parts(made: Linearization, tangents: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What is compared of a linearization."""
    return {
        "gradient": list(made.gradient),
        "product": list(made.product(tangents)),
        "mixed product": list(_present(made.mixed(tangents))),
    }


def is_rounding(
    ours: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    again: Callable[[bool], Sequence[Tensor | None]],
) -> bool:
    """Whether `ours` and `theirs` are hardly further apart than `theirs` and what a rounding of the weights makes of
    them, which `again(True)` gives, and agree as well as in 16 bits. What is not the same where the weights are, by
    `again(False)`, is random instead.
    """
    expected = list(_present(theirs))

    def distance(found: Sequence[Tensor | None]) -> float:
        there = list(_present(found))
        if len(there) != len(expected):
            return math.inf
        return _norm([a - b for a, b in zip(there, expected, strict=True)])

    moved = distance(again(True))
    if not math.isfinite(moved) or distance(again(False)) > moved / _KINKS:
        return False
    return distance(ours) <= min(_KINKS * moved, _COARSEST * _norm(expected))


def difference(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    dtypes: Iterable[torch.dtype],
    terms: float = 0.0,
    noise: float = 0.0,
) -> float | None:
    """The relative difference of two lists, by the global norm, if it is beyond the tolerance of the coarsest of
    `dtypes`; None if it is not, or if `theirs` is not finite. `terms`, if larger, is the norm it is relative to; where
    all is at most `noise`, nothing differs."""
    device_type = theirs[0].device.type if theirs else "cpu"
    tolerance = max(_tolerance(dtype, device_type) for dtype in dtypes)
    distance, size = _norm([a - b for a, b in zip(ours, theirs, strict=True)]), _norm(theirs)
    norm = max(size, terms)
    if max(distance, size) <= noise:
        return None
    if not math.isfinite(norm) or distance <= tolerance * norm + torch.finfo(torch.float32).tiny:
        return None
    return distance / norm if norm else distance


def difference_of_products(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], dtypes: Iterable[torch.dtype]
) -> str | None:
    """As :func:`difference`, in words, of lists that have None where there is no path."""
    if [t is None for t in ours] != [t is None for t in theirs]:
        return "it has paths to other tensors"
    found = difference(list(_present(ours)), list(_present(theirs)), dtypes)
    return None if found is None else f"it differs by {found:.2g} (relative)"


def _tolerance(dtype: torch.dtype, device_type: str) -> float:
    """The tolerance for a dtype; for float32 that of what the settings in force reduce it to on this type of device."""
    coarse = [dtype]
    if dtype == torch.float32:
        coarse += [_REDUCED.get(setting, torch.bfloat16) for setting in float32_settings(device_type).values()]
    return max(_TOLERANCES.get(one, _COARSEST) for one in coarse)


def _present(tensors: Sequence[Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor is not None)


def _norm(tensors: Sequence[Tensor]) -> float:
    if not tensors:
        return 0.0
    return float(norm_of(tensors).detach())
