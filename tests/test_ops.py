"""Every fused op on every backend that can run here, against straight mathematics in extended precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hvp_engine.backend import BACKENDS, use_backend, why_not
from hvp_engine.ops import OPS, bind
from hvp_engine.vectors import CHUNK, FlatVector, Layout

TARGETS = [pytest.param(("cpu", name), id=f"cpu-{name}") for name in BACKENDS if why_not(name, "cpu") is None]
if torch.cuda.is_available():
    TARGETS += [
        pytest.param(("cuda", name), id=f"cuda-{name}", marks=pytest.mark.gpu) for name in BACKENDS if name != "cpp"
    ]
THREADED = [target for target in TARGETS if target.values[0] in (("cpu", "reference"), ("cpu", "cpp"))]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {
    "f32": (F32, [F32]),
    "f32-bf16": (F32, [BF16]),
    "f32-f16": (F32, [F16]),
    "f32-mixed": (F32, [F32, BF16, F16]),
    "f64": (F64, [F64]),
    "f64-f32": (F64, [F32]),
    "f64-bf16": (F64, [BF16]),
    "f64-f16": (F64, [F16]),
    "f64-mixed": (F64, [F64, F32, F16, BF16]),
}
SIZES = {
    **{str(size): [(size,)] for size in (0, 1, 127, 1024, 1025, 100_003)},
    "all": [(1025,), (), (0, 3), (127,), (33, 32), (1,), (100_003,), (2, 0), (CHUNK,), (2 * CHUNK,), ()],
    "200": [(), (5,), (2, 3, 4), (16,)] * 50,
    "none": [],
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with one of its backends selected."""
    device_type, name = request.param
    with use_backend(name):
        yield torch.empty(0, device=device_type).device


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- the mathematics, on anything with arithmetic: numpy's extended precision, or plain torch ----------------------


def neumann_step(states: list, product, alpha, damping) -> tuple:
    v, p = states
    v = v - alpha * (product + damping * v)
    p = p + v
    return (v, p), (v, p)


def neumann_step_horner(states: list, product, alpha, damping) -> tuple:
    p, v = states
    increment = v - alpha * (product + damping * p)
    return (p + increment, v), (increment, p + increment)


def scale_accumulate(states: list, product, alpha, beta) -> tuple:
    (p,) = states
    p = alpha * product + beta * p
    return (p,), (product, p)


MATHEMATICS: dict[str, Callable] = {
    "neumann_step": neumann_step,
    "neumann_step_horner": neumann_step_horner,
    "scale_accumulate": scale_accumulate,
}


def extended(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


@dataclass
class Case:
    """Arguments of one op, made from example weights, with random state."""

    name: str
    layout: Layout
    states: list[FlatVector]
    scalars: list[Tensor]
    damping: float
    partials: Tensor

    @classmethod
    def of(
        cls, name: str, weights: Sequence[Tensor], state: torch.dtype, alpha: float = 0.1, second: float = 0.3
    ) -> Case:
        """`second` is the damping, or beta for an op that has one."""
        op = OPS[name]
        device = weights[0].device if weights else torch.device("cpu")
        layout = Layout.of(weights)
        states = []
        for _ in op.states:
            vector = FlatVector(layout, torch.zeros(layout.size, dtype=state, device=device))
            vector.copy_([torch.randn(shape, device=device, dtype=F64) for shape in layout.shapes])
            states.append(vector)
        values = [alpha, second][: len(op.scalars)]
        return cls(
            name,
            layout,
            states,
            [torch.tensor(value, dtype=F64, device=device) for value in values],
            second if op.damped else 0.0,
            layout.empty_partials().fill_(float("nan")),
        )

    def bind(self) -> Callable[[Sequence[Tensor]], None]:
        return bind(self.name, [s.data for s in self.states], self.layout, self.scalars, self.damping, self.partials)

    def numbers(self) -> list[float]:
        """alpha and damping or beta, as the state's dtype rounds them."""
        state = self.states[0].data.dtype
        values = [scalar.item() for scalar in self.scalars]
        values += [self.damping] if OPS[self.name].damped else []
        return [torch.tensor(value, dtype=F64).to(state).item() for value in values]

    def expected(self, products: Sequence[Tensor], number: Callable[[Tensor], object]) -> list[tuple]:
        """For each tensor: (new states, the two vectors whose norms are recorded), as `number` computes."""
        values = [number(torch.tensor(value, dtype=self.states[0].data.dtype)) for value in self.numbers()]
        return [
            MATHEMATICS[self.name]([number(s.views[i]) for s in self.states], number(product), *values)
            for i, product in enumerate(products)
        ]

    def run_and_check(self, products: Sequence[Tensor], step: Callable | None = None) -> None:
        """Run the op once and compare states, partials and gaps with the mathematics."""
        state = self.states[0].data.dtype
        exact = self.expected(products, extended)
        plain = self.expected(products, lambda t: t.detach().clone().cpu().to(state))
        (step or self.bind())(products)
        for i, (oracle, ordinary) in enumerate(zip(exact, plain, strict=True)):
            for j, vector in enumerate(self.states):
                if vector.views[i].numel():
                    scale = max(1.0, float(np.abs(oracle[0][j]).max()))
                    error = np.abs(extended(vector.views[i]) - oracle[0][j]).max()
                    usual = np.abs(extended(ordinary[0][j]) - oracle[0][j]).max()
                    assert error <= 2 * max(usual, torch.finfo(state).eps * scale), (i, j, error, usual)
        totals = self.partials.sum(0).tolist()
        for column in range(2):
            norm = sum(float((recorded[column] ** 2).sum()) for _, recorded in exact)
            assert totals[column] == pytest.approx(norm, rel=1e-5 if state == F32 else 1e-13), column
        assert totals[2] == 0
        for vector in self.states:
            gaps = vector.data.clone()
            for view in self.layout.views(gaps):
                view.zero_()
            assert not gaps.any(), "the gaps between tensors must stay zero"


def products_like(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]


# --- sizes, dtypes, memory formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_sizes_and_dtypes(target: torch.device, name: str, dtypes: str, sizes: str) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like(SIZES[sizes], inputs, target)
    Case.of(name, products, state).run_and_check(products)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def offset_view(numel: int, offset: int) -> Tensor:
    return torch.randn(numel + offset)[offset:]


FORMATS: dict[str, Callable[[], list[tuple[Tensor, Tensor]]]] = {
    "unaligned": lambda: [(torch.randn(n), offset_view(n, 1 + i)) for i, n in enumerate((4096, 5000, 3, 64))],
    "channels_last": lambda: [(channels_last(4, 3, 5, 6), channels_last(4, 3, 5, 6))],
    "channels_last weight": lambda: [(channels_last(8, 16, 7, 7), torch.randn(8, 16, 7, 7))],
    "channels_last product": lambda: [(torch.randn(4, 3, 5, 6), channels_last(4, 3, 5, 6))],
    "one channel": lambda: [(channels_last(4, 1, 5, 6), torch.randn(4, 1, 5, 6))],
    "transposed weight": lambda: [(torch.randn(70, 90).T, torch.randn(90, 70))],
    "transposed product": lambda: [(torch.randn(90, 70), torch.randn(70, 90).T)],
    "expanded": lambda: [
        (torch.randn(5000), torch.randn(1).expand(5000)),
        (torch.randn(6, 7), torch.randn(6, 1).expand(6, 7)),
        (torch.randn(3, 4, 5), torch.randn(()).expand(3, 4, 5)),
    ],
    "strided": lambda: [(torch.randn(99)[::3], torch.randn(66)[::2]), (torch.randn(9, 9)[:, 2:5], torch.randn(9, 3))],
    "lazily negated": lambda: [(torch.randn(()), torch.randn((), dtype=torch.complex64).conj().imag)],
}


@pytest.mark.parametrize("state", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_memory_formats(target: torch.device, name: str, kind: str, state: torch.dtype) -> None:
    with torch.device(target):
        pairs = FORMATS[kind]()
        around = torch.randn(20)  # neighbours show a product that was read or written at the wrong place
    weights = [around, *(weight for weight, _ in pairs), around]
    products = [around, *(product for _, product in pairs), around]
    Case.of(name, weights, state).run_and_check(products)


@pytest.mark.parametrize("name", OPS)
def test_states_without_the_last_gap_at_any_address(target: torch.device, name: str) -> None:
    """A state may end where its last tensor ends, and start anywhere; nothing around it is touched."""
    products = products_like([(33,), (5,), (4099,)], [F32], target)
    case = Case.of(name, products, F32)
    size = case.layout.offsets[-1] + case.layout.numels[-1]
    around = [torch.full((size + 10,), 7.0, device=target) for _ in case.states]
    for vector, memory in zip(case.states, around, strict=True):
        memory[5 : 5 + size] = vector.data[:size]
        vector.data = memory[5 : 5 + size]
        vector.views = case.layout.views(vector.data)
    case.run_and_check(products)
    for memory in around:
        assert (memory[:5] == 7).all() and (memory[-5:] == 7).all()


# --- products that are the state itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_products_that_alias_the_state(target: torch.device, name: str, state: torch.dtype) -> None:
    """A loss like (w1 * w2).sum() returns one view of the tangent as the product of the other."""
    weights = products_like([(300, 40), (300, 40), (90, 90), (7,)], [state], target)
    case = Case.of(name, weights, state)
    for vector in case.states:
        first, second, square, last = vector.views
        products = [second, first, square.T, last.flip(0)]
        shared = [product.untyped_storage().data_ptr() == vector.data.data_ptr() for product in products]
        assert shared == [True, True, True, False]
        case.run_and_check(products)
        case.run_and_check([second, first, square, last])
        case.run_and_check([first, second, square, last])


@pytest.mark.parametrize("name", OPS)
def test_a_product_that_overlaps_the_state_partly(target: torch.device, name: str) -> None:
    case = Case.of(name, products_like([(50_000,)], [F32], target), F32)
    for vector in case.states:
        shifted = vector.data[:1].expand(50_000)
        case.run_and_check([shifted])
    wide = torch.randn(50_100, device=target)
    for vector in case.states:
        memory = wide.clone()
        memory[64 : 64 + vector.data.numel()] = vector.data
        vector.data = memory[64 : 64 + vector.data.numel()]
        vector.views = case.layout.views(vector.data)
        case.run_and_check([memory[60:50_060]])


# --- one bound op, called again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_scalars_and_addresses_may_change_between_calls(target: torch.device, name: str) -> None:
    case = Case.of(name, products_like([(5000,), (), (31,)], [F32], target), F32)
    step = case.bind()
    kept = []
    for alpha in (0.1, 0.7, 0.0, 1e-3):
        for scalar in case.scalars:
            scalar.fill_(alpha)
        kept.append(products_like(case.layout.shapes, [F32], target))
        case.run_and_check(kept[-1], step)
    case.run_and_check(kept[0], step)
    case.run_and_check([torch.randn(5000, 2, device=target)[:, 0], *kept[1][1:]], step)


@pytest.mark.parametrize("damping", [0.0, 2.5])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.damped])
def test_damping(target: torch.device, name: str, damping: float) -> None:
    products = products_like([(1000,)], [F64], target)
    Case.of(name, products, F64, second=damping).run_and_check(products)


@pytest.mark.parametrize("name", OPS)
def test_equal_arguments_give_equal_bits(target: torch.device, name: str) -> None:
    products = products_like(SIZES["all"], [F32], target)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        case = Case.of(name, products, F32)
        case.bind()(products)
        results.append([*(vector.data for vector in case.states), case.partials])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shapes", [[(2**21 + 3,)], [(2**20 + 1,), (700,), (2**19, 2), ()]], ids=["one", "list"])
@pytest.mark.parametrize("target", THREADED, indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_threads_do_not_change_the_bits(target: torch.device, name: str, shapes: list) -> None:
    products = products_like(shapes, [F32], target)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            case = Case.of(name, products, F32)
            case.bind()(products)
            results.append([*(vector.data for vector in case.states), case.partials])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


# --- partials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_each_chunk_of_each_tensor_has_its_row(target: torch.device, name: str) -> None:
    products = products_like([(CHUNK + 1,), (0,), (), (3 * CHUNK,)], [F32], target)
    case = Case.of(name, products, F32)
    exact = case.expected(products, extended)
    case.bind()(products)
    rows = [
        [float((part[start : start + CHUNK] ** 2).sum()) for part in parts]
        for parts in ([recorded.reshape(-1) for recorded in vectors] for _, vectors in exact)
        for start in range(0, parts[0].size, CHUNK)
    ]
    assert case.partials.shape == (6, 3)
    torch.testing.assert_close(case.partials[:, :2].cpu(), torch.tensor(rows, dtype=F64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5, 2 * CHUNK + 39])
@pytest.mark.parametrize("dtypes", ["f32", "f32-bf16", "f32-f16", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_flag_of_a_bad_product(target: torch.device, name: str, dtypes: str, at: int, bad: float) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like([(3,), (2 * CHUNK + 40,), ()], inputs, target)
    products[1][at] = bad
    case = Case.of(name, products, state)
    case.bind()(products)
    assert case.partials[:, 2].tolist() == [float(row == 1 + at // CHUNK) for row in range(5)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("state", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_flag_of_a_bad_state_or_scalar(target: torch.device, name: str, state: torch.dtype, bad: float) -> None:
    products = products_like([(3,), (4100,)], [state], target)
    for broken in OPS[name].states:
        case = Case.of(name, products, state)
        case.states[OPS[name].states.index(broken)].views[1][4098] = bad
        case.bind()(products)
        assert case.partials[:, 2].tolist() == [0, 0, 1], broken
    for scalar in range(len(OPS[name].scalars)):
        case = Case.of(name, products, state)
        case.scalars[scalar].fill_(bad)
        case.bind()(products)
        assert case.partials[:, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("state, large", [(F32, 1e30), (F32, 3e38), (F64, 1e300)])
@pytest.mark.parametrize("name", OPS)
def test_large_finite_values_set_no_flag(target: torch.device, name: str, state: torch.dtype, large: float) -> None:
    """Their squares overflow float32: the norms are summed in float64. Only float64's own squares may overflow."""
    products = [torch.full((n,), large, dtype=state, device=target) for n in (5, 5000)]
    case = Case.of(name, products, state, alpha=0.5, second=0.0)
    for vector in case.states:
        vector.data.zero_()
    if name == "scale_accumulate":
        case.scalars[1].fill_(1.0)
    case.bind()(products)
    assert case.partials[:, 2].tolist() == [0, 0, 0]
    values = torch.full((5005,), large, dtype=state).double()
    norm = (values.square() * (1 if name == "scale_accumulate" else 0.25)).sum().item()
    assert case.partials[:, 0].sum().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_beta_zero_does_not_read_the_target(target: torch.device, dtypes: str) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like(SIZES["all"], inputs, target)
    for scratch in (float("nan"), float("inf")):
        case = Case.of("scale_accumulate", products, state, second=0.0)
        case.run_and_check(products)  # with finite contents the mathematics is the oracle
        expected = [view.clone() for view in case.states[0].views]
        for view in case.states[0].views:
            view.fill_(scratch)
        case.partials.fill_(scratch)
        case.bind()(products)
        for view, value in zip(case.states[0].views, expected, strict=True):
            assert torch.equal(view, value)
        assert case.partials.isfinite().all() and not case.partials[:, 2].any()


def test_a_constant_state_stays_as_it_was(target: torch.device) -> None:
    products = products_like(SIZES["all"], [F32], target)
    case = Case.of("neumann_step_horner", products, F32)
    before = case.states[1].data.clone()
    case.bind()(products)
    assert torch.equal(case.states[1].data, before)


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


def arguments_of(case: Case, products: list[Tensor]) -> dict[str, object]:
    """The arguments of the registered op, by name and in order."""
    op = OPS[case.name]
    damping = {"damping": case.damping} if op.damped else {}
    return {
        **dict(zip(op.states, (vector.data for vector in case.states), strict=True)),
        op.product: products,
        **dict(zip(op.scalars, case.scalars, strict=True)),
        **damping,
        "partials": case.partials,
    }


def registered(name: str) -> Callable:
    return getattr(torch.ops.hvp_engine, name)


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
    for first, second in [(shared[:64], shared[:64]), (shared[:64], shared[20:84]), (shared[36:], shared[:64])]:
        with pytest.raises(ValueError, match="share memory.*clone"):
            bind(name, [first, second], case.layout, case.scalars, 0.0, case.partials)
    memory = torch.zeros(128, device=device)
    bind(name, [memory[64:], memory[:64]], case.layout, case.scalars, 0.0, case.partials)(products)


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
