"""The drop-in in loops as scripts write them: twenty weights in many forms, against the plain loop each time.

Every call sees a new batch; after a few calls a program makes the products, which is asserted where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.recorded import library, linearization
from hvp_engine.differentiation.recorded.library import Library

pytestmark = pytest.mark.usefixtures("float64_by_default", "programs_are_taken")
CALLS, TERMS, STEP = 6, 7, 0.1


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """What the calls of a test have built and adopted."""
    own = Library()
    monkeypatch.setattr(library, "LIBRARY", own)
    defaults = list(linearization.RecordedLinearization.__init__.__defaults__ or ())
    monkeypatch.setattr(linearization.RecordedLinearization.__init__, "__defaults__", (*defaults[:-1], own))
    yield own


def adoptions(programs: Library) -> int:
    return sum(known.adoptions for known in programs._graphs.values())


def loss_of(w: Tensor, examples: int = 12) -> Tensor:
    x, y = torch.randn(examples, 20), (torch.rand(examples) > 0.5).double()
    return F.binary_cross_entropy_with_logits(x @ w, y) + 0.01 * (w**2).sum()


def gradient(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, weights, create_graph=True))


def plain_loop(
    v: list[Tensor], f: list[Tensor], w: list[Tensor], alpha: float = STEP, damping: float = 0.0
) -> list[Tensor]:
    """alpha sum_j (I - alpha (H + damping I))^j v."""
    term, total = list(v), list(v)
    for _ in range(TERMS):
        products = torch.autograd.grad(f, w, term, retain_graph=True)
        term = [t - alpha * (h + damping * t) for t, h in zip(term, products, strict=True)]
        total = [a + b for a, b in zip(total, term, strict=True)]
    return [alpha * a for a in total]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-9, atol=1e-12)


def weight() -> Tensor:
    return (0.3 * torch.randn(20)).requires_grad_()


def test_a_dict_of_two_weights(programs: Library) -> None:
    w = {"a": torch.randn(20, requires_grad=True), "b": torch.randn((), requires_grad=True)}
    for _ in range(CALLS):
        x = torch.randn(9, 20)
        f = gradient(F.softplus(x @ w["a"] + w["b"]).mean() + 0.1 * w["b"] ** 4, list(w.values()))
        v = {name: torch.randn_like(part) for name, part in w.items()}
        ours = hvp.approx_inverse_hvp(dict(reversed(v.items())), dict(zip(w, f, strict=True)), w, TERMS, STEP)
        close(ours, plain_loop(list(v.values()), f, list(w.values())))
        assert ours[1].shape == ()
    assert adoptions(programs) >= CALLS - 2


def test_one_flat_vector(programs: Library) -> None:
    w = [torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)]
    for _ in range(CALLS):
        f = gradient(F.linear(torch.randn(6, 5), *w).tanh().square().sum(), w)
        v = torch.randn(24)
        ours = hvp.approx_inverse_hvp(v, torch.cat([g.reshape(-1) for g in f]), w, TERMS, STEP)
        theirs = plain_loop([v[:20].view(4, 5), v[20:]], f, w)
        close([ours], [torch.cat([part.reshape(-1) for part in theirs])])
    assert adoptions(programs) >= CALLS - 2


@pytest.mark.parametrize("engine", ["recorded", "eager"])
def test_one_flat_vector_that_was_gathered_in_place(engine: Any, programs: Library) -> None:
    """implicit-hyper-opt's way: sums of flat gradients, which need no product to be cut into the weights' parts."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    w = list(net.parameters())
    for _ in range(CALLS):
        f, parts = torch.zeros(29), []
        for _ in range(2):
            parts.append(gradient(net(torch.randn(6, 5)).square().mean(), w))
            f += torch.cat([g.contiguous().view(-1) for g in parts[-1]])
        v = torch.randn(58)[::2]
        ours = hvp.approx_inverse_hvp(v, f, net, TERMS, STEP, engine=engine)
        cut = [part.view(x.shape) for part, x in zip(v.split([x.numel() for x in w]), w, strict=True)]
        theirs = plain_loop(cut, [a + b for a, b in zip(*parts, strict=True)], w)
        close([ours], [torch.cat([part.reshape(-1) for part in theirs])])
    if engine == "recorded":
        assert adoptions(programs) >= CALLS - 2
        assert not any(known.hidden for known in programs._graphs.values())
        assert all(flat is True for _, (*_, flat), _ in programs._graphs), "the gradient was cut into parts"


def test_a_flat_vector_for_the_only_weight_of_a_list_comes_back_flat(programs: Library) -> None:
    w = weight()
    for given in ([w], {"w": w}, torch.nn.ParameterList([w])):
        weights = list(given.values()) if isinstance(given, dict) else list(given)
        (f,), v = gradient(loss_of(weights[0]), weights), torch.randn(20)
        close([hvp.approx_inverse_hvp(v, f, given, TERMS, STEP)], plain_loop([v], [f], weights))
    f, v = gradient(loss_of(w), [w]), torch.randn(20)
    close(hvp.approx_inverse_hvp(v, f[0], w, TERMS, STEP), plain_loop([v], f, [w]))


def test_none_for_a_weight_without_a_gradient(programs: Library) -> None:
    w = [weight(), torch.randn(3, requires_grad=True)]
    for _ in range(CALLS):
        f = gradient(loss_of(w[0]), w[:1])
        v = torch.randn(20)
        ours = hvp.approx_inverse_hvp([v, None], [*f, None], w, TERMS, STEP)
        close(ours, [*plain_loop([v], f, w[:1]), torch.zeros(3)])
    assert adoptions(programs) >= CALLS - 2


def test_damping_and_a_step_that_changes(programs: Library) -> None:
    w = weight()
    for call in range(CALLS):
        f, v = gradient(loss_of(w), [w]), torch.randn(20)
        alpha, damping = STEP / (1 + call), 0.1 * call
        close(
            hvp.approx_inverse_hvp([v], f, [w], TERMS, alpha, damping=damping), plain_loop([v], f, [w], alpha, damping)
        )
    assert adoptions(programs) >= CALLS - 2


def test_an_automatic_step(programs: Library) -> None:
    w = weight()
    for _ in range(CALLS):
        loss = loss_of(w)
        f, v = gradient(loss, [w]), torch.randn(20)
        hessian = torch.stack([torch.autograd.grad(f, [w], [e], retain_graph=True)[0] for e in torch.eye(20)])
        (ours,) = hvp.approx_inverse_hvp(v, loss, w, 4000, "auto", damping=0.1)
        true = torch.linalg.solve(hessian + 0.1 * torch.eye(20), v)
        assert (ours - true).norm() < 1e-6 * true.norm()
    assert adoptions(programs) >= CALLS - 2


def test_batches_of_changing_sizes(programs: Library) -> None:
    w = weight()
    for call in range(4 * CALLS):
        f, v = gradient(loss_of(w, 5 + call % 3), [w]), torch.randn(20)
        close(hvp.approx_inverse_hvp([v], f, [w], TERMS, STEP), plain_loop([v], f, [w]))
    assert adoptions(programs) >= 3 * (CALLS - 2), "a program for each size"


def test_other_weights_in_each_call(programs: Library) -> None:
    for call in range(CALLS):
        w = weight() if call % 2 else torch.nn.Parameter(weight().detach())
        f, v = gradient(loss_of(w), [w]), torch.randn(20)
        close(hvp.approx_inverse_hvp([v], f, [w], TERMS, STEP), plain_loop([v], f, [w]))
    assert adoptions(programs) >= CALLS - 2


def test_two_losses_that_alternate(programs: Library) -> None:
    w = weight()
    losses: list[Callable[[], Tensor]] = [lambda: loss_of(w), lambda: (torch.randn(4, 20) @ w).pow(4).mean()]
    for call in range(3 * CALLS):
        f, v = gradient(losses[call % 2](), [w]), torch.randn(20)
        close(hvp.approx_inverse_hvp([v], f, [w], TERMS, 1e-3), plain_loop([v], f, [w], 1e-3))
    assert adoptions(programs) >= 2 * (CALLS - 2)


def test_weights_and_hyperparameters_that_are_trained_between_calls(programs: Library) -> None:
    """betty's way: the same tensors all along, changed in place between the gradients; also the whole hypergradient."""
    w, decay = weight(), torch.zeros(20, requires_grad=True)

    def train() -> Tensor:
        x, y = torch.randn(12, 20), (torch.rand(12) > 0.5).double()
        return F.binary_cross_entropy_with_logits(x @ w, y) + (decay.exp() * w**2).sum() / 20

    for _ in range(CALLS):
        for _ in range(3):
            (step,) = torch.autograd.grad(train(), [w])
            with torch.no_grad():
                w.sub_(0.1 * step)
        loss, value = train(), loss_of(w)
        (found,) = hvp.hypergradient(loss, value, w, decay, hvp.Neumann(TERMS, STEP))
        f = gradient(loss, [w])
        (v,) = torch.autograd.grad(value, [w])
        (mixed,) = torch.autograd.grad(f, [decay], plain_loop([v], f, [w]))
        close([found], [-mixed])
        with torch.no_grad():
            decay.sub_(0.1 * found.sign())
    assert adoptions(programs) >= CALLS - 2


@pytest.mark.parametrize("calls_before", [0, 4], ids=["at first", "with a program"])
def test_what_was_changed_or_freed_is_refused(calls_before: int, programs: Library) -> None:
    w = weight()
    for _ in range(calls_before):
        hvp.approx_inverse_hvp([torch.randn(20)], gradient(loss_of(w), [w]), [w], TERMS, STEP)
    f = gradient(loss_of(w), [w])
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hvp.approx_inverse_hvp([torch.randn(20)], f, [w], TERMS, STEP)
    f = gradient(loss_of(w), [w])
    torch.autograd.grad(f, [w], [torch.ones(20)])
    with pytest.raises(RuntimeError, match="a second time"):
        hvp.approx_inverse_hvp([torch.randn(20)], f, [w], TERMS, STEP)
    f = gradient(loss_of(w), [w])
    for bad in (torch.full((20,), torch.nan), torch.full((20,), torch.inf)):
        with pytest.raises(hvp.NonFiniteError):
            hvp.approx_inverse_hvp([bad], f, [w], TERMS, STEP)
    with pytest.raises(ValueError, match=r"v\[0\]: expected shape \(20,\)"):
        hvp.approx_inverse_hvp([torch.ones(5, 4)], f, [w], TERMS, STEP)
    for _ in range(2):  # and all is well again
        v = torch.randn(20)
        close(hvp.approx_inverse_hvp([v], f, [w], TERMS, STEP), plain_loop([v], f, [w]))


def test_what_is_changed_between_forward_and_backward_is_refused(programs: Library) -> None:
    """A best response reads the graph in the forward pass; its program must not run on what the weights are later."""
    w, decay = weight(), torch.zeros(20, requires_grad=True)
    for call in range(CALLS):
        loss = loss_of(w) + (decay.exp() * w**2).sum() / 20
        (response,) = hvp.best_response(loss, w, decay, hvp.Neumann(TERMS, STEP))
        if call == CALLS - 1:
            break
        response.square().sum().backward()
    assert adoptions(programs) >= CALLS - 3
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        response.square().sum().backward()


def test_what_a_call_returns_and_is_given_stays(programs: Library) -> None:
    """The next call writes into no result of an earlier one, although small problems leave their buffers to it."""
    w = weight()
    results, copies = [], []
    for _ in range(CALLS):
        f, v = gradient(loss_of(w), [w]), torch.randn(20)
        kept = v.clone()
        (x,) = hvp.approx_inverse_hvp([v], f, [w], TERMS, STEP)
        assert torch.equal(v, kept) and w.grad is None
        results.append(x)
        copies.append(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))
