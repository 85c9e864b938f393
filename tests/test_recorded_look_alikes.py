"""Losses that look alike and share one library: no program is taken for another's."""

from __future__ import annotations

import pytest
import recorded_look_alikes_of_layers  # noqa: F401  its losses join the list
import torch
from recorded_checks import checked, gradient_of, level, reason
from recorded_look_alikes import LOOK_ALIKES
from torch import Tensor

from hvp_engine.differentiation.recorded.library import Library

pytestmark = pytest.mark.usefixtures("float64_by_default")

HIDDEN = {
    "padding mode": "",
    "as_strided": "AsStrided",
    "fft, norm": "CopySlices",
}
"""Why some are at level 2; with an empty reason, only some of their parameters are."""

WITHOUT = {"cdist", *(["grid_sample"] if torch.__version__ < "2.12" else [])}
"""Those without a second derivative; torch 2.11 has none of grid_sample (pytorch issue 34704)."""

COARSE = {"dtype"}
"""Those that are computed in float32."""


def loss_of(name: str, w: Tensor, parameter: object) -> Tensor:
    """Each with two products of its own: a sum, and the square of one element."""
    function, _ = LOOK_ALIKES[name]
    first, second = function(w, parameter), function(w, parameter)
    return first.sum() + w.square().sum() + second.reshape(-1)[0].square()


@pytest.fixture(scope="module")
def library() -> Library:
    """One for all of them, as losses of a process share one."""
    return Library()


@pytest.mark.filterwarnings("error:.*a recorded product")
@pytest.mark.parametrize("name", [name for name in LOOK_ALIKES if name not in WITHOUT])
def test_none_is_taken_for_another(name: str, library: Library) -> None:
    w = (torch.rand(4, 4) + 0.1).requires_grad_()
    parameters = list(LOOK_ALIKES[name][1])
    for parameter in (*parameters, *parameters, *parameters[::-1]):
        with torch.no_grad():
            w.add_(0.01 * torch.rand(4, 4))
        gradient = gradient_of(loss_of(name, w, parameter), [w])
        made = checked(library, gradient, [w], tolerance=1e-5 if name in COARSE else 1e-10, products=2)
        assert level(made) < 3, reason(made)
        if HIDDEN.get(name, "no reason"):
            assert level(made) == (2 if name in HIDDEN else 1), reason(made)
            assert HIDDEN.get(name, "") in reason(made)


def test_they_are_many() -> None:
    assert len(LOOK_ALIKES) >= 122
