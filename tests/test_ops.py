"""Every fused op on every backend that can run here, against straight mathematics in extended precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_op_oracles import BF16, DTYPES, F16, F32, F64, SIZES, THREADED, Case, extended, products_like
from torch import Tensor

from hvp_engine._support.flat_vector import CHUNK
from hvp_engine.ops import OPS, bind

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- sizes, dtypes, memory formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_sizes_and_dtypes(target: torch.device, name: str, dtypes: str, sizes: str) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like(SIZES[sizes], inputs, target)
    Case.of(name, products, state).run_and_check(products)


@pytest.mark.parametrize("dtypes, count", [("f32-mixed", 3700), ("f64", 1500)], ids=["f32-mixed", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_a_list_longer_than_the_parameters(target: torch.device, name: str, dtypes: str, count: int) -> None:
    """The parameters of a CUDA kernel have room for 440 products, or, since CUDA 12.1, for 3,600."""
    state, inputs = DTYPES[dtypes]
    products = products_like([(1 + 5000 * (i % 300 == 299), 1 + i % 3) for i in range(count)], inputs, target)
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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another dtype, in the same memory format: strides, offset and lazy negation too."""
    if tensor.dtype == dtype:
        return tensor
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    result = storage.to(dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch._neg_view(result) if tensor.is_neg() else result


# State, weights, products: a product in another dtype than the weight's is converted before it is read.
CONVERSIONS = {
    "f32": (F32, F32, F32),
    "f64": (F64, F64, F64),
    "f32 from bf16": (F32, F32, BF16),
    "f64 from f16": (F64, F64, F16),
    "bf16 from f32": (F32, BF16, F32),
}


@pytest.mark.parametrize("dtypes", CONVERSIONS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_memory_formats(target: torch.device, name: str, kind: str, dtypes: str) -> None:
    """Every format with every conversion, since a product that must be both permuted and converted takes a path of
    its own."""
    state, weight_dtype, product_dtype = CONVERSIONS[dtypes]
    with torch.device(target):
        pairs = FORMATS[kind]()
        around = torch.randn(20)  # neighbours show a product that was read or written at the wrong place
    weights = [cast(weight, weight_dtype) for weight in (around, *(weight for weight, _ in pairs), around)]
    products = [cast(product, product_dtype) for product in (around, *(product for _, product in pairs), around)]
    assert [product.stride() for product in products[1:-1]] == [product.stride() for _, product in pairs]
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
    weights = products_like([(110, 40), (110, 40), (70, 70), (7,)], [state], target)
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
    size = 2 * CHUNK + 100
    case = Case.of(name, products_like([(size,)], [F32], target), F32)
    for vector in case.states:
        shifted = vector.data[:1].expand(size)
        case.run_and_check([shifted])
    wide = torch.randn(size + 100, device=target)
    for vector in case.states:
        memory = wide.clone()
        memory[64 : 64 + vector.data.numel()] = vector.data
        vector.data = memory[64 : 64 + vector.data.numel()]
        vector.views = case.layout.views(vector.data)
        case.run_and_check([memory[60 : 60 + size]])


@pytest.mark.parametrize("name", OPS)
def test_a_product_in_the_memory_of_partials(target: torch.device, name: str) -> None:
    case = Case.of(name, products_like([(3,), (9,)], [F64], target), F64)
    case.partials.fill_(0.5)
    case.run_and_check([case.partials[0], case.partials[1:, :1].expand(1, 9)[0]])


@pytest.mark.parametrize("name", OPS)
def test_what_is_written_shares_memory_with_nothing_else(target: torch.device, name: str) -> None:
    op = OPS[name]
    memory = torch.zeros(100, dtype=F64, device=target)

    def overlap(*places: str) -> bool:
        """Whether binding fails, naming them, with one address for these arguments."""
        case = Case.of(name, products_like([(5,)], [F64], target), F64)
        names = [*op.states, *op.scalars, "partials"]
        tensors = [*(vector.data for vector in case.states), *case.scalars, case.partials]
        for place in places:
            i = names.index(place)
            tensors[i] = memory[: tensors[i].numel()].view(tensors[i].shape)
        count = len(op.states)
        try:
            bind(name, tensors[:count], case.layout, tensors[count:-1], case.damping, tensors[-1])
        except ValueError as error:
            assert f"{places[0]} and {places[1]}: expected tensors that do not share memory" in str(error)
            return True
        return False

    first, scalar = op.mutated[0], op.scalars[0]
    assert overlap(scalar, "partials") and overlap(first, "partials") and overlap(first, scalar)
    if len(op.states) > 1:
        assert overlap(*op.states[:2])
    if len(op.scalars) > 1:
        assert not overlap(*op.scalars[:2]), "both are only read"


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
    chunks = [
        [part.reshape(-1)[start : start + CHUNK] for part in recorded]
        for _, recorded in exact
        for start in range(0, recorded[0].size, CHUNK)
    ]
    rows = torch.tensor([[float(part.sum()) for part in chunk] for chunk in chunks], dtype=F64)
    sizes = torch.tensor([[float(abs(part).sum()) for part in chunk] for chunk in chunks], dtype=F64)
    assert case.partials.shape == (6, 3)
    assert ((case.partials[:, :2].cpu() - rows).abs() <= 1e-5 * sizes).all()


BAD = [(0, NAN), (CHUNK - 1, INF), (CHUNK, -INF), (2 * CHUNK + 5, INF), (2 * CHUNK + 39, NAN), (2 * CHUNK + 39, -INF)]
"""The first and the last element of a chunk, of a wide body and of a tail, with each kind of bad number."""


@pytest.mark.parametrize(("at", "bad"), BAD)
@pytest.mark.parametrize("dtypes", ["f32", "f32-bf16", "f32-f16", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_flag_of_a_bad_product(target: torch.device, name: str, dtypes: str, at: int, bad: float) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like([(3,), (2 * CHUNK + 40,), ()], inputs, target)
    products[1][at] = bad
    case = Case.of(name, products, state)
    case.bind()(products)
    assert case.partials[:, 2].tolist() == [float(row == 1 + at // CHUNK) for row in range(5)]


UNRECORDED = [("cg_step", "x")]  # its norm is not among the partials


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("state", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_flag_of_a_bad_state_or_scalar(target: torch.device, name: str, state: torch.dtype, bad: float) -> None:
    products = products_like([(3,), (4100,)], [state], target)
    for broken in [state for state in OPS[name].states if (name, state) not in UNRECORDED]:
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
    if name == "cg_step":
        case.states[1].copy_(products)  # with d = 0 nothing moves
    exact = case.expected(products, extended)
    case.bind()(products)
    assert case.partials[:, 2].tolist() == [0, 0, 0]
    norm = float(sum(recorded[0].sum() for _, recorded in exact))
    assert norm >= 0.2 * 5005 * large * large
    assert case.partials[:, 0].sum().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_beta_zero_does_not_read_the_target(target: torch.device, dtypes: str) -> None:
    state, inputs = DTYPES[dtypes]
    products = products_like(SIZES["all"], inputs, target)
    for scratch in (NAN, INF):
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


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.mutated != op.states])
def test_a_constant_state_stays_as_it_was(target: torch.device, name: str) -> None:
    products = products_like(SIZES["all"], [F32], target)
    case = Case.of(name, products, F32)
    before = case.states[-1].data.clone()
    case.bind()(products)
    assert OPS[name].states[-1] not in OPS[name].mutated
    assert torch.equal(case.states[-1].data, before)


# --- steps that depend on a sum over everything ----------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", ["f32", "f32-bf16", "f64"])
@pytest.mark.parametrize("sign", [-1.0, 0.0], ids=["negative", "zero"])
def test_cg_step_does_not_move_without_positive_curvature(target: torch.device, sign: float, dtypes: str) -> None:
    state, inputs = DTYPES[dtypes]
    shapes = [(CHUNK + 1,), (), (70,)]
    case = Case.of("cg_step", products_like(shapes, inputs, target), state, second=0.0)
    case.states[2].copy_([view.to(inputs[0]) for view in case.states[2].views])
    before = [vector.data.clone() for vector in case.states]
    case.bind()([(sign * view).to(inputs[0]) for view in case.states[2].views])
    for vector, value in zip(case.states, before, strict=True):
        assert torch.equal(vector.data, value)
    curvature = sign * float(case.states[2].data.double().square().sum())
    assert float(case.partials[:, 1].sum()) == pytest.approx(curvature, rel=1e-6)
    assert not case.partials[:, 2].any()


def test_cg_step_takes_the_curvature_of_all_tensors_together(target: torch.device) -> None:
    """A = 4 I, r = b = d, rho = ||b||^2: one step is exact, whatever the sizes and the number of tensors."""
    weights = products_like(SIZES["200"][:70], [F64], target)
    case = Case.of("cg_step", weights, F64, second=1.0)
    x, r, d = case.states
    x.data.zero_()
    r.data.copy_(d.data)
    case.scalars[0].copy_(d.data.square().sum())
    case.bind()([3 * view for view in d.views])
    torch.testing.assert_close(x.data, d.data / 4, rtol=1e-14, atol=0)
    assert float(r.data.abs().max()) < 1e-14
