"""Random state and seeds of our own calls."""

from __future__ import annotations

import pytest
import torch

from hvp_engine.isolation import Draws, is_isolated, isolated

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
