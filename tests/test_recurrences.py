"""The scalar recurrences of Krylov methods: every backend against the reference, and what a solver's step launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hvp_engine as hvp
from hvp_engine._support.flat_vector import Layout
from hvp_engine.ops import RECURRENCES, Scalars, bind_recurrence, reference

FLAGS = ("preconditioned", "negative", "moving", "least", "bad", "bad_metric")
SIGNED = ("alpha", "curvature", "metric", "cosine", "sine", "delta_bar", "gamma_bar", "phi", "phi_bar")


def numbers_of(name: str, seed: int) -> torch.Tensor:
    """Numbers as they may come up: flags 0 or 1, few of the others negative, and some zero, tiny, huge or NaN."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.rand(len(RECURRENCES[name]), generator=generator, dtype=torch.float64)
    special = torch.rand(len(state), generator=generator)
    for place, number in enumerate(RECURRENCES[name]):
        if number in FLAGS:
            state[place] = float(special[place] < 0.4)
        elif number in ("epsilon", "flat"):
            state[place] *= 1e-3
        elif number in SIGNED and special[place] < 0.5:
            state[place] *= -1
        elif special[place] > 0.85:
            state[place] = (0.0, 1e-200, 1e200, float("inf"), float("nan"))[int(special[place] * 1000) % 5]
    return state


@pytest.mark.parametrize("name", RECURRENCES)
def test_every_backend_makes_the_numbers_of_the_reference(target: torch.device, name: str) -> None:
    states = torch.stack([numbers_of(name, seed) for seed in range(200)])
    expected, found = states.clone(), states.to(target, copy=True)
    for row, other in zip(expected, found, strict=True):
        reference.bind_recurrence(name, row)()
        bind_recurrence(name, other)()
    assert (expected.nan_to_num(0.5) != states.nan_to_num(0.5)).any(1).sum() > 150
    for place, number in enumerate(RECURRENCES[name]):
        close = torch.isclose(found[:, place].cpu(), expected[:, place], rtol=1e-13, atol=0, equal_nan=True)
        assert close.all(), number


@pytest.mark.parametrize("name", RECURRENCES)
def test_opcheck(device: torch.device, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.hvp_engine, name).default, (numbers_of(name, 0).to(device),))


@pytest.mark.parametrize("name", RECURRENCES)
def test_numbers_that_do_not_fit(target: torch.device, name: str) -> None:
    state = numbers_of(name, 0).to(target)
    for error, wrong in ((TypeError, state.float()), (ValueError, state[1:]), (ValueError, state.repeat(2)[::2])):
        with pytest.raises(error, match=f"{name}: state: expected.*got"):
            bind_recurrence(name, wrong)


def test_numbers_by_name() -> None:
    scalars = Scalars(("a", "b", "c"), torch.device("cpu"))
    scalars["b"].fill_(2.0)
    assert scalars.data.tolist() == [0.0, 2.0, 0.0] and scalars.first(2).tolist() == [0.0, 2.0]


class _Counted(TorchDispatchMode):
    """How many operations of torch ran; on a GPU each is a launch at least."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches += not any(
            word in str(func) for word in ("aten.detach", "aten.view", "aten.select", "aten.slice")
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "solver, most",
    [
        (hvp.ConjugateGradient(8, tol=0.0), 1),
        (hvp.ConjugateGradient(8, tol=0.0, preconditioner=lambda v: v), 8),
        (hvp.MINRES(8, tol=0.0), 22),
        (hvp.MINRES(8, tol=0.0, preconditioner=lambda v: v), 32),
    ],
    ids=["cg", "preconditioned cg", "minres", "preconditioned minres"],
)
def test_a_step_takes_few_launches(solver: hvp.ConjugateGradient | hvp.MINRES, most: int) -> None:
    """Beside the fused ops: conjugate gradients once took 20 operations of torch for a step, and MINRES 93."""
    torch.manual_seed(0)
    weights = [torch.randn(70, 3), torch.randn(9)]
    iteration = solver.allocate(Layout.of(weights))
    iteration.start(weights)
    for _ in range(3):
        iteration.step([2 * view for view in iteration.direction.views])
    product = [2 * view for view in iteration.direction.views]
    with _Counted() as counted:
        iteration.step(product)
    assert counted.launches <= most
