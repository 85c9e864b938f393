"""What the fused ops refuse, and the same ops as torch.library has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from fused_op_oracles import BF16, DTYPES, F16, F32, F64, Case, arguments_of, products_like, registered
from torch import Tensor

from hvp_engine.errors import BackendError
from hvp_engine.ops import OPS, bind, schemas


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- bad arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, change",
    [
        (ValueError, lambda products: products[:-1]),
        (ValueError, lambda products: [*products, products[0]]),
        (ValueError, lambda products: []),
        (ValueError, lambda products: [products[0].T, products[1]]),
        (ValueError, lambda products: [products[0].reshape(-1), products[1]]),
        (ValueError, lambda products: [products[0], products[1][:-1]]),
        (ValueError, lambda products: [products[0], products[1].to("meta")]),
        (TypeError, lambda products: [products[0], products[1].double()]),
        (TypeError, lambda products: [products[0], [0.0] * 70]),
        (TypeError, lambda products: [products[0], products[1].int()]),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_products_that_do_not_fit(target: torch.device, name: str, error: type[Exception], change: Callable) -> None:
    products = products_like([(3, 5), (70,)], [F32], target)
    case = Case.of(name, products, F32)
    before = [vector.data.clone() for vector in case.states]
    step = case.bind()
    with pytest.raises(error, match=f"{name}: .*expected.*got"):
        step(change(products))
    for vector, value in zip(case.states, before, strict=True):
        assert torch.equal(vector.data, value), "the state must be unchanged after an error"
    case.run_and_check(products, step)


@pytest.mark.parametrize("state", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_products_in_another_dtype_than_the_weights(target: torch.device, name: str, state: torch.dtype) -> None:
    """What fits into the state is read as it is: not rounded to the weight's dtype first."""
    case = Case.of(name, products_like([(3, 5), (70,), (4,)], [BF16, F32], target), state)
    step = case.bind()
    for dtypes in ([F32, F32], [F16, BF16], [F32, BF16, F16], [BF16, F32]):
        case.run_and_check(products_like(case.layout.shapes, dtypes, target), step)


@pytest.mark.parametrize("name", OPS)
def test_arguments_that_do_not_fit(device: torch.device, name: str) -> None:
    op = OPS[name]
    products = products_like([(3, 5), (70,)], [F32], device)
    case = Case.of(name, products, F32)
    state, scalar = op.states[-1], op.scalars[-1]
    size = case.layout.size
    wrong: list[tuple[type[Exception], str, object]] = [
        (TypeError, state, torch.zeros(size, dtype=BF16, device=device)),
        (TypeError, state, torch.zeros(size, dtype=torch.int32, device=device)),
        (ValueError, state, torch.zeros(size + 1, device=device)),
        (ValueError, state, torch.zeros(16, device=device)),
        (ValueError, state, torch.zeros(1, size, device=device)),
        (ValueError, state, torch.zeros(2 * size, device=device)[::2]),
        (ValueError, scalar, torch.zeros(1, dtype=F64, device=device)),
        (ValueError, scalar, torch.zeros((), dtype=F32, device=device)),
        (ValueError, "partials", torch.zeros(3, 3, dtype=F64, device=device)),
        (ValueError, "partials", torch.zeros(2, 3, dtype=F32, device=device)),
        (ValueError, "partials", torch.zeros(3, 2, dtype=F64, device=device).T),
        (TypeError, op.product, [products[0], products[1].double()]),
        (TypeError, op.product, [products[0], products[1].int()]),
    ]
    if device.type == "cuda":
        wrong += [(ValueError, scalar, torch.zeros((), dtype=F64)), (ValueError, state, torch.zeros(size))]
    good = arguments_of(case, products)
    before = [vector.data.clone() for vector in case.states]
    for error, argument, value in wrong:
        with pytest.raises(error, match=rf"{name}: {argument}.*expected.*got"):
            registered(name)(*{**good, argument: value}.values())
    for vector, value in zip(case.states, before, strict=True):
        assert torch.equal(vector.data, value)
    registered(name)(*good.values())


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if len(op.states) > 1])
def test_states_that_share_memory_are_refused(device: torch.device, name: str) -> None:
    products = products_like([(64,)], [F32], device)
    case = Case.of(name, products, F32)
    shared = torch.zeros(100, device=device)
    others = [vector.data for vector in case.states[2:]]
    for first, second in [(shared[:64], shared[:64]), (shared[:64], shared[20:84]), (shared[36:], shared[:64])]:
        with pytest.raises(ValueError, match="share memory.*clone"):
            bind(name, [first, second, *others], case.layout, case.scalars, 0.0, case.partials)
        with pytest.raises(ValueError, match="share memory.*clone"):
            bind(name, [*others, first, second], case.layout, case.scalars, 0.0, case.partials)
    memory = torch.zeros(128, device=device)
    bind(name, [memory[64:], memory[:64], *others], case.layout, case.scalars, 0.0, case.partials)(products)


# --- the registered ops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_registered_op_equals_the_bound_one(target: torch.device, name: str) -> None:
    shapes = [(4, 3, 5, 6), (), (5000,), (0,)]
    products = products_like(shapes, [F32], target)
    products[0] = products[0].to(memory_format=torch.channels_last)
    results = []
    for call in ("bound", "registered"):
        torch.manual_seed(1)
        case = Case.of(name, [product.contiguous() for product in products], F32)
        if call == "bound":
            case.bind()(products)
        else:
            registered(name)(*arguments_of(case, products).values())
        results.append([*(vector.data for vector in case.states), case.partials])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtypes", ["f32", "f32-mixed", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(device: torch.device, name: str, dtypes: str) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like([(3, 5), (70,), ()], inputs, device)
    case = Case.of(name, products, state)
    case.partials.zero_()
    torch.library.opcheck(registered(name).default, tuple(arguments_of(case, products).values()))


@pytest.mark.parametrize("name, compiler", [*((name, "aot_eager") for name in OPS), ("neumann_step", "inductor")])
def test_compiles_in_one_graph(device: torch.device, name: str, compiler: str) -> None:
    products = products_like([(3, 5), (70,)], [F32], device)

    def step(arguments: list, products: list[Tensor]) -> Tensor:
        at = len(OPS[name].states)
        arguments = [*arguments[:at], [2 * product for product in products], *arguments[at:]]
        registered(name)(*arguments)
        return arguments[-1].sum(0).sqrt()

    results = []
    for function in (step, torch.compile(step, backend=compiler, fullgraph=True)):
        torch.manual_seed(1)
        case = Case.of(name, products, F32)
        arguments = arguments_of(case, products)
        del arguments[OPS[name].product]
        results.append([function(list(arguments.values()), products), *(vector.data for vector in case.states)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_capture_that_would_read_tables_that_are_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the answers of torch.cuda and the choice of a backend are made up."""
    capturing, chosen = [True], ["triton"]
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(schemas.backend, "select", lambda device: (chosen[0], None))
    cuda = torch.device("cuda", 0)
    with pytest.raises(BackendError, match="cg_step: backend 'triton' cannot be captured .* keep it as long as the"):
        schemas._check_no_capture("cg_step", cuda)
    schemas._check_no_capture("cg_step", torch.device("cpu"))
    chosen[0] = "cuda"
    schemas._check_no_capture("cg_step", cuda)
    capturing[0], chosen[0] = False, "triton"
    schemas._check_no_capture("cg_step", cuda)
