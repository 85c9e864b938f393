"""Attention and its two derivatives, in every backend, against autograd of the textbook formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, derivatives
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp
from hvp_engine.differentiable.attention.dropout import dropout_factors, philox

attention = hvp.differentiable.scaled_dot_product_attention

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the norm of each derivative. The output that is saved has the inputs' precision."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_three_levels(target: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs, cotangents, options = case.tensors(dtype, target)
    torch.manual_seed(0)
    found = derivatives(lambda *x: attention(*x, dropout_p=case.dropout_p, **options), inputs, cotangents)
    torch.manual_seed(0)
    expected = case.truth(inputs, cotangents, options)
    for ours, truth in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        assert (ours.double() - truth).norm() <= TOLERANCES[dtype] * (truth.norm() + 1e-3)


def test_rows_that_see_nothing_are_zeros_and_give_no_gradient(target: torch.device) -> None:
    inputs, cotangents, options = CASES["rows that see nothing"].tensors(torch.float32, target)
    value, grad_query, _, _, grad_grad_output, second, _, _ = derivatives(
        lambda *x: attention(*x, **options), inputs, cotangents
    )
    for rows in (value, grad_query, grad_grad_output, second):
        assert (rows[:, :, [0, 4]] == 0).all() and (rows[:, :, 1] != 0).all()


@pytest.mark.parametrize("name", ["plain", "causal", "grouped queries", "key padding", "three extents"])
def test_values_are_torchs(target: torch.device, name: str) -> None:
    inputs, _, options = CASES[name].tensors(torch.float64, target)
    torch.testing.assert_close(attention(*inputs, **options), F.scaled_dot_product_attention(*inputs, **options))


@pytest.mark.parametrize("strided", ["heads inside rows", "expanded", "reversed columns", "negative view"])
def test_memory_formats(target: torch.device, strided: str) -> None:
    def laid_out(x: Tensor) -> Tensor:
        if strided == "heads inside rows":  # as nn.MultiheadAttention has them
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if strided == "expanded":
            return x[:, :1].expand(-1, 3, -1, -1)
        return x.mT.contiguous().mT if strided == "reversed columns" else torch._neg_view(-x)

    inputs, cotangents, _ = CASES["plain"].tensors(torch.float64, target)
    found = derivatives(attention, [laid_out(x) for x in inputs], [laid_out(x) for x in cotangents])
    expected = derivatives(
        attention, [laid_out(x).resolve_neg().contiguous() for x in inputs], [laid_out(x).clone() for x in cotangents]
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.resolve_neg(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", ["query", "key", "value"])
def test_inputs_that_are_constants(target: torch.device, missing: str) -> None:
    """A gradient that nobody asks for has no cotangent."""
    inputs, cotangents, _ = CASES["plain"].tensors(torch.float64, target)
    at = ("query", "key", "value").index(missing)

    def products(function: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(i != at) for i, x in enumerate(inputs)]
        active = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(function(*leaves), active, cotangents[0], create_graph=True)
        return list(torch.autograd.grad(gradients, active, [c for i, c in enumerate(cotangents[1:]) if i != at]))

    with sdpa_kernel(SDPBackend.MATH):
        expected = products(F.scaled_dot_product_attention)
    torch.testing.assert_close(products(attention), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("empty", ["queries", "keys", "batch", "width", "value's width"])
def test_empty_extents(target: torch.device, empty: str) -> None:
    shapes = [[2, 3, 7, 5], [2, 3, 9, 5], [2, 3, 9, 6]]
    for tensor, extent in {
        "queries": [(0, 2)],
        "keys": [(1, 2), (2, 2)],
        "batch": [(0, 0), (1, 0), (2, 0)],
        "width": [(0, 3), (1, 3)],
        "value's width": [(2, 3)],
    }[empty]:
        shapes[tensor][extent] = 0
    inputs = [torch.ones(shape, device=target) for shape in shapes]
    cotangents = [torch.ones(*shapes[0][:3], shapes[2][3], device=target), *map(torch.ones_like, inputs)]
    found = derivatives(attention, inputs, cotangents)
    assert [list(x.shape) for x in found] == [list(x.shape) for x in (cotangents[0], *inputs, *cotangents)]
    assert all(x.isfinite().all() for x in found)
    if empty == "width":  # all keys weigh the same
        torch.testing.assert_close(found[0], torch.ones_like(found[0]))


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_masks_of_nothing(queries: int, keys: int) -> None:
    q, k, v = (torch.randn(2, 2, length, 4, requires_grad=True) for length in (queries, keys, keys))
    for mask in (torch.ones(queries, keys, dtype=torch.bool), torch.zeros(2, 1, 1, keys)):
        found = attention(q, k, v, mask)
        assert torch.equal(found, torch.zeros(2, 2, queries, 4))


def test_gradcheck(target: torch.device) -> None:
    inputs = [
        torch.randn(shape, dtype=torch.float64, device=target) for shape in ((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 3))
    ]
    leaves = [x.requires_grad_() for x in inputs]
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4], device=target)

    def function(*x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attention(*x, mask, 0.3, enable_gqa=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_third_and_fourth_derivatives_are_those_of_the_formula(target: torch.device) -> None:
    """They need whole matrices, but they are right: a loss with a gradient penalty has products with its Hessian."""
    inputs, _, options = CASES["rows that see nothing"].tensors(torch.float64, target)

    def derivative(function: Any, order: int) -> Tensor:
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves, **options).sin().sum()
        for _ in range(order):
            value = sum(g.sin().sum() for g in torch.autograd.grad(value, leaves, create_graph=True))
        return value.detach()

    with sdpa_kernel(SDPBackend.MATH):
        expected = [derivative(F.scaled_dot_product_attention, order) for order in (3, 4)]
    torch.testing.assert_close([derivative(attention, order) for order in (3, 4)], expected, rtol=1e-10, atol=0)


# --- dropout --------------------


@pytest.mark.parametrize(
    "counter, seed, words",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_its_published_numbers(counter: tuple, seed: int, words: tuple) -> None:
    """The known answers of Random123, for zeros, ones and digits of pi."""
    found = philox(tuple(map(torch.tensor, counter)), torch.tensor(seed))
    assert tuple(map(int, found)) == words


def test_dropout_masks_are_as_random_as_they_should_be() -> None:
    factors = dropout_factors(torch.tensor(5), (2, 3, 64, 66), 0.25, torch.float64)
    kept = factors > 0
    assert torch.equal(factors.unique(), torch.tensor([0, 1 / 0.75], dtype=torch.float64))
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):  # each key, each query, each head
        assert (kept.double().mean(dims) - 0.75).abs().max() < 0.12
    assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0], kept[1])


def test_dropout_follows_torchs_generator(target: torch.device) -> None:
    inputs, _, _ = CASES["plain"].tensors(torch.float32, target)
    torch.manual_seed(1)
    first, second = attention(*inputs, dropout_p=0.5), attention(*inputs, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(attention(*inputs, dropout_p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(*inputs)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"


# --- what is refused --------------------


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


NO_HEADS = {"query": ones(7, 5), "key": ones(9, 5), "value": ones(9, 6), "enable_gqa": True}
LEARNED = {"attn_mask": ones(7, 9, requires_grad=True), "query": ones(2, 3, 7, 5, requires_grad=True)}
GOOD = {"query": ones(2, 3, 7, 5), "key": ones(2, 3, 9, 5), "value": ones(2, 3, 9, 6)}


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "key: expected float32.*got torch.float64", {"key": ones(2, 3, 9, 5, dtype=torch.float64)}),
        (TypeError, "query: expected float32.*got torch.int64", {"query": ones(2, 3, 7, 5, dtype=torch.int64)}),
        (ValueError, "key: expected.*width 5.*got", {"key": ones(2, 3, 9, 4)}),
        (ValueError, "value: expected.*got", {"value": ones(2, 3, 8, 6)}),
        (ValueError, "broadcast.*enable_gqa=True", {"query": ones(2, 6, 7, 5)}),
        (ValueError, "heads that divide.*4; got 3", {"query": ones(2, 4, 7, 5), "enable_gqa": True}),
        (ValueError, "query: expected.*got shape", {"query": ones(5)}),
        (ValueError, "enable_gqa: expected.*heads", NO_HEADS),
        (ValueError, "attn_mask: expected.*broadcasts.*got", {"attn_mask": ones(7, 8, dtype=torch.bool)}),
        (ValueError, "attn_mask: expected.*broadcasts.*got", {"attn_mask": ones(1, 2, 3, 7, 9)}),
        (TypeError, "mask: expected a boolean or floating.*got torch.int64", {"attn_mask": ones(7, 9).long()}),
        (ValueError, "is_causal: expected False beside attn_mask", {"attn_mask": ones(7, 9), "is_causal": True}),
        (ValueError, "mask: expected.*not require grad.*SDPBackend.MATH", LEARNED),
        (ValueError, "dropout_p: expected.*got 1.5", {"dropout_p": 1.5}),
        (ValueError, "dropout_p: expected.*got -0.1", {"dropout_p": -0.1}),
        (ValueError, "key: expected device cpu.*got meta", {"key": ones(2, 3, 9, 5, device="meta")}),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        attention(**(GOOD | change))


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("seed: expected one where dropout_p is not 0", (None, None, 0.5, False, 1.0)),
        ("seed: expected one where dropout_p is not 0", (None, torch.tensor(1), 0.0, False, 1.0)),
        ("seed: expected a 0-dim int64", (None, torch.tensor([1]), 0.5, False, 1.0)),
        ("seed: expected a 0-dim int64", (None, torch.tensor(1.0), 0.5, False, 1.0)),
        ("mask: expected.*got shape", (ones(7, 9), None, 0.0, False, 1.0)),
    ],
)
def test_arguments_of_the_operators(message: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.hvp_engine.attention(*GOOD.values(), *arguments)
    with pytest.raises(ValueError, match="attention: query: expected batch x heads"):
        torch.ops.hvp_engine.attention(ones(7, 5), ones(9, 5), ones(9, 6), None, None, 0.0, False, 1.0)
    output, logsumexp = torch.ops.hvp_engine.attention(*GOOD.values(), None, None, 0.0, False, 1.0)
    settings = (None, None, 0.0, False, 1.0)
    with pytest.raises(ValueError, match=r"attention_backward: grad_output: expected shape \(2, 3, 7, 6\); got"):
        torch.ops.hvp_engine.attention_backward(ones(2, 3, 7, 5), *GOOD.values(), output, logsumexp, *settings)
    with pytest.raises(ValueError, match="attention_backward_backward: grad_grad_key: expected shape"):
        tangents = (None, ones(2, 3, 8, 5), None, output)
        torch.ops.hvp_engine.attention_backward_backward(*tangents, *GOOD.values(), output, logsumexp, *settings)


# --- as operators of torch --------------------


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(target: torch.device, dropout: bool) -> None:
    seed, p = (torch.tensor(3, device=target), 0.3) if dropout else (None, 0.0)
    settings = (torch.rand(7, 9, device=target)[None, None] > 0.3, seed, p, False, 0.4)
    leaves = [torch.randn(x.shape, device=target, requires_grad=True) for x in GOOD.values()]
    tangents = [torch.randn(x.shape, device=target, requires_grad=True) for x in GOOD.values()]
    operators = torch.ops.hvp_engine
    output, logsumexp = (x.detach() for x in operators.attention(*leaves, *settings))
    cotangent = torch.randn_like(output).requires_grad_()
    torch.library.opcheck(operators.attention, (*leaves, *settings))
    torch.library.opcheck(operators.attention_backward, (cotangent, *leaves, output, logsumexp, *settings))
    arguments = (*tangents, cotangent, *leaves, output, logsumexp, *settings)
    torch.library.opcheck(operators.attention_backward_backward, arguments)


def test_batches_of_cotangents(target: torch.device) -> None:
    """vmap goes through each operator."""
    inputs, cotangents, options = CASES["key padding"].tensors(torch.float64, target)
    leaves = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(attention(*leaves, **options), leaves, cotangents[0], create_graph=True)
    stacked = [torch.stack([c, 2 * c]) for c in cotangents[1:]]
    both = torch.autograd.grad(gradients, leaves, stacked, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        one = torch.autograd.grad(gradients, leaves, [c[index] for c in stacked], retain_graph=True)
        torch.testing.assert_close([x[index] for x in both], list(one))


def test_compiled(target: torch.device) -> None:
    inputs, cotangents, _ = CASES["causal"].tensors(torch.float32, target)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*x: Tensor) -> Tensor:
        return attention(*x, is_causal=True).sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for value in (compiled, function):
        gradients = torch.autograd.grad(value(*leaves), leaves, cotangents[0])
        if value is compiled:
            expected = gradients
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(target: torch.device, dtype: torch.dtype) -> None:
    inputs, _, _ = CASES["plain"].tensors(torch.float32, target)
    with torch.autocast(target.type, dtype):
        assert attention(*inputs).dtype == F.scaled_dot_product_attention(*inputs).dtype == dtype
