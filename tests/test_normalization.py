"""Normalizations with two derivatives by kernels: against torch's own, in every backend of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from problems_with_known_answers import randn, relative_error
from torch import Tensor, nn
from torch.nn import functional

import hvp_engine as hvp
from hvp_engine import differentiable
from hvp_engine.differentiation import losses_and_normalizations
from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.trace.partial_evaluation import partition
from hvp_engine.differentiation.trace.rewriting import verified_rewrites
from hvp_engine.errors import BackendError

Function = Callable[..., Tensor]

PAIRS: dict[str, tuple[Function, Function]] = {
    "batch_norm": (
        lambda x, w, b: differentiable.batch_norm(x, None, None, w, b, True, eps=1e-3),
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, True, eps=1e-3),
    ),
    "group_norm": (
        lambda x, w, b: differentiable.group_norm(x, 3, w, b, 1e-3),
        lambda x, w, b: functional.group_norm(x, 3, w, b, 1e-3),
    ),
    "instance_norm": (
        lambda x, w, b: differentiable.group_norm(x, x.shape[1], w, b),
        lambda x, w, b: functional.instance_norm(x, None, None, w, b),
    ),
    "layer_norm": (
        lambda x, w, b: differentiable.layer_norm(x.movedim(1, -1), x.shape[1], w, b, 1e-3),
        lambda x, w, b: functional.layer_norm(x.movedim(1, -1), (x.shape[1],), w, b, 1e-3),
    ),
    "rms_norm": (
        lambda x, w, b: differentiable.rms_norm(x.movedim(1, -1), x.shape[1], w, 1e-3) + b,
        lambda x, w, b: functional.rms_norm(x.movedim(1, -1), (x.shape[1],), w, 1e-3) + b,
    ),
}


def by_hand(x: Tensor, dims: Sequence[int], eps: float, centred: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + eps), for where torch's own kernels lack a derivative."""
    away = x - x.mean(dims, keepdim=True) if centred else x
    return away / (away.square().mean(dims, keepdim=True) + eps).sqrt()


def affine(x: Tensor, w: Tensor | None, b: Tensor | None, like: Sequence[int]) -> Tensor:
    scaled = x if w is None else x * w.view(like)
    return scaled if b is None else scaled + b.view(like)


def grouped(x: Tensor, groups: int) -> Tensor:
    return by_hand(x.reshape(len(x), groups, -1), (2,), 1e-3 if groups == 3 else 1e-5).view(x.shape)


BY_HAND: dict[str, Function] = {
    "batch_norm": lambda x, w, b: affine(by_hand(x, (0, 2, 3), 1e-3), w, b, (-1, 1, 1)),
    "group_norm": lambda x, w, b: affine(grouped(x, 3), w, b, (-1, 1, 1)),
    "instance_norm": lambda x, w, b: affine(grouped(x, x.shape[1]), w, b, (-1, 1, 1)),
    "layer_norm": lambda x, w, b: affine(by_hand(x.movedim(1, -1), (-1,), 1e-3), w, b, (-1,)),
    "rms_norm": lambda x, w, b: affine(by_hand(x.movedim(1, -1), (-1,), 1e-3, centred=False), w, b, (-1,)),
}
SHAPES = {
    "image": (4, 6, 5, 3),
    "large image": (2, 12, 37, 40),
    "sound": (3, 6, 7),
    "video": (2, 6, 2, 3, 2),
    "sixteen channels": (2, 18, 9, 8),
}


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with hvp.use_backend(request.param):
        try:
            differentiable.layer_norm(torch.zeros(1, 1), 1)
        except BackendError as error:
            pytest.skip(str(error))
        yield request.param


def derivatives(function: Function, *inputs: Tensor) -> list[Tensor]:
    """Value, gradient, and the product of the Hessian with random tangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    cotangent = randn(value.numel(), seed=1).view(value.shape).to(value.dtype)
    gradient = torch.autograd.grad((value.sin() * cotangent).sum(), leaves, create_graph=True)
    tangents = [randn(g.numel(), seed=2 + k).view(g.shape).to(g.dtype) for k, g in enumerate(gradient)]
    return [value.detach(), *(g.detach() for g in gradient), *torch.autograd.grad(gradient, leaves, tangents)]


def inputs_of(shape: Sequence[int], last: bool) -> list[Tensor]:
    x, channels = 2 * randn(*shape, seed=3) + 1.5, shape[1]
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, 1 + randn(channels, seed=4), randn(channels, seed=5)]


def test_groups_of_one_value(backend: str) -> None:
    """Several samples of them are normalized to zero, as by torch."""
    inputs = [randn(4, 6, seed=3), randn(6, seed=4), randn(6, seed=5)]
    found = derivatives(lambda x, w, b: differentiable.group_norm(x, 6, w, b), *inputs)
    expected = derivatives(lambda x, w, b: functional.group_norm(x, 6, w, b), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_all_levels_are_torchs(backend: str, name: str, shape: tuple[int, ...], last: bool) -> None:
    inputs = inputs_of(shape, last)
    ours, theirs = (derivatives(function, *inputs) for function in PAIRS[name])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    if name.endswith(("batch_norm", "group_norm")):
        assert ours[0].stride() == inputs[0].stride(), "images stay as they lie"


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck(backend: str, name: str) -> None:
    inputs = [x.requires_grad_() for x in inputs_of((3, 6, 2, 2), last=name == "group_norm")]
    assert torch.autograd.gradcheck(PAIRS[name][0], inputs)
    assert torch.autograd.gradgradcheck(PAIRS[name][0], inputs)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm"])
def test_without_weight_or_bias(backend: str, name: str, which: tuple[bool, bool]) -> None:
    x, w, b = inputs_of((4, 6, 5, 3), last=False)
    given = [tensor for tensor, there in zip((w, b), which, strict=True) if there]

    def function(normalize: Function) -> Function:
        def run(x: Tensor, *rest: Tensor) -> Tensor:
            left = list(rest)
            return normalize(x, left.pop(0) if which[0] else None, left.pop(0) if which[1] else None)

        return run

    ours, theirs = (derivatives(function(one), x, *given) for one in (PAIRS[name][0], BY_HAND[name]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_batch_norm_of_vectors_and_layer_norm_of_matrices(backend: str) -> None:
    for shape in ((5, 6), (70, 33)):
        x, w, b = inputs_of(shape, last=False)
        ours, theirs = (derivatives(function, x, w, b) for function in PAIRS["batch_norm"])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    x, w, b = randn(3, 4, 5, seed=1), randn(4, 5, seed=2), randn(4, 5, seed=3)
    ours = derivatives(lambda x, w, b: differentiable.layer_norm(x, (4, 5), w, b), x, w, b)
    theirs = derivatives(lambda x, w, b: functional.layer_norm(x, (4, 5), w, b), x, w, b)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("strange", ["transposed", "expanded", "part", "negated"])
def test_any_strides(backend: str, strange: str) -> None:
    x = {
        "transposed": randn(3, 5, 6, 4, seed=1).permute(3, 2, 0, 1),
        "expanded": randn(4, 6, 1, 3, seed=1).expand(4, 6, 5, 3),
        "part": randn(8, 6, 5, 6, seed=1)[::2, :, :, 1:4],
        "negated": torch.complex(randn(4, 6, 5, 3, seed=1), randn(4, 6, 5, 3, seed=2)).conj().imag,
    }[strange]
    w, b = randn(6, seed=2), randn(6, seed=3)
    for name in ("batch_norm", "group_norm", "layer_norm"):
        ours, theirs = (derivatives(function, x, w, b) for function in PAIRS[name])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", PAIRS)
def test_float32_is_as_exact_as_torchs(name: str, last: bool) -> None:
    """Of numbers whose mean is 30 standard deviations; by the fastest backend."""
    x, w, b = inputs_of((8, 12, 32, 32), last)
    inputs = [(x + 60).float().detach(), w.float(), b.float()]
    exact = derivatives(PAIRS[name][1], *(tensor.double() for tensor in inputs))
    ours, theirs = (derivatives(function, *inputs) for function in PAIRS[name])
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert relative_error(one.double(), truth) <= 1.5 * relative_error(other.double(), truth) + 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_computed_in_float32(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in inputs_of((4, 6, 5, 3), last=False)]
    halves, floats = (derivatives(PAIRS[name][0], *given) for given in (inputs, [x.float() for x in inputs]))
    assert {x.dtype for x in halves} == {dtype}
    for a, b in zip(halves, floats, strict=True):
        assert relative_error(a.double(), b.double()) < 32 * torch.finfo(dtype).eps


def test_images_in_half_and_weights_in_single_precision(backend: str) -> None:
    """As under autocast."""
    x, w, b = inputs_of((4, 6, 5, 3), last=True)
    inputs = [x.bfloat16(), w.float(), b.float()]
    found = derivatives(PAIRS["batch_norm"][0], *inputs)
    assert [y.dtype for y in found[1:4]] == [y.dtype for y in found[4:]] == [x.dtype for x in inputs]


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 3, 2)])
def test_running_statistics_are_torchs(backend: str, shape: tuple[int, ...], momentum: float | None) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    theirs, ours = (kind(6, momentum=momentum).double() for _ in range(2))
    for step in range(3):
        x = randn(*shape, seed=step)
        expected = theirs(x)
        # what the module does, with our function in place of torch's
        ours.num_batches_tracked.add_(1)
        factor = 1.0 / float(ours.num_batches_tracked) if momentum is None else momentum
        buffers = ours.running_mean, ours.running_var
        found = differentiable.batch_norm(x, *buffers, ours.weight, ours.bias, True, factor, ours.eps)
        torch.testing.assert_close(found, expected)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    x = randn(*shape, seed=9)
    theirs.eval()
    buffers = ours.running_mean, ours.running_var
    found = differentiable.batch_norm(x, *buffers, ours.weight, ours.bias, False, 0.1, ours.eps)
    torch.testing.assert_close(found, theirs(x))


def test_constant_numbers(backend: str) -> None:
    """A variance of zero: eps alone keeps things finite."""
    inputs = [torch.full((2, 6, 3, 3), 7.0, dtype=torch.float64), randn(6, seed=1), randn(6, seed=2)]
    for name, (ours, theirs) in PAIRS.items():
        for a, b in zip(derivatives(ours, *inputs), derivatives(theirs, *inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


def test_empty_batches(backend: str) -> None:
    w, b = randn(6, seed=1).requires_grad_(), randn(6, seed=2).requires_grad_()
    for name in ("group_norm", "layer_norm"):
        x = randn(0, 6, 3, 2, seed=1).requires_grad_()
        value = PAIRS[name][0](x, w, b)
        gradient = torch.autograd.grad(value.square().sum(), [x, w, b], create_graph=True)
        found = torch.autograd.grad(gradient, [x, w, b], [torch.ones_like(g) for g in gradient], allow_unused=True)
        assert found[0].shape == x.shape and not any(g.any() for g in gradient)


BAD: list[tuple[type[Exception], str, Callable[[], Tensor]]] = [
    (
        ValueError,
        "more than one value per channel",
        lambda: differentiable.batch_norm(torch.zeros(1, 3), training=True),
    ),
    (
        ValueError,
        "more than one value per channel.*1, 3, 1, 1",
        lambda: differentiable.batch_norm(torch.zeros(1, 3, 1, 1), training=True),
    ),
    (ValueError, "expects .N, C", lambda: differentiable.batch_norm(torch.zeros(3), training=True)),
    (ValueError, "make statistics of", lambda: differentiable.batch_norm(torch.zeros(0, 3), training=True)),
    (ValueError, "make statistics of", lambda: differentiable.group_norm(torch.zeros(2, 3, 0), 1)),
    (TypeError, "input: .*int64", lambda: differentiable.batch_norm(torch.zeros(2, 3).long(), training=True)),
    (
        ValueError,
        r"weight: expected shape \(3,\)",
        lambda: differentiable.batch_norm(torch.zeros(2, 3), weight=torch.ones(4), training=True),
    ),
    (ValueError, "bias: expected shape", lambda: differentiable.group_norm(torch.zeros(2, 4), 2, None, torch.ones(3))),
    (ValueError, "num_groups: expected a divisor", lambda: differentiable.group_norm(torch.zeros(2, 4, 2), 3)),
    (ValueError, "num_groups: expected a divisor", lambda: differentiable.group_norm(torch.zeros(2, 4, 2), 0)),
    (ValueError, "more values than groups", lambda: differentiable.group_norm(torch.zeros(1, 4), 4)),
    (ValueError, "normalized_shape: .*last dim", lambda: differentiable.layer_norm(torch.zeros(2, 4), 3)),
    (ValueError, "normalized_shape", lambda: differentiable.layer_norm(torch.zeros(2, 4), ())),
    (ValueError, "at least one number", lambda: differentiable.rms_norm(torch.zeros(2, 0), 0)),
    (TypeError, "input: .*complex", lambda: differentiable.rms_norm(torch.zeros(2, 3) + 0j, 3)),
]


@pytest.mark.parametrize("error, words, call", BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_input(backend: str, error: type[Exception], words: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", PAIRS)
def test_third_derivatives(backend: str, name: str) -> None:
    def third(function: Function) -> Sequence[Tensor]:
        leaves = [x.requires_grad_() for x in inputs_of((3, 6, 2, 2), last=False)]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in second), leaves)

    for a, b in zip(third(PAIRS[name][0]), third(BY_HAND[name]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm", "rms_norm"])
def test_opcheck(backend: str, name: str) -> None:
    x, w, b = (t.requires_grad_() for t in inputs_of((3, 6, 2, 6), last=name == "group_norm"))
    size = {"batch_norm": 0, "group_norm": 3}.get(name, 1)
    g, t = randn(3, 6, 2, 6, seed=6).requires_grad_(), randn(3, 6, 2, 6, seed=7).requires_grad_()
    _, mean, variance = getattr(torch.ops.hvp_engine, name)(x, w, b, size, 1e-5)
    known = g, x, w, mean.detach(), variance.detach(), size, 1e-5
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"]
    for suffix, arguments in [
        ("", (x, w, b, size, 1e-5)),
        ("_backward", known),
        ("_double_backward", (t, randn(6, seed=8).requires_grad_(), None, *known)),
    ]:
        torch.library.opcheck(getattr(torch.ops.hvp_engine, name + suffix).default, arguments, test_utils=tests)


# --- in our calls --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with every kind of normalization between them."""

    def __init__(self, track: bool):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8, track_running_stats=track),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.Tanh(),
            nn.Conv2d(16, 8, 3),
            nn.InstanceNorm2d(8, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean((2, 3))


@pytest.mark.parametrize("track", [False, True])
def test_networks_stay_channels_last(track: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvp_engine.engines import traced

    parts: list[Any] = []
    monkeypatch.setattr(traced, "partition", lambda trace: parts.append(partition(trace)) or parts[-1])
    torch.manual_seed(0)
    module = Net(track)
    net, x, y = hvp.functional(module), randn(4, 3, 9, 9, seed=1).float(), torch.tensor([0, 3, 5, 7])
    before = [buffer.clone() for buffer in module.buffers()]

    def loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(net(weights, batch[0]), batch[1])

    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    with verified_rewrites():
        operator = hvp.HessianOperator(loss, weights, (x, y), engine="linearized")
    assert operator.linear_map.fallback is None
    tangents = {name: randn(*w.shape, seed=40 + k).float() for k, (name, w) in enumerate(weights.items())}
    eager = hvp.HessianOperator(loss, weights, (x, y), engine="eager")
    ours, theirs = operator @ tangents, eager @ tangents
    joined = [torch.cat([x.double().flatten() for x in found.values()]) for found in (ours, theirs)]
    assert relative_error(*joined) < 1e-4
    for buffer, value in zip(module.buffers(), before, strict=True):
        assert torch.equal(buffer, value)
    nodes = list(parts[0].tangent.module.graph.nodes)
    names = [str(node.target) for node in nodes]
    assert names.count("hvp_engine.batch_norm_double_backward.default") == 1
    assert names.count("hvp_engine.group_norm_double_backward.default") == 2
    assert not any("native" in name for name in names)
    convolutions = [node.meta["val"] for node in nodes if "convolution.default" in str(node.target)]
    assert convolutions and all(c.is_contiguous(memory_format=torch.channels_last) for c in convolutions)


def test_a_callers_running_statistics_are_torchs_affair() -> None:
    """Without `hvp.functional` nobody knows whether they may change: torch's kernel stays, and with it what it does."""
    kernel, x = randn(8, 3, 3, 3, seed=1).float(), randn(4, 3, 5, 5, seed=1).float()
    running = torch.zeros(8), torch.ones(8)

    def loss(weight: Tensor) -> Tensor:
        return functional.batch_norm(functional.conv2d(x, weight), *running, training=True).sin().sum()

    operator = hvp.HessianOperator(loss, kernel, engine="linearized")
    assert operator.linear_map.fallback is None


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_rows_in_native_programs(kind: type[nn.Module], affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_and_normalizations, "_FEWEST_IN_ROWS", 0)
    module = nn.Sequential(
        nn.Linear(5, 6),
        kind(6, elementwise_affine=affine),
        nn.Tanh(),
        nn.Linear(6, 4),
        kind(4, elementwise_affine=affine),
    ).double()
    net, x, y = hvp.functional(module), randn(3, 7, 5, seed=1), randn(3, 7, 4, seed=2)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (net(weights, x) * y).tanh().sum()

    weights = {name: randn(*w.shape, seed=50 + k) for k, (name, w) in enumerate(module.named_parameters())}
    tangents = {name: randn(*w.shape, seed=60 + k) for k, (name, w) in enumerate(weights.items())}
    operator = hvp.HessianOperator(loss, weights, engine="linearized")
    functions = operator.linear_map.functions  # type: ignore[attr-defined]
    assert operator.linear_map.fallback is None
    solver = hvp.Neumann(3, alpha=0.01)
    eager = hvp.HessianOperator(loss, weights, engine="eager")
    for ours, theirs in (
        (operator @ tangents, eager @ tangents),
        (operator.solve(tangents, solver).value, eager.solve(tangents, solver).value),
    ):
        for name, product in theirs.items():
            torch.testing.assert_close(ours[name], product, rtol=1e-9, atol=1e-10)
    assert functions.native is not None and functions.native.program is not None, functions.native.describe()


def test_what_is_replaced() -> None:
    images, rows = randn(4, 8, 6, 6, seed=1).float(), randn(300, 256, seed=2).float()
    calls: list[tuple[Function, Tensor]] = [
        (nn.BatchNorm2d(8, track_running_stats=False), images),
        (nn.GroupNorm(2, 8), images),
        (nn.InstanceNorm2d(8), images),
        (nn.LayerNorm(256), rows),
        (nn.RMSNorm(256), rows),
    ]
    for function, x in calls:
        expected = function(x)
        with plain_kernels():
            found = function(x.requires_grad_())
        torch.testing.assert_close(found, expected)
        assert "hvp_engine" in str(found.grad_fn), function
    few = randn(3, 256, seed=3).float().requires_grad_()
    with plain_kernels(), torch.autocast("cpu", torch.bfloat16):
        assert "hvp_engine" not in str(nn.LayerNorm(256)(few).grad_fn)
        assert "hvp_engine" not in str(nn.GroupNorm(2, 8)(images.requires_grad_()).grad_fn)
