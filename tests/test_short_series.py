"""Short series by plain products in one call of the extension: what a general solve gives, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from recorded_checks import gradient_of
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.double_backward import Tape
from hvp_engine.differentiation.recorded import choice
from hvp_engine.differentiation.recorded.known_graphs import Known, Outline, Solve
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.hypergradients import short_series as module
from hvp_engine.hypergradients.short_series import plain_series
from hvp_engine.solvers.base import LinearSystem
from hvp_engine.solvers.neumann import outcome_of
from hvp_engine.solvers.spectrum import Spectrum

pytestmark = pytest.mark.skipif(module._C is None, reason="the extension has not been built")

Case = tuple[list[Tensor], list[Tensor]]
"""The gradient and the weights."""


def network(dtype: torch.dtype = torch.float32, width: int = 8) -> Case:
    net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    weights = list(net.parameters())
    loss = F.cross_entropy(net(torch.randn(5, 6, dtype=dtype)), torch.randint(3, (5,)))
    return gradient_of(loss + 0.1 * sum(w.square().sum() for w in weights), weights), weights


def each_others() -> Case:
    """The product for either weight is the tangent of the other one, which the update changes."""
    a, b = (torch.randn(7, requires_grad=True) for _ in range(2))
    return gradient_of((a * b).sum(), [a, b]), [a, b]


def itself() -> Case:
    w = torch.randn(7, requires_grad=True)
    return gradient_of(w.square().sum() / 2, [w]), [w]


CASES: dict[str, Callable[[], Case]] = {
    "float32": network,
    "float64": lambda: network(torch.float64),
    "several chunks": lambda: network(width=1000),
    "products that are each other's tangents": each_others,
    "a product that is its tangent": itself,
    "a scalar": lambda: (gradient_of((w := torch.tensor(0.3, requires_grad=True)).exp(), [w]), [w]),
}


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_a_general_solve_gives_the_same_bit_for_bit(name: str, damping: float) -> None:
    torch.manual_seed(0)
    gradient, weights = CASES[name]()
    v = [torch.randn_like(w) for w in weights]
    kept = [x.clone() for x in v]
    solver, tape = hvp.Neumann(6, 0.05, damping=damping), Tape(gradient, weights)
    found = plain_series(tape, v, solver)
    assert found is not None
    true, solution = LinearSystem(tape, EagerEngine(), Spectrum()).solve(v, solver)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found[0], true, strict=True))
    outcome = outcome_of(found[1], 6, v[0].dtype)
    assert outcome.residual_norm == pytest.approx(solution.residual_norm, rel=1e-5)
    assert outcome.status is solution.status
    assert all(torch.equal(a, b) for a, b in zip(v, kept, strict=True))


def test_what_a_general_solve_is_for() -> None:
    gradient, weights = network()
    v = [torch.randn_like(w) for w in weights]
    tape = Tape(gradient, weights)
    for solver in (
        hvp.Neumann(3),
        hvp.Neumann(0, 0.1),
        hvp.Neumann(3, 0.1, form="accumulate"),
        hvp.Neumann(3, 0.1, preconditioner=lambda x: x),
        hvp.ConjugateGradient(3),
        hvp.Neumann(100, 1e3),  # diverges
    ):
        assert plain_series(tape, v, solver) is None
    v[0][0] = torch.nan
    assert plain_series(tape, v, hvp.Neumann(3, 0.1)) is None


@pytest.mark.parametrize("what", ["transposed", "convolution", "none", "unused", "sparse", "bfloat16", "wide vector"])
def test_products_that_are_not_dense(what: str) -> None:
    w = torch.randn(4, 4, requires_grad=True)
    weights, v = [w], [torch.randn(4, 4)]
    if what == "transposed":
        gradient = gradient_of((w @ w).sum() + (w * w.t()).sum(), weights)
    elif what == "convolution":
        net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False))
        weights = list(net.parameters())
        v = [torch.randn_like(kernel) for kernel in weights]
        gradient = gradient_of(net(torch.randn(2, 4, 6, 6)).square().mean(), weights)
    elif what == "none":
        weights, v = [w, torch.ones(2, requires_grad=True)], [v[0], torch.ones(2)]
        gradient = gradient_of((w**3).sum() + (weights[1] * torch.ones(2, requires_grad=True)).sum(), weights)
    elif what == "unused":
        weights, v = [w, torch.ones(2, requires_grad=True)], [v[0], torch.ones(2)]
        gradient = gradient_of((w**3).sum(), weights)
    elif what == "sparse":
        gradient = [F.embedding(torch.tensor([1, 2]), w, sparse=True).pow(3).sum() * torch.ones(4, 4)]
    elif what == "bfloat16":
        weights = [w.detach().bfloat16().requires_grad_()]
        gradient = gradient_of((weights[0] ** 3).sum(), weights)
    else:
        weights = [w.detach().double().requires_grad_()]
        gradient = gradient_of((weights[0] ** 3).sum(), weights)
    plain_series(Tape(gradient, weights), v, hvp.Neumann(3, 0.01))
    found = plain_series(Tape(gradient, weights), v, hvp.Neumann(3, 0.01))
    assert (found is None) is (what in {"bfloat16", "wide vector"}), "a product is made in vain each time"
    ours = hvp.approx_inverse_hvp(v, gradient, weights, 3, 0.01, engine="eager")
    true, _ = LinearSystem(Tape(gradient, weights), EagerEngine(), Spectrum()).solve(v, hvp.Neumann(3, 0.01))
    assert all(torch.equal(a, b) for a, b in zip(ours, true, strict=True))


def test_errors_are_those_of_a_general_solve() -> None:
    gradient, weights = network()
    v = [torch.randn_like(w) for w in weights]
    with pytest.raises(hvp.DivergenceError, match="alpha"):
        hvp.approx_inverse_hvp(v, gradient, weights, 60, 1e3, engine="eager")
    w = torch.randn(3, requires_grad=True)
    freed = gradient_of((w**3).sum(), [w])
    torch.autograd.grad(freed, [w], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        hvp.approx_inverse_hvp([torch.ones(3)], freed, [w], 3, 0.1)
    changed = gradient_of((w**3).sum(), [w])
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hvp.approx_inverse_hvp([torch.ones(3)], changed, [w], 3, 0.1)


# --- Who makes the products -------------------------------------------------------------------------------------------


def solve(by_program: bool, plain: float, program: float, fixed: float, products: int = 3) -> Solve:
    """One that has been timed."""
    seconds = products * (program if by_program else plain)
    return Solve(fixed=fixed, ended=seconds, products=products, by_program=by_program)


def known(plain: float, program: float, fixed: float) -> Known:
    """A kind of graph whose solves have been timed."""
    found = Known(adoptions=1)
    for by_program in [True, False] * 4:
        found.begin(solve(by_program, plain, program, fixed))
    found.begin(Solve())
    return found


def test_where_a_program_breaks_even() -> None:
    assert known(plain=2.0, program=1.0, fixed=5.0).breaks_even == pytest.approx(5.0 / 0.94)
    assert known(plain=1.0, program=2.0, fixed=5.0).breaks_even == float("inf")
    assert known(plain=2.0, program=1.0, fixed=5.0).settled


def test_both_ways_are_tried_in_turns_and_mixed_solves_tell_nothing() -> None:
    one, tried = Known(adoptions=1), []
    one.begin(Solve(products=9, ended=1.0, mixed=True))
    while not one.settled:
        tried.append(one.breaks_even == 0)
        one.begin(Solve(products=1, ended=1.0, by_program=tried[-1]))
        assert len(tried) < 20
    assert sum(tried) in (4, 5), "a solve's time is taken when the next one begins"


def shares_of_the_slower_way(plain: float, program: float, fixed: float, noise: Random) -> list[float]:
    """Of simulated solves of 3 products, on a machine that is busy now and then: in each 64 graphs, how many go the
    slower way."""
    outline, one, slower = Outline(products=3), Known(adoptions=1), []
    outline.read(one)
    for graph in range(512):
        if graph % 40 == 0:  # a busy phase slows all that falls into it, more or less
            busy = noise.choice([1.0, 1.0, 2.0, 4.0])
        by_program = False
        if outline.pays_from(lambda nodes: True) <= 3:
            slow = busy * noise.lognormvariate(0, 0.2) * (10 if noise.random() < 0.1 else 1)
            timed = Solve()
            one.begin(timed)
            by_program = one.breaks_even <= 3
            vars(timed).update(vars(solve(by_program, slow * plain, slow * program, slow * fixed)))
        slower.append(by_program is not (fixed + 3 * program < 3 * plain))
    return [sum(slower[i : i + 64]) / 64 for i in range(0, 512, 64)]


@pytest.mark.parametrize(("plain", "program", "fixed"), [(1.0, 0.9, 2.0), (2.0, 0.5, 2.0), (1.0, 2.0, 1.0)])
def test_the_faster_way_is_found_among_noise_and_kept(plain: float, program: float, fixed: float) -> None:
    noise = Random(0)
    late = sorted(sum(shares_of_the_slower_way(plain, program, fixed, noise)[1:]) / 7 for _ in range(60))
    assert late[30] < 0.02
    assert late[-3] < 0.2


def test_a_wrong_verdict_is_revised_and_a_right_one_confirmed_at_half_the_cost() -> None:
    outline, one = Outline(), known(plain=9.0, program=1.0, fixed=2.0)
    assert one.breaks_even < 1, "as if autograd had been busy with something else all four times"
    outline.read(one)
    for solves in (8, 4):
        one.time_again()
        made = 0
        one.begin(timed := Solve())
        while not one.settled:
            vars(timed).update(vars(solve(one.breaks_even == 0, 1.0, 1.0, 2.0)))
            one.begin(timed := Solve())
            made += 1
        assert (made, one.breaks_even) == (solves, float("inf"))


def test_graphs_are_timed_again_at_intervals_that_double() -> None:
    outline = Outline(products=3)
    assert outline.pays_from(lambda nodes: True) == 0, "nothing is known yet"
    outline.read(known(plain=2.0, program=1.0, fixed=5.0))
    again = []
    while outline.sights < 1536:
        if outline.pays_from(lambda nodes: True) == 0:
            again.append(outline.sights)
            outline.kinds[0].judged = True
    assert again == [16, 32, 64, 128, 256, 512, 1024, 1536]
    outline.read(Known())
    assert outline.pays_from(lambda nodes: True) == 0, "a kind without a program yet"


def test_a_kind_that_never_comes_again_is_not_waited_for() -> None:
    outline, steady = Outline(products=3), known(plain=1.0, program=2.0, fixed=5.0)
    outline.read(Known(sights=1))
    outline.read(steady)
    while outline.sights < 16:
        assert outline.pays_from(lambda *_: True) == 0
    steady.judged = True
    assert outline.pays_from(lambda *_: True) == float("inf")


def test_a_graph_is_not_read_where_autograd_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "settled", True)
    monkeypatch.setattr(Known, "breaks_even", 5.0)
    monkeypatch.setattr(Library, "affords", lambda *_: True)
    library, reads, series = Library(), [], []
    read, run = choice.contents_of, module._C.plain_series
    monkeypatch.setattr(choice, "contents_of", lambda *a: reads.append(1) or read(*a))
    monkeypatch.setattr(module._C, "plain_series", lambda *a: series.append(1) or run(*a))
    for call, terms in enumerate([3, 3, 3, 8, 3, 8]):
        gradient, weights = network()
        tape = RecordedLinearization(gradient, weights, library=library)
        v = [torch.randn_like(w) for w in weights]
        found = plain_series(tape, v, hvp.Neumann(terms, 0.05))
        assert (found is not None) == (terms == 3 or call == 0)
    assert len(reads) == 3, "the first one, to learn, and those of many terms"
    assert len(series) == 4


def test_any_number_of_terms_in_turns() -> None:
    """As whoever is found faster makes them, numbers are those of the loop."""
    torch.manual_seed(0)
    for call in range(40):
        gradient, weights = network(torch.float64)
        v = [torch.randn_like(w) for w in weights]
        terms = (3, 20, 1, 5)[call % 4]
        ours = hvp.approx_inverse_hvp(v, gradient, weights, terms, 0.1)
        term, total = v, v
        for _ in range(terms):
            products = torch.autograd.grad(gradient, weights, term, retain_graph=True)
            term = [a - 0.1 * b for a, b in zip(term, products, strict=True)]
            total = [a + b for a, b in zip(total, term, strict=True)]
        for mine, true in zip(ours, total, strict=True):
            torch.testing.assert_close(mine, 0.1 * true, rtol=1e-9, atol=1e-12)


def test_a_series_that_was_not_made_tells_nothing_of_its_time() -> None:
    """As where products are not dense: a general solve makes them, and is timed."""
    w = torch.randn(4, 4, requires_grad=True)
    tape = RecordedLinearization(gradient_of((w**3).sum(), [w]), [w], library=Library())
    assert tape.plainly(3, lambda _: None) is None
    assert not tape._solve.products
    assert tape.plainly(3, lambda pullback: pullback.at((torch.ones(4, 4),))()) is not None
    assert tape._solve.products == 3


def test_reading_a_graph_is_part_of_what_a_solve_by_a_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is read before the general solve that is timed."""
    now, read = [0.0], choice.contents_of

    def slowly(*arguments: Any) -> Any:
        now[0] += 100
        return read(*arguments)

    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(choice, "contents_of", slowly)
    monkeypatch.setattr(Known, "breaks_even", 0.0)
    library = Library()
    for _ in range(4):
        gradient, weights = network()
        tape = RecordedLinearization(gradient, weights, library=library)
        module.TapeSystem(tape).solve([torch.ones_like(w) for w in weights], hvp.Neumann(3, 0.05))
    assert tape.program is not None
    assert tape._solve.whole == 100
