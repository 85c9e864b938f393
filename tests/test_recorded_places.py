"""What a gradient's graph does not say by itself: whose places are empty, which of two equal numbers is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recorded_checks import assert_same, checked, gradient_of, level, plain, reason
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.owned import OwnedLinearization

pytestmark = [
    pytest.mark.usefixtures("float64_by_default", "programs_are_taken"),
    pytest.mark.filterwarnings("error:.*a recorded product"),
]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


# --- Places -----------------------------------------------------------------------------------------------------------


def test_which_hyperparameter_is_frozen() -> None:
    library, w = Library(), leaf(4)
    for active in (0, 0, 1, 1, 0):
        h = [torch.randn(4), torch.randn(4)]
        h[active].requires_grad_()
        made = checked(library, gradient_of((w**3 * h[active]).sum(), [w]), [w], h)
        assert level(made) == 1


def test_which_hypergradient_is_whose() -> None:
    """The same by the public function: the hypergradient must not come out at a frozen neighbour."""
    w = leaf(4)
    for active in (0, 0, 1, 1, 1):
        h = [torch.rand(4) + 0.5, torch.rand(4) + 0.5]
        h[active].requires_grad_()
        losses = ((w.exp() * h[active]).sum() + w.square().sum(), w.square().sum())
        found, true = (
            hvp.hypergradient(*losses, w, h, hvp.Neumann(3, 0.1), engine=engine) for engine in ("recorded", "eager")
        )
        torch.testing.assert_close(found, true)


def test_which_output_is_constant() -> None:
    library, a, b = Library(), leaf(4), leaf(4)
    for first in (True, True, False, False):
        f, c = (a * b) ** 3, torch.randn(4)
        assert level(checked(library, [f, c] if first else [c, f], [a, b])) == 1


def test_weights_that_are_one_or_frozen() -> None:
    library, w = Library(), leaf(4)
    for _ in range(3):
        f = gradient_of((w**3).sum(), [w])
        assert level(checked(library, [f[0], f[0]], [w, w])) == 1
        assert level(checked(library, f, [w], [w])) == 1
        assert level(checked(library, [f[0], torch.zeros(4)], [w, torch.zeros(4)])) == 1


def test_outputs_that_are_leaves_or_one() -> None:
    library, a, b = Library(), leaf(4), leaf(4)
    for _ in range(3):
        for outputs in ([a, b], [b, a], [a.view(2, 2).t().reshape(4), b * 1.0], [(a * b) ** 3] * 2):
            assert level(checked(library, outputs, [a, b])) == 1


def test_strides_count_from_where_a_tangent_begins() -> None:
    """Autograd takes by strides what is assigned to a part of a tensor; tangents of a solve are parts of one vector."""
    library, weights = Library(), [leaf(4, 3), leaf(3)]
    for _ in range(3):
        gradient = gradient_of(torch.linalg.householder_product(*weights).pow(3).sum(), weights)
        made = OwnedLinearization(gradient, weights, name="loss", library=library)
        for _ in range(3):
            tangents = FlatVector.of(made.layout, [torch.randn_like(weight) for weight in weights]).tangents
            true = plain(gradient, weights, tangents)
            assert_same(made.product(tangents), true, 1e-10)
        assert level(made) == 2


def test_nothing_and_lazy_views() -> None:
    library, a, e = Library(), leaf(4), leaf(0, 3)
    for _ in range(3):
        assert level(checked(library, gradient_of((e**3).sum() + (a**3).sum(), [e, a]), [e, a])) == 1
        z = torch.complex(a, 2 * a).conj()
        made = checked(library, gradient_of((z.imag**3).sum() + (z * z).real.sum(), [a]), [a])
        assert level(made) == 2 and "lazy view" in reason(made)


# --- Numbers ----------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "factors": lambda w, p, q: (p * w).exp().sum() + 2 * (q * w).sin().sum(),
    "divisors": lambda w, p, q: (w / p).exp().sum() + 2 * (w / q).sin().sum(),
    "both in one term": lambda w, p, q: ((p * w) * (q * w).exp()).sum(),
    "of losses": lambda w, p, q: (p * (w**3).sum()).sin() + (q * (w**3).sum()).cos(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_that_were_equal(name: str) -> None:
    """Which of two equal numbers an operation takes cannot be seen: once they differ, there is another program."""
    library, w = Library(), leaf(4)
    pairs = [(2.5, 2.5), (3.5, 3.5), (4.5, 4.5), (4.0, 5.0), (5.0, 4.0), (6.0, 7.0), (8.0, 8.0), (7.0, 6.5)]
    built = []
    for p, q in pairs:
        assert level(checked(library, gradient_of(SCHEDULES[name](w, p, q), [w]), [w])) == 1
        built.append(library.built)
    assert built[2] == 2, "a number that has changed once is an input"
    assert built[-1] == built[4], "so are both, once they have differed"


def test_numbers_of_other_kinds() -> None:
    library, w = Library(), leaf(4)
    for c in (2, 2.0, True, 1, 1.0, torch.tensor(2.0), 2, torch.tensor(3.0), 3.0, True, torch.tensor(1)):
        assert level(checked(library, gradient_of((w * c).exp().sum() ** 2, [w]), [w])) == 1


def test_a_number_that_keeps_changing_where_no_tensor_can_be() -> None:
    library, w = Library(), leaf(4)
    for p in (2.5, 3.5, 4.5, 2.5):
        loss = (w.abs() + 0.1).pow(p).sum() + torch.add(w.sin(), w, alpha=p).square().sum()
        assert level(checked(library, gradient_of(loss, [w]), [w])) == 1
