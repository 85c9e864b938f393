"""Cross-entropy and log-softmax with two derivatives by kernels: against torch's own, in every backend of a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from problems_with_known_answers import randn, relative_error
from torch import Tensor
from torch.nn import functional

import hvp_engine as hvp
from hvp_engine import differentiable
from hvp_engine.diagnostics.memory import peak_memory
from hvp_engine.differentiable import linear_cross_entropy_chunks
from hvp_engine.differentiation import losses_and_normalizations
from hvp_engine.differentiation.trace.partial_evaluation import partition
from hvp_engine.differentiation.trace.rewriting import verified_rewrites
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.errors import BackendError

WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5, 0.1, 1.0], dtype=torch.float64)
LABELS = torch.tensor([1, -100, 3, 6, 2])
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "everything": {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 3},
}


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with hvp.use_backend(request.param):
        try:
            differentiable.log_softmax(torch.zeros(1, 1))
        except BackendError as error:
            pytest.skip(str(error))
        yield request.param


def derivatives(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value, gradient, and the product of the Hessian with random tangents."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    cotangent = randn(value.numel(), seed=1).view(value.shape).to(value.dtype)
    gradient = torch.autograd.grad(value, leaves, cotangent, create_graph=True)
    tangents = [randn(*g.shape, seed=2 + k).to(g.dtype) for k, g in enumerate(gradient)]
    return [value.detach(), *(g.detach() for g in gradient), *torch.autograd.grad(gradient, leaves, tangents)]


def labels(options: dict[str, Any]) -> Tensor:
    return LABELS.where(LABELS != -100, options.get("ignore_index", -100))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_levels_are_torchs(backend: str, options: dict[str, Any]) -> None:
    target = labels(options)
    logits = randn(5, 7, seed=3)
    ours = derivatives(lambda z: differentiable.cross_entropy(z, target, **options), logits)
    theirs = derivatives(lambda z: functional.cross_entropy(z, target, **options), logits)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    target = labels(options)

    def function(z: Tensor) -> Tensor:
        return differentiable.cross_entropy(z, target, **options)

    logits = randn(5, 7, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("shape", [(7,), (2, 7, 3), (2, 7, 3, 2)])
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    places = () if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(7, places)
    for logits in (randn(*shape, seed=5), randn(*places, 7, seed=5).movedim(-1, len(shape[:1]) if places else 0)):
        for reduction in ("mean", "none"):
            ours = derivatives(lambda z, r=reduction: differentiable.cross_entropy(z, target, reduction=r), logits)
            theirs = derivatives(lambda z, r=reduction: functional.cross_entropy(z, target, reduction=r), logits)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax(backend: str, dim: int) -> None:
    x = randn(4, 3, 5, seed=6)
    ours = derivatives(lambda x: differentiable.log_softmax(x, dim), x)
    for a, b in zip(ours, derivatives(lambda x: functional.log_softmax(x, dim), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradcheck_of_log_softmax(backend: str, dim: int) -> None:
    x = randn(4, 3, 5, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: differentiable.log_softmax(x, dim), x)
    assert torch.autograd.gradgradcheck(lambda x: differentiable.log_softmax(x, dim), x)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_linear(backend: str, options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_chunks, "CHUNK_BYTES", chunk * 7 * 8)
    monkeypatch.setattr(linear_cross_entropy_chunks, "LEAST_ROWS", 1)
    target = labels(options)
    inputs = randn(5, 4, seed=7), randn(7, 4, seed=8), randn(7, seed=9)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return differentiable.linear_cross_entropy(h, w, target, b, **options)

    def theirs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(h, w, b), target, **options)

    for a, b in zip(derivatives(ours, *inputs), derivatives(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_linear_without_bias_and_with_a_constant(backend: str, frozen: int) -> None:
    target, inputs = torch.tensor([0, 2, 1]), [randn(3, 4, seed=7), randn(7, 4, seed=8)]
    constant = inputs.pop(frozen)

    def function(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(*((constant, x) if frozen == 0 else (x, constant)))

    ours = derivatives(function(lambda h, w: differentiable.linear_cross_entropy(h, w, target)), *inputs)
    theirs = derivatives(function(lambda h, w: functional.cross_entropy(h @ w.T, target)), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_linear_holds_no_matrix_of_all_logits() -> None:
    rows, words = 512, 20_000
    h, w = randn(rows, 8, seed=1).float().requires_grad_(), randn(words, 8, seed=2).float().requires_grad_()
    target = torch.arange(rows)

    def products() -> None:
        gradient = torch.autograd.grad(differentiable.linear_cross_entropy(h, w, target), [h, w], create_graph=True)
        torch.autograd.grad(gradient, [h, w], [torch.ones_like(h), torch.ones_like(w)])

    chunk = linear_cross_entropy_chunks.CHUNK_BYTES
    with peak_memory() as meter:
        products()
    assert rows * words * 4 > 1.2 * chunk
    assert meter.peak_bytes < 3.5 * chunk


@pytest.mark.parametrize("words", [1_000, 50_304])
def test_float32_is_as_exact_as_torchs(backend: str, words: int) -> None:
    logits, target = 3 * randn(6, words, seed=10), torch.arange(6) * 100
    exact = derivatives(lambda z: functional.cross_entropy(z, target), logits)
    ours = derivatives(lambda z: differentiable.cross_entropy(z, target), logits.float())
    theirs = derivatives(lambda z: functional.cross_entropy(z, target), logits.float())
    rounded = derivatives(lambda z: functional.cross_entropy(z, target), logits.float().double())
    for a, b, c, limit in zip(ours, theirs, rounded, (2e-7, 1e-6, 1e-6), strict=True):
        assert relative_error(a.double(), c) <= max(1.5 * relative_error(b.double(), c), limit)
    assert relative_error(ours[0].double(), exact[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    logits, target = randn(4, 600, seed=11).to(dtype), torch.tensor([0, 599, -100, 5])
    for function in (
        lambda z: differentiable.cross_entropy(z, target, label_smoothing=0.1),
        lambda z: differentiable.log_softmax(z),
        lambda z: differentiable.linear_cross_entropy(z, randn(9, 600, seed=1).to(z.dtype), target.clamp_max(8)),
    ):
        halves = derivatives(function, logits)
        assert {x.dtype for x in halves} == {dtype}
        floats = derivatives(function, logits.float())
        for a, b in zip(halves[:2], floats[:2], strict=True):
            assert relative_error(a.double(), b.double()) < 4 * torch.finfo(dtype).eps


def test_infinite_logits(backend: str) -> None:
    """Classes that are ruled out, as sampled softmaxes and beams do; and a row of nothing else is NaN, as torch's."""
    logits = randn(3, 5, seed=12)
    logits[:, 2] = -math.inf
    logits[2] = -math.inf
    target = torch.tensor([0, 2, 1])
    ours = differentiable.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(ours, functional.cross_entropy(logits, target, reduction="none"), equal_nan=True)
    leaf = logits[:1].clone().requires_grad_()
    found = derivatives(lambda z: differentiable.cross_entropy(z, target[:1]), leaf)
    for a, b in zip(found, derivatives(lambda z: functional.cross_entropy(z, target[:1]), leaf), strict=True):
        torch.testing.assert_close(a, b)


def test_large_logits_and_nan(backend: str) -> None:
    logits, target = randn(2, 40, seed=13).float() * 1e4, torch.tensor([3, 30])
    for a, b in zip(
        derivatives(lambda z: differentiable.cross_entropy(z, target), logits),
        derivatives(lambda z: functional.cross_entropy(z, target), logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    logits[0, 7] = math.nan
    assert differentiable.cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_levels_fit_each_other_as_torchs_do(backend: str, dtype: torch.dtype) -> None:
    """The logits are made again at every level: also where autocast is off by then."""
    target = torch.randint(30, (20,), generator=torch.Generator().manual_seed(0))
    hidden, weight = randn(20, 64, seed=1).to(dtype), randn(30, 64, seed=2).float()

    def found(layer: Callable[..., Tensor]) -> list[Tensor]:
        def function(h: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(h, w)

        return derivatives(function, hidden, weight)

    ours = found(lambda h, w: differentiable.linear_cross_entropy(h, w, target))
    for inner in (functional.cross_entropy, differentiable.cross_entropy):
        theirs = found(lambda h, w, inner=inner: inner(functional.linear(h, w), target))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and relative_error(a.double(), b.double()) < 0.03


def test_all_rows_ignored_and_none_at_all(backend: str) -> None:
    for target in (torch.full((3,), -100), torch.zeros(0, dtype=torch.int64)):
        logits = randn(len(target), 4, seed=1).requires_grad_()
        assert differentiable.cross_entropy(logits, target).isnan(), "0 / 0, as torch has it"
        for a in derivatives(lambda z, y=target: differentiable.cross_entropy(z, y, reduction="sum"), logits):
            assert not a.any()
        layer = functools.partial(differentiable.linear_cross_entropy, reduction="sum")
        total = derivatives(lambda h, y=target, layer=layer: layer(h, randn(4, 4, seed=2), y), logits)
        assert not any(a.any() for a in total)
        assert differentiable.log_softmax(logits).shape == logits.shape
        assert all(a.isfinite().all() for a in derivatives(differentiable.log_softmax, logits))


BAD: list[tuple[type[Exception], str, Callable[[], Tensor]]] = [
    (IndexError, "target: .*got 4 in row 1", lambda: differentiable.cross_entropy(torch.zeros(2, 4), _ints(0, 4))),
    (IndexError, "target: .*got -1 in row 0", lambda: differentiable.cross_entropy(torch.zeros(1, 4), _ints(-1))),
    (ValueError, "target: expected shape", lambda: differentiable.cross_entropy(torch.zeros(2, 4), _ints(0))),
    (ValueError, "0-dim", lambda: differentiable.cross_entropy(torch.zeros(()), _ints(0))),
    (ValueError, "at least one class", lambda: differentiable.cross_entropy(torch.zeros(1, 0), _ints(0))),
    (TypeError, "int64", lambda: differentiable.cross_entropy(torch.zeros(2, 4), torch.zeros(2))),
    (TypeError, "long", lambda: differentiable.cross_entropy(torch.zeros(2, 4), _ints(0, 1).int())),
    (TypeError, "input: .*int64", lambda: differentiable.cross_entropy(torch.zeros(1, 4).long(), _ints(0))),
    (TypeError, "input: .*complex", lambda: differentiable.log_softmax(torch.zeros(1, 4) + 0j)),
    (ValueError, "weight", lambda: differentiable.cross_entropy(torch.zeros(1, 4), _ints(0), torch.ones(3))),
    (
        ValueError,
        "weight: expected a constant",
        lambda: differentiable.cross_entropy(torch.zeros(1, 4), _ints(0), torch.ones(4, requires_grad=True)),
    ),
    (
        ValueError,
        "reduction",
        lambda: differentiable.cross_entropy(torch.zeros(1, 4), _ints(0), reduction="average"),
    ),
    (
        ValueError,
        "label_smoothing",
        lambda: differentiable.cross_entropy(torch.zeros(1, 4), _ints(0), label_smoothing=1.5),
    ),
    (
        ValueError,
        "input, linear_weight",
        lambda: differentiable.linear_cross_entropy(torch.zeros(1, 4), torch.zeros(5, 3), _ints(0)),
    ),
    (
        ValueError,
        "bias",
        lambda: differentiable.linear_cross_entropy(torch.zeros(1, 4), torch.zeros(5, 4), _ints(0), torch.zeros(4)),
    ),
]


def _ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


@pytest.mark.parametrize("error, words, call", BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_input(backend: str, error: type[Exception], words: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(error, match=words):
        call()


def test_third_derivatives_are_torchs(backend: str) -> None:
    target = torch.tensor([1, 0, -100])

    def third(loss: Callable[..., Tensor]) -> Tensor:
        z = randn(3, 4, seed=14).requires_grad_()
        (first,) = torch.autograd.grad(loss(z), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
        return torch.autograd.grad(second.pow(3).sum(), z)[0]

    theirs = third(lambda z: functional.cross_entropy(z, target))
    torch.testing.assert_close(third(lambda z: differentiable.cross_entropy(z, target)), theirs)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(third(lambda z: differentiable.linear_cross_entropy(z, eye, target)), theirs)
    ours = third(lambda z: functional.nll_loss(differentiable.log_softmax(z), target))
    torch.testing.assert_close(ours, theirs)


def test_opcheck(backend: str) -> None:
    z, target = randn(3, 5, seed=1), torch.tensor([0, 4, -100])
    ops, known = torch.ops.hvp_engine, (target, None, -100, 0.1)
    g, t, lse = randn(3, seed=2), randn(3, 5, seed=3), z.logsumexp(1)
    w, b = randn(5, 5, seed=4), randn(5, seed=5)
    leaf = [x.clone().requires_grad_() for x in (g, z, t, w, b)]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"]
    for operation, arguments in [
        (ops.cross_entropy, (leaf[1], *known)),
        (ops.cross_entropy_backward, (leaf[0], leaf[1], lse, *known)),
        (ops.cross_entropy_double_backward, (leaf[2], leaf[0], leaf[1], lse, *known)),
        (ops.log_softmax, (leaf[1],)),
        (ops.log_softmax_backward, (leaf[2], leaf[1])),
        (ops.log_softmax_double_backward, (t, leaf[2], leaf[1])),
        (ops.linear_cross_entropy, (leaf[1], leaf[3], leaf[4], *known)),
        (ops.linear_cross_entropy_backward, (leaf[0], leaf[1], leaf[3], leaf[4], lse, *known)),
        (ops.linear_cross_entropy_double_backward, (leaf[2], w, None, g, z, w, b, lse, *known)),
    ]:
        torch.library.opcheck(operation.default, arguments, test_utils=tests)


# --- in our calls --------------------------------------------------------------------------------------------------


WORDS = 2_000
HIDDEN = randn(40, 6, seed=20).float()


def loss(weights: list[Tensor], target: Tensor, separately: bool) -> Tensor:
    logits = torch.tanh(HIDDEN @ weights[0]) @ weights[1]
    if separately:
        return functional.nll_loss(functional.log_softmax(logits, 1), target)
    return functional.cross_entropy(logits, target, label_smoothing=0.1)


@pytest.mark.parametrize("separately", [False, True])
def test_traced_products_contain_single_operations(separately: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvp_engine.engines import traced

    parts = []
    monkeypatch.setattr(traced, "partition", lambda trace: parts.append(partition(trace)) or parts[-1])
    weights = [randn(6, 5, seed=21).float(), randn(5, WORDS, seed=22).float()]
    target, tangents = torch.arange(40), [randn(6, 5, seed=23).float(), randn(5, WORDS, seed=24).float()]
    with verified_rewrites():
        operator = hvp.HessianOperator(loss, weights, target, separately, engine="linearized")
    assert operator.linear_map.fallback is None
    eager = hvp.HessianOperator(loss, weights, target, separately, engine="eager")
    for a, b in zip(operator @ tangents, eager @ tangents, strict=True):
        assert relative_error(a.double(), b.double()) < 1e-5
    name = "log_softmax" if separately else "cross_entropy"
    inside = [str(node.target) for node in parts[0].tangent.module.graph.nodes if "hvp_engine" in str(node.target)]
    assert inside.count(f"hvp_engine.{name}_double_backward.default") == 1
    assert f"hvp_engine.{name}.default" not in inside, "the primal part's"
    outside = [str(node.target) for node in parts[0].primal.graph.nodes]
    assert f"hvp_engine.{name}.default" in outside and f"hvp_engine.{name}_backward.default" in outside


def test_small_problems_keep_their_native_programs() -> None:
    weights, target = [randn(6, 5, seed=21).float(), randn(5, 10, seed=22).float()], torch.arange(40) % 10
    operator = hvp.HessianOperator(loss, weights, target, False, engine="linearized")
    operator.solve([torch.ones_like(w) for w in weights], hvp.Neumann(3, alpha=0.1))
    functions = operator.linear_map.functions  # type: ignore[attr-defined]
    assert functions.native is not None and functions.native.program is not None, functions.native.describe()


@pytest.mark.parametrize("separately", [False, True])
def test_native_programs_have_our_operations(separately: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_and_normalizations, "_FEWEST_CLASSES", 1)
    monkeypatch.setattr(losses_and_normalizations, "_FEWEST_LOGITS", 1)
    weights, target = [randn(6, 5, seed=21), randn(5, 7, seed=22)], torch.arange(40) % 7
    target[3] = -100
    hidden = HIDDEN.double()

    def loss(weights: list[Tensor]) -> Tensor:
        logits = torch.tanh(hidden @ weights[0]) @ weights[1]
        if separately:
            return functional.nll_loss(functional.log_softmax(logits, 1), target, WEIGHT)
        return functional.cross_entropy(logits, target, WEIGHT, label_smoothing=0.1)

    operator = hvp.HessianOperator(loss, weights, engine="linearized")
    eager = hvp.HessianOperator(loss, weights, engine="eager")
    tangents, solver = [randn(6, 5, seed=23), randn(5, 7, seed=24)], hvp.Neumann(4, alpha=0.1)
    for ours, theirs in (
        (operator @ tangents, eager @ tangents),
        (operator.solve(tangents, solver).value, eager.solve(tangents, solver).value),
    ):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    functions = operator.linear_map.functions  # type: ignore[attr-defined]
    assert functions.native is not None and functions.native.program is not None, functions.native.describe()
    assert functions.partition.tangent.module.graph.find_nodes(
        op="call_function",
        target=getattr(
            torch.ops.hvp_engine, ("log_softmax" if separately else "cross_entropy") + "_double_backward"
        ).default,
    )


@pytest.mark.parametrize("separately", [False, True])
def test_losses_of_losses(separately: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative for each row's loss depends on the weights, too, and on weights of examples."""
    monkeypatch.setattr(losses_and_normalizations, "_FEWEST_CLASSES", 1)
    monkeypatch.setattr(losses_and_normalizations, "_FEWEST_LOGITS", 1)
    weights, target = [randn(6, 5, seed=21), randn(5, 7, seed=22)], torch.arange(40) % 7
    hidden, hyper = HIDDEN.double(), {"examples": randn(40, seed=25), "scale": randn(1, seed=26)}

    def loss(weights: list[Tensor], hyper: dict[str, Tensor]) -> Tensor:
        logits = torch.tanh(hidden @ weights[0]) @ weights[1] * hyper["scale"]
        if separately:
            losses = functional.nll_loss(functional.log_softmax(logits, 1), target, reduction="none")
        else:
            losses = functional.cross_entropy(logits, target, reduction="none")
        return (losses.square() * hyper["examples"].sigmoid()).sum()

    vector = [randn(6, 5, seed=23), randn(5, 7, seed=24)]
    found = [hvp.HessianOperator(loss, weights, hyper, engine=engine) @ vector for engine in ("linearized", "eager")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    def train(weights: list[Tensor], hyper: dict[str, Tensor], _: Tensor) -> Tensor:
        return loss(weights, hyper)

    def validation(weights: list[Tensor], hyper: dict[str, Tensor], _: Tensor) -> Tensor:
        return sum((w.square().sum() for w in weights), torch.zeros(()))

    hypergradients = [
        hvp.Hypergradient(train, validation, hvp.Neumann(3, alpha=1e-3), engine=engine)(weights, hyper, target, target)
        for engine in ("linearized", "eager")
    ]
    for name in hyper:
        a, b = (one.grads[name] for one in hypergradients)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("no_native_programs")
def test_several_right_hand_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    original, made = TracedLinearization._at_once, []

    def counting(self: TracedLinearization, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        made.append(len(stacked[0]))
        return original(self, stacked)

    monkeypatch.setattr(TracedLinearization, "_at_once", counting)
    weights, target = [randn(6, 5, seed=21).float(), randn(5, WORDS, seed=22).float()], torch.arange(40)
    operator = hvp.HessianOperator(loss, weights, target, False, engine="linearized")
    sides = [randn(9, *w.shape, seed=30 + k).float() for k, w in enumerate(weights)]
    stacked = operator.solve(sides, hvp.Neumann(3, alpha=0.1), batched=True).value
    assert made and set(made) == {9}, "by vmap, not one by one"
    for k in range(9):
        one = operator.solve([side[k] for side in sides], hvp.Neumann(3, alpha=0.1)).value
        for a, b in zip(stacked, one, strict=True):
            assert relative_error(a[k].double(), b.double()) < 1e-5
