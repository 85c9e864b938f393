"""Random state and seeds of our own calls."""

from __future__ import annotations

import numpy
import pytest
import torch

from hvp_engine._support.isolation import Draws, is_isolated, isolated
from hvp_engine._support.random_state import _put_back, global_generators, random_state_kept

CPU = torch.device("cpu")


def test_random_state_comes_back() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with isolated(7, CPU):
        torch.rand(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_state_comes_back_after_an_exception() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), isolated(7, CPU):
        torch.rand(10)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    assert not is_isolated()


@pytest.mark.parametrize("drawn", range(4))
def test_numbers_of_numpy_go_on(drawn: int) -> None:
    """Also the second of two normal numbers, which numpy keeps beside the generator; however often one asks."""
    numpy.random.seed(3)
    for _ in range(drawn):
        numpy.random.randn()
    expected = numpy.random.get_state(legacy=False)
    for _ in range(3):  # the first time finds out whether a number waits, later ones may know it
        with isolated(7, CPU):
            first = numpy.random.randn(3)
            with isolated(8, CPU):
                other = numpy.random.randn(3)
        with isolated(7, CPU):
            assert (numpy.random.randn(3) == first).all() and (other != first).all()
        found = numpy.random.get_state(legacy=False)
        assert (found["state"]["key"] == expected["state"]["key"]).all()
        assert [found["state"]["pos"], found["has_gauss"], found["gauss"]] == [
            expected["state"]["pos"], expected["has_gauss"], expected["gauss"]
        ]  # fmt: skip
    assert numpy.random.randn() == numpy.random.RandomState(3).randn(drawn + 1)[-1]


def test_a_copy_of_the_generator_draws_what_it_would() -> None:
    numpy.random.seed(5)
    with random_state_kept(CPU):
        numpy.random.rand(700)  # past a refill of the 624 words
    for _ in range(2):
        with random_state_kept(CPU):
            inside = numpy.random.rand(700)
    assert (inside == numpy.random.rand(700)).all()


def test_another_bit_generator_of_numpy_comes_back() -> None:
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(1))
    try:
        with random_state_kept(CPU):
            inside = numpy.random.rand(3)
        assert (numpy.random.rand(3) == inside).all()
    finally:
        numpy.random.set_bit_generator(before)


def test_a_state_comes_back_whatever_bit_generator_was_put_in_meanwhile() -> None:
    before = numpy.random.get_bit_generator()
    state = global_generators()
    assert state is not None
    try:
        numpy.random.set_bit_generator(numpy.random.PCG64(1))
        _put_back(state)
        assert global_generators() == state
    finally:
        numpy.random.set_bit_generator(before)


def test_seed_decides_the_draw() -> None:
    def draw(seed: int) -> torch.Tensor:
        with isolated(seed, CPU):
            return torch.rand(5)

    torch.manual_seed(1)
    first = draw(7)
    torch.rand(3)
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)


def test_flags_inside_and_after() -> None:
    assert not is_isolated()
    with torch.no_grad():
        with isolated(7, CPU):
            assert is_isolated() and torch.is_grad_enabled()
            with isolated(8, CPU):
                assert is_isolated()
            assert is_isolated()
        assert not torch.is_grad_enabled()
    assert not is_isolated()


def test_random_state_of_each_device_comes_back(device: torch.device) -> None:
    """Also where the call is about tensors on the CPU and a GPU has been used before: seeding must not reach it."""

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else ())]

    torch.rand(10, device=device)
    before = states()
    draws = []
    for where in (CPU, device, device):
        with isolated(7, where):
            draws.append(torch.rand(10, device=where))
        assert all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    assert torch.equal(draws[1], draws[2])


def test_draws_differ_and_are_reproducible() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = Draws()
    seeds = [first.next_seed() for _ in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.get_rng_state(), state), "nothing is taken from the caller's generator"
    second = Draws()
    assert [second.next_seed() for _ in range(1000)] == seeds
    torch.manual_seed(12)
    assert Draws().next_seed() != seeds[0]


def test_draws_continue_from_their_state() -> None:
    draws, other = Draws(), Draws()
    draws.next_seed()
    other.load_state_dict(draws.state_dict())
    assert other.next_seed() == draws.next_seed()
