"""Every public function on random trees of tensors: the value of its closed form, or one of the documented errors."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from losses_on_random_trees import World
from random_tree_calls_of_losses import LOSS_CALLS
from random_tree_calls_of_operators import OPERATOR_CALLS
from random_trees import SILENT
from torch.utils import _pytree as pytree

import hvp_engine as hvp

SUBJECTS = LOSS_CALLS | OPERATOR_CALLS
NO_TENSORS = {
    "I",
    "LinearOperator",
    "use_backend",
    "differentiable",  # functions of tensors, not of trees
    # what is returned
    *("CheckResult", "Estimate", "ExtremeEigenvalues", "History", "HypergradientResult", "Influence", "Record"),
    *("ResponseJacobian", "Solution", "SpectralDensity", "Status", "Verdict"),
    # what is raised
    *(name for name in hvp.__all__ if name.endswith("Error")),
}
"""Public names that no caller hands tensors to."""
EXAMPLES, IN_SOAK = 300, 10_000
"""In all, spread over the subjects."""
DOCUMENTED = (hvp.HvpError, ValueError, TypeError)


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone, for the losses that are spread over one."""
    file = tmp_path_factory.mktemp("processes") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_public_name_is_tried_or_takes_no_tensors() -> None:
    assert set(hvp.__all__) == set(SUBJECTS) | NO_TENSORS
    assert not set(SUBJECTS) & NO_TENSORS


def examine(name: str, world: World) -> None:
    """One call: right, or refused for the flaw that it has and with the name of the argument that has it."""
    subject = SUBJECTS[name]
    try:
        found, truth = subject.call(world)
    except DOCUMENTED as error:
        note(f"{type(error).__name__}: {error}")
        if world.flaw is None and not world.trivial:
            raise AssertionError(f"refused without a flaw: {error}") from error
        argument = subject.called.get(world.where, world.where)
        if world.flaw not in (None, *SILENT) and not str(error).startswith(argument):
            raise AssertionError(f"{world.where} has the flaw; got: {error}") from error
        return
    assert world.flaw is None or world.flaw in SILENT, f"{world.where} with {world.flaw} was taken"
    numbers = torch.cat([leaf.detach().double().reshape(-1) for leaf in pytree.tree_leaves(found)])
    assert numbers.shape == truth.shape
    if world.propagates and not bool(torch.isfinite(truth).all()):
        assert not bool(torch.isfinite(numbers).all())
        return
    assert bool(torch.isfinite(numbers).all())
    # What a closed form adds up is of size 1, and may cancel.
    assert float((numbers - truth).norm()) <= world.tolerance * max(float(truth.norm()), 1.0)


def trial(name: str, examples: int, **options: Any) -> None:
    chosen = settings(
        max_examples=examples,
        deadline=timedelta(seconds=60),
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **options,
    )

    @chosen
    @given(st.data())
    def check(data: st.DataObject) -> None:
        subject = SUBJECTS[name]
        world = World(data.draw, subject.containers, subject.takes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(name, world)

    if not options.get("derandomize"):
        number = random.SystemRandom().randrange(2**32)
        print(f"{name}: seed {number}")
        check = seed(number)(check)
    check()


def share(name: str, examples: int) -> int:
    """How many of all examples are for this subject."""
    return round(SUBJECTS[name].share * examples / sum(subject.share for subject in SUBJECTS.values()) + 0.5)


@pytest.mark.parametrize("name", SUBJECTS)
def test_closed_form_or_documented_error(name: str) -> None:
    trial(name, share(name, EXAMPLES), derandomize=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", SUBJECTS)
def test_closed_form_or_documented_error_at_random(name: str) -> None:
    trial(name, share(name, IN_SOAK))
