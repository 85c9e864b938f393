"""The recurrences of LSTM and GRU, level by level: each derivative is that of the level below, in every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrences import BATCHES, arguments
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.signatures import OPS
from hvp_engine.differentiation.trace.graph_recorder import record_graph

ops = torch.ops.hvp_engine


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def differentiable(
    name: str, given: list[Any], results: int = 0
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The operation as a function of its tensors, with its first `results`, and these as leaves; the results of a
    backward without what was kept."""
    places = [place for place, argument in enumerate(given) if isinstance(argument, Tensor)]
    results = results or (3 if OPS[name].keeps else len(OPS[name].results))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(given)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return getattr(ops, name)(*filled)[:results]

    return function, [given[place].clone().requires_grad_() for place in places]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_are_those_of_the_reference_in_float64(
    name: str, dtype: torch.dtype, batch: str, target: torch.device
) -> None:
    given = arguments(name, *BATCHES[batch])
    narrow = [argument.to(target, dtype) if isinstance(argument, Tensor) else argument for argument in given]
    found = getattr(ops, name)(*narrow)
    for ours, expected in zip(found, getattr(reference, name)(*given), strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("batch", ["one number", "one sequence", "packed", "packed, from the end"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_first_and_second_derivatives(kind: str, batch: str, backend: str) -> None:
    """Of everything that the forward gives; of outputs and last states twice."""
    name = f"{kind}_recurrence"
    given = arguments(name, *BATCHES[batch])
    assert gradcheck(*differentiable(name, given), fast_mode=True)
    function, leaves = differentiable(name, given, results=3 if kind == "lstm" else 2)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("batch", ["one sequence", "packed, from the end"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_derivative_of_the_backward_with_none_of_the_gradients_of_what_was_kept(
    kind: str, batch: str, backend: str
) -> None:
    """As the first gradient of a loss has it."""
    name = f"{kind}_recurrence_backward"
    given = arguments(name, *BATCHES[batch])
    for place, argument in enumerate(OPS[name].arguments):
        if argument in ("gates_grad", "squashed_grad", "previous_cell_grad"):
            given[place] = None
    assert gradcheck(*differentiable(name, given), fast_mode=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_missing_gradients_are_zeros(kind: str, backend: str) -> None:
    name = f"{kind}_recurrence_backward"
    some = arguments(name, *BATCHES["packed"])
    shapes = arguments(name, *BATCHES["packed"], some=False)
    op = OPS[name]
    filled = list(some)
    for place, code in enumerate(op.arguments.values()):
        if some[place] is None:
            rows = sum(some[-3]) if code.startswith("N") else some[-3][0]
            filled[place] = torch.zeros(rows, (4 if "4" in code else 1) * 6, dtype=torch.float64)
    assert all(argument is None for argument, code in zip(shapes, op.arguments.values(), strict=False) if "?" in code)
    for ours, expected in zip(getattr(ops, name)(*some), getattr(ops, name)(*filled), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].keeps])
def test_nothing_is_kept_unless_asked_for(name: str, backend: str) -> None:
    given = arguments(name, *BATCHES["packed"])
    kept, free = getattr(ops, name)(*given), getattr(ops, name)(*given[:-1], False)
    for one, other, code in zip(kept, free, OPS[name].results.values(), strict=True):
        assert len(other) == 0 if code.endswith("?") else torch.equal(one, other)


def test_saturated_gates_and_numbers_that_are_none(backend: str) -> None:
    """Large inputs overflow nothing, and NaN stays what it is."""
    for dtype in (torch.float32, torch.float64):
        projected = torch.tensor([[1e4] * 4, [-1e4] * 4, [0.0] * 4, [torch.nan] * 4, [torch.inf] * 4], dtype=dtype)
        zeros, weight = torch.zeros(5, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
        output, *_, gates, _, _ = ops.lstm_recurrence(projected, weight, zeros, zeros, [5], False)
        assert gates[0].tolist() == gates[4].tolist() == [1, 1, 1, 1] and output[0].item() == pytest.approx(0.761594156)
        assert gates[1, 2].item() == -1 and gates[1, :2].abs().max() < 1e-37
        assert gates[2].tolist() == [0.5, 0.5, 0.0, 0.5] and gates[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_accurate_to_a_few_units_in_the_last_place(dtype: torch.dtype, backend: str) -> None:
    """Relative errors, small arguments included. Triton's interpreter takes its time."""
    many = 1 if backend == "triton" else 200
    small = torch.logspace(-9, 1, 32 * many, dtype=dtype)
    x = torch.cat([torch.linspace(-40, 40, 64 * many, dtype=dtype), small, -small]).reshape(-1, 32)
    projected = torch.cat([torch.zeros_like(x), torch.zeros_like(x), x, x], 1)
    zeros, weight = torch.zeros_like(x), torch.zeros(128, 32, dtype=dtype)
    gates = ops.lstm_recurrence(projected, weight, zeros, zeros, [len(x)], False)[4].double()
    for ours, expected in ((gates[:, 64:96], x.double().tanh()), (gates[:, 96:], x.double().sigmoid())):
        relative = ((ours - expected) / expected.where(expected != 0, 1)).abs().max()
        assert relative < 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, backend: str) -> None:
    given = arguments(name, *BATCHES["packed"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ops, name).default, given, test_utils=tests)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_trace_and_torch_compile_have_single_operations(kind: str) -> None:
    function, leaves = differentiable(f"{kind}_recurrence", arguments(f"{kind}_recurrence", *BATCHES["packed"]))

    def product(*tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        outputs = function(*tensors)[0]
        gradients = torch.autograd.grad(outputs.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in gradients), tensors)

    expected = product(*leaves)
    traced = record_graph(product, leaves)
    counts = [str(node.target) for node in traced.graph.nodes if "hvp_engine" in str(node.target)]
    assert sorted(counts) == sorted(
        f"hvp_engine.{kind}_recurrence{level}.default" for level in ("", "_backward", "_backward", "_double_backward")
    )
    for ours, theirs in zip(traced(*leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(lambda *tensors: function(*tensors)[0].square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves)[0].square().sum(), leaves)
    )


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("batch", ["packed", "from the end"])
def test_third_derivatives_are_those_of_the_reference(kind: str, batch: str, backend: str) -> None:
    name = f"{kind}_recurrence"
    given = arguments(name, *BATCHES[batch])
    leaves = [argument.requires_grad_() for argument in given if isinstance(argument, Tensor)]

    def derivatives(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = function(*given)[: 3 if kind == "lstm" else 2]
        found, value = [], sum((y.sin() * (1 + y)).sum() for y in outputs)
        for _ in range(3):
            found.append(torch.autograd.grad(value, leaves, create_graph=True))
            value = sum(g.sin().sum() for g in found[-1])
        return [g for one in found for g in one]

    for ours, expected in zip(derivatives(getattr(ops, name)), derivatives(getattr(reference, name)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def replaced(name: str, argument: str, value: Any) -> list[Any]:
    given = arguments(name, *BATCHES["packed"])
    given[list(OPS[name].arguments).index(argument)] = value
    return given


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.zeros(11, 23, dtype=torch.float64), ValueError, r"projected: expected shape \(11, 24\); got \(11, 23\)"),
        (torch.zeros(10, 24, dtype=torch.float64), ValueError, r"projected: expected shape \(11, 24\)"),
        (torch.zeros(11, 24), TypeError, "projected: expected float32 or float64.*got torch.float32"),
        (torch.zeros(11, 24, dtype=torch.complex128), TypeError, "got torch.complex128"),
        (torch.zeros(11, 24, dtype=torch.float64, device="meta"), Exception, "meta"),
    ],
)
def test_bad_tensors(value: Tensor, error: type[Exception], text: str, backend: str) -> None:
    with pytest.raises(error, match=text):
        ops.lstm_recurrence(*replaced("lstm_recurrence", "projected", value))


@pytest.mark.parametrize("batch_sizes", [[], [3, 4], [3, 0], [-1]])
def test_bad_batch_sizes(batch_sizes: list[int], backend: str) -> None:
    given = arguments("gru_recurrence", *BATCHES["packed"])
    given[4] = batch_sizes
    with pytest.raises(ValueError, match="batch_sizes: expected positive numbers that do not grow"):
        ops.gru_recurrence(*given)


def test_tensors_of_any_layout(backend: str) -> None:
    """Transposed, sliced, expanded and lazily negated ones."""
    given = arguments("lstm_recurrence", *BATCHES["equal lengths"])
    expected = ops.lstm_recurrence(*given)
    projected, weight, hidden, cell = given[:4]
    strange = [
        projected.t().contiguous().t(),
        torch.stack([weight, weight], -1)[..., 0],
        torch.complex(hidden, -hidden).conj().imag,
        torch.cat([cell[:1] * 0, cell])[1:],
    ]
    assert strange[2].is_neg()
    for ours, theirs in zip(ops.lstm_recurrence(*strange, *given[4:]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    wide = torch.zeros(1, 1, dtype=torch.float64).expand(3, 5)
    zeros = ops.lstm_recurrence(projected, weight, wide, wide, *given[4:])
    torch.testing.assert_close(
        zeros[0], ops.lstm_recurrence(projected, weight, wide.clone(), wide.clone(), *given[4:])[0]
    )
