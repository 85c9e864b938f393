"""Every operator of native programs against PyTorch's own, in float64, on many shapes and strides; also by `make
sanitize`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_graphs import by_extension, graph_of
from recurrences import BATCHES, arguments
from torch import Tensor

from hvp_engine.differentiable.recurrent.signatures import OPS

aten = torch.ops.aten
DTYPE = torch.float64

Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "dense": lambda t: t,
    "reversed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t,
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2] if t.dim() else t,
    "offset": lambda t: torch.cat([torch.zeros(3, dtype=t.dtype), t.reshape(-1)])[3:].view(t.shape),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=DTYPE) + 0.5


def choice(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape)


def max_pooled(x: Tensor) -> list[Tensor]:
    return [x, aten.max_pool2d_with_indices(x, [2, 2])[1]]


def layer_normalized(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x, w, *aten.native_layer_norm(x, list(w.shape), w, w, 1e-5)[1:]]


def batch_normalized(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x, w, *aten.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)[1:]]


Case = tuple[Callable[..., Any], list[Tensor], list[tuple[int, ...]]]
"""A function of known tensors and tangents, the known ones, and the shapes of the tangents."""


def cases() -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {}
    for shape in [(), (1,), (0,), (7,), (3, 5), (1, 5), (5, 1), (0, 3), (2, 3, 4), (2, 1, 3, 1, 2), (700,), (3, 600)]:
        for name, function in BINARY.items():
            found[f"{name} {shape}"] = lambda f=function, s=shape: (f, [positive(*s)], [s])
        for name, function in UNARY.items():
            found[f"{name} {shape}"] = lambda f=function, s=shape: (f, [], [s])
        for name, function in PAIRS.items():
            found[f"{name} {shape}"] = lambda f=function, s=shape: (f, [], [s, s])
    for m, k, n in [
        (3, 4, 5),
        (1, 4, 5),
        (3, 1, 5),
        (3, 4, 1),
        (1, 1, 1),
        (0, 4, 5),
        (3, 0, 5),
        (3, 4, 0),
        (40, 7, 10),
        (51, 131, 67),
    ]:
        for name, function in PRODUCTS.items():
            found[f"{name} {m, k, n}"] = lambda f=function, a=(m, k), b=(k, n): (f, [random(*a)], [b])
            found[f"{name} flipped {m, k, n}"] = lambda f=function, a=(m, k), b=(k, n): (
                lambda x, t: f(t, x), [random(*b)], [a]
            )  # fmt: skip
    found.update(SINGLE)
    return found


UNARY: dict[str, Callable[..., Any]] = {
    "neg": lambda t: -t,
    "numbers": lambda t: aten.div.Scalar(aten.mul.Scalar(t, 1.5), 3),
    "aliases": lambda t: aten.alias(aten.detach(t)) * 2,
    "reshape": lambda t: aten.reshape(aten._unsafe_view(t * 2, [-1]), t.shape),
    "scale": lambda t: t * 1.5,
    "div by number": lambda t: t / 3,
    "copy": lambda t: t.clone(),
    "identity": lambda t: t,
    "sum": lambda t: t.sum(),
    "mean": lambda t: t.mean() if t.numel() else t.sum(),
    "flat": lambda t: t.reshape(-1),
    "transposed flat": lambda t: t.movedim(0, -1).reshape(-1) if t.dim() else t,
    "sum of dims": lambda t: t.sum(list(range(t.dim()))[:-1]) if t.dim() > 1 else t.sum(0) if t.dim() else t,
    "sum of last": lambda t: t.sum(-1, keepdim=True) if t.dim() else t,
    "sum of first": lambda t: t.mean(0) if t.dim() and len(t) else t,
    "flip": lambda t: t.flip(0) if t.dim() else t,
    "roll": lambda t: t.roll(2, -1) if t.dim() else t,
    "used twice": lambda t: (t * 2 + t, t - t.sum()),
    "cat": lambda t: torch.cat([t, t * 2], -1) if t.dim() else t,
    "stack": lambda t: torch.stack([t, -t], 1) if t.dim() else torch.stack([t, t]),
    "repeat": lambda t: t.repeat(*[2] * t.dim()) if t.dim() else t,
    "zeros": lambda t: torch.zeros_like(t) + t.new_zeros(t.shape),
    "constants": lambda t: torch.ones_like(t) + t.new_ones(t.shape) * torch.full_like(t, 3) - t.new_full(t.shape, 2),
    "long chain": lambda t: sum((t * (i + 1.0) for i in range(40)), t),
}
BINARY: dict[str, Callable[..., Any]] = {
    "mul": lambda x, t: x * t,
    "mul, other order": lambda x, t: t * x,
    "div": lambda x, t: t / x,
    "add to known": lambda x, t: x + t,
    "sub with alpha": lambda x, t: torch.sub(x, t, alpha=0.3),
    "add with alpha": lambda x, t: torch.add(t, x, alpha=-2),
    "addcmul": lambda x, t: torch.addcmul(t, x, t, value=0.7),
    "addcdiv": lambda x, t: torch.addcdiv(t, t, x, value=0.7),
    "tanh": lambda x, t: aten.tanh_backward(t, x),
    "sigmoid": lambda x, t: aten.sigmoid_backward(t, x),
    "threshold": lambda x, t: aten.threshold_backward(t, x - 1, 0.2),
    "gelu": lambda x, t: aten.gelu_backward(t, x, approximate="tanh"),
    "silu": lambda x, t: aten.silu_backward(t, x),
    "elu": lambda x, t: aten.elu_backward(t, 1.0, 1.0, 1.0, False, x),
    "leaky relu": lambda x, t: aten.leaky_relu_backward(t, x - 1, 0.1, False),
    "softplus": lambda x, t: aten.softplus_backward(t, x, 1.0, 20.0),
    "hardtanh": lambda x, t: aten.hardtanh_backward(t, x, -1.0, 1.0),
    "mish": lambda x, t: aten.mish_backward(t, x),
    "hardsigmoid": lambda x, t: aten.hardsigmoid_backward(t, x),
    "log sigmoid": lambda x, t: aten.log_sigmoid_backward(t, x, x.sigmoid()),
    "softshrink": lambda x, t: aten.softshrink_backward(t, x, 0.7),
    "hardshrink": lambda x, t: aten.hardshrink_backward(t, x, 0.7),
    "known and numbers": lambda x, t: aten.sub.Scalar(aten.add.Scalar(x, 2, 3), 1) * t,
    "known of other types": lambda x, t: (x.float().double() + x.long()) * t,
    "hardswish": lambda x, t: aten.hardswish_backward(t, x),
    "dropout": lambda x, t: aten.native_dropout_backward(t, x > 1, 2.0),
    "where": lambda x, t: torch.where(x > 1, t, 2 * t),
    "masked fill": lambda x, t: t.masked_fill(x > 1, 0.0),
    "mask": lambda x, t: (x > 1) * t,
    "mask of integers": lambda x, t: (x > 1).long() * t,
    "known chain": lambda x, t: (x * 2 - x / 3 + 1).neg() * t,
    "broadcast": lambda x, t: x.sum() * t,
    "log softmax": lambda x, t: aten._log_softmax_backward_data(t, -x, -1, DTYPE),
    "softmax": lambda x, t: aten._softmax_backward_data(t, x, 0, DTYPE),
    "index put": lambda x, t: (
        torch.index_put(x, [torch.zeros(3).long()], t[:1].expand(3, *t.shape[1:]), True) if t.dim() and len(t) else t
    ),
}
PAIRS: dict[str, Callable[..., Any]] = {
    "add": lambda s, t: s + t,
    "sub": lambda s, t: (s - t, t - s),
    "cat of two": lambda s, t: torch.cat([s, t]) if s.dim() else s + t,
    "swapped": lambda s, t: (t, s),
    "diamond": lambda s, t: ((s + t) * 2, (s + t) - t),
}  # fmt: skip
PRODUCTS: dict[str, Callable[..., Any]] = {
    "mm": lambda a, b: a @ b,
    "mm of transposed": lambda a, b: (b.t() @ a.t()).t(),
    "mm of sliced": lambda a, b: a[:, ::2] @ b[::2],
    "mm of expanded": lambda a, b: a @ b.sum(1, keepdim=True).expand(-1, 4),
    "addmm of vector": lambda a, b: torch.addmm((a @ b).sum(0), a, b),
    "addmm of result": lambda a, b: torch.addmm(torch.addmm(b.sum(0), a, b), a, b * 2, alpha=0.5),
    "addmm of shared": lambda a, b: (lambda c: (torch.addmm(c, a, b), c * 2))(a @ b),
    "addmm of transposed": lambda a, b: torch.addmm((b.t() @ a.t()).t(), a, b),
    "addmm of chain": lambda a, b: torch.addmm((a @ b) * 2 + 1, a, b),
}
SINGLE: dict[str, Callable[[], Case]] = {
    "bmm": lambda: (lambda a, t: a @ t, [random(4, 3, 5)], [(4, 5, 2)]),
    "bmm of heads": lambda: (
        lambda a, t: a.transpose(1, 2) @ t.view(2, 6, 3, 4).transpose(1, 2), [random(2, 5, 3, 6)], [(2, 6, 12)]
    ),
    "bmm expanded": lambda: (lambda a, t: a.expand(4, 3, 5) @ t, [random(3, 5)], [(4, 5, 2)]),
    "baddbmm": lambda: (lambda a, t: torch.baddbmm(t.sum((1, 2), keepdim=True), a, t), [random(4, 3, 5)], [(4, 5, 2)]),
    "addmm of its own factors": lambda: (
        lambda x, t: (lambda c: torch.addmm(torch.addmm(c, c, x), x, torch.addmm(x @ c, x, x @ c)))(x @ t),
        [random(4, 4)], [(4, 4)],
    ),
    "threshold of NaN": lambda: (
        lambda x, t: aten.threshold_backward(t, x, 0.0), [torch.tensor([torch.nan, -1, 0, 1], dtype=DTYPE)], [(4,)]
    ),
    "mv": lambda: (torch.mv, [random(4, 3)], [(3,)]),
    "dot": lambda: (torch.dot, [random(4)], [(4,)]),
    "select": lambda: (lambda t: t.select(1, -1) * t.select(1, 0), [], [(3, 4)]),
    "slice": lambda: (lambda t: t[:, 1:-1:2] + t[-3:, :2], [], [(3, 5)]),
    "split": lambda: (lambda t: tuple(t.split(2, 1)), [], [(3, 5)]),
    "chunk": lambda: (lambda t: (lambda a, b, c, d: a * 2 + b - c * d.sum())(*t.chunk(4, 1)), [], [(3, 8)]),
    "split with sizes": lambda: (lambda t: tuple(t.split([1, 3, 1], 1)), [], [(3, 5)]),
    "squeeze of several": lambda: (lambda t: aten.squeeze.dims(t, [0, 2, 1]) * 2, [], [(1, 3, 1)]),
    "unbind": lambda: (lambda t: t.unbind(1)[2] - t.unbind(0)[1].sum(), [], [(3, 5)]),
    "unsqueeze": lambda: (lambda t: (t.unsqueeze(1) + t.unsqueeze(-1)).squeeze(0), [], [(3,)]),
    "squeeze": lambda: (lambda t: t.squeeze() + t.squeeze(0).squeeze(-1), [], [(1, 3, 1)]),
    "view that needs a copy": lambda: (lambda t: t.t().reshape(4, 3), [], [(4, 3)]),
    "view of expanded": lambda: (lambda t: t.expand(2, 3).reshape(6), [], [(3,)]),
    "permute": lambda: (lambda t: t.permute(2, 0, 1) * 2, [], [(2, 3, 4)]),
    "slice backward": lambda: (lambda t: aten.slice_backward(t, [3, 7], 1, 1, 6, 2), [], [(3, 3)]),
    "select backward": lambda: (lambda t: aten.select_backward(t, [3, 4], 1, -1), [], [(3,)]),
    "pad": lambda: (lambda t: aten.constant_pad_nd(t, [1, 2, -1, 1]), [], [(3, 4)]),
    "index select": lambda: (lambda i, t: t.index_select(1, i), [choice(4, 6)], [(2, 4, 3)]),
    "index select of transposed": lambda: (lambda i, t: t.t().index_select(0, i), [choice(4, 6)], [(3, 4)]),
    "embedding": lambda: (lambda i, t: aten.embedding(t, i), [choice(5, 2, 3)], [(5, 4)]),
    "embedding backward": lambda: (
        lambda i, t: aten.embedding_dense_backward(t, i, 5, 2, False), [choice(5, 2, 3)], [(2, 3, 4)]
    ),
    "embedding backward, no padding": lambda: (
        lambda i, t: aten.embedding_dense_backward(t * 2, i, 5, -1, False), [choice(5, 9)], [(9, 4)]
    ),
    "gather": lambda: (lambda i, t: t.gather(1, i), [choice(4, 3, 2)], [(3, 4)]),
    "scatter add": lambda: (
        lambda i, x, t: x.scatter_add(1, i, t), [choice(4, 2, 2), random(3, 4)], [(3, 3)]
    ),
    "advanced index": lambda: (lambda i, t: t[i, i] + t[:, i].sum(0), [choice(3, 5)], [(3, 3)]),
    "advanced index put": lambda: (
        lambda i, t: torch.index_put(t.new_zeros(3, 4), [i, i], t.sum() + t[0], True), [choice(3, 5)], [(2, 5)]
    ),
    "take": lambda: (lambda i, t: t.take(i), [choice(12, 5)], [(3, 4)]),
    "diagonal": lambda: (lambda t: t.diagonal(1) * 2, [], [(3, 4)]),
    "unfold": lambda: (lambda t: t.unfold(0, 3, 2) * 2, [], [(9,)]),
    "max pool backward": lambda: (
        lambda x, i, t: aten.max_pool2d_with_indices_backward(t, x, [2, 2], [2, 2], [0, 0], [1, 1], False, i),
        max_pooled(random(2, 3, 4, 6)), [(2, 3, 2, 3)],
    ),
    "layer norm": lambda: (
        lambda x, w, m, s, t: aten.native_layer_norm_backward(t, x, [4], m, s, w, w, [True] * 3),
        layer_normalized(random(2, 3, 4), random(4)), [(2, 3, 4)],
    ),
    "layer norm without weight": lambda: (
        lambda x, w, m, s, t: aten.native_layer_norm_backward(t, x, [3, 4], m, s, None, None, [True, False, False])[0],
        layer_normalized(random(2, 3, 4), random(3, 4)), [(2, 3, 4)],
    ),
    "batch norm": lambda: (
        lambda x, w, m, s, t: aten.native_batch_norm_backward(t, x, w, None, None, m, s, True, 1e-5, [True] * 3),
        batch_normalized(random(5, 3, 4), random(3)), [(5, 3, 4)],
    ),
    "batch norm in evaluation": lambda: (
        lambda x, w, m, v, t: aten.native_batch_norm_backward(t, x, w, m, v, None, None, False, 1e-5, [True] * 3),
        [random(5, 3, 2, 4), random(3), random(3), random(3).square()], [(5, 3, 2, 4)],
    ),
    "batch norm in evaluation, without weight": lambda: (
        lambda x, m, v, t: aten.native_batch_norm_backward(
            t, x, None, m, v, None, None, False, 1e-5, [True, False, True]
        )[::2],
        [random(5, 3), random(3), random(3).square()], [(5, 3)],
    ),
    "bias of a batch": lambda: (lambda x, t: x @ t[:, :3].t() + t[:, 3], [random(60, 3)], [(4, 4)]),
    "seven dimensions": lambda: (lambda t: t.permute(6, 4, 2, 0, 1, 3, 5).reshape(-1) * 2, [], [(1, 2, 1, 3, 1, 2, 1)]),
}  # fmt: skip


def recurrence(name: str, batch: str, moving: str) -> Callable[[], Case]:
    """An operation in which the arguments of these names depend on tangents, used twice."""
    target, op = getattr(torch.ops.hvp_engine, name).default, OPS[name]
    names = list(op.arguments)

    def case() -> Case:
        given = arguments(name, *BATCHES[batch])
        if op.keeps:
            given[-1] = False
        places = [names.index(one) for one in moving.split()]
        known = [i for i, one in enumerate(given) if isinstance(one, Tensor) and i not in places]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(given)
            for place, tensor in zip([*known, *places], tensors, strict=True):
                filled[place] = tensor * 2 if place in places else tensor
            results = target(*filled)
            return tuple(r + 1 for r in results if r.numel())

        return function, [given[i] for i in known], [given[i].shape for i in places]

    return case


RECURRENCES = {
    "lstm_recurrence_backward": "output_grad gates_grad",
    "lstm_recurrence_double_backward": "projected_cotangent hidden_cotangent cell_cotangent",
    "gru_recurrence_backward": "output_grad",
    "gru_recurrence_double_backward": "projected_cotangent recurrent_cotangent hidden_cotangent",
}
for _batch in ("one sequence", "equal lengths", "packed", "packed, from the end", "tiles"):
    SINGLE.update({f"{name}, {_batch}": recurrence(name, _batch, moving) for name, moving in RECURRENCES.items()})
CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name: str) -> None:
    torch.manual_seed(0)
    function, known, shapes = CASES[name]()
    tangents = [random(*shape) for shape in shapes]
    expected = function(*known, *tangents)
    expected = expected if isinstance(expected, tuple) else (expected,)
    graph = graph_of(function, known, tangents)
    for layout, lay_out in LAYOUTS.items():
        given = [[lay_out(tensor) for tensor in tensors] for tensors in (known, tangents)]
        for ours, theirs in zip(by_extension(graph, *given), expected, strict=True):
            torch.testing.assert_close(
                ours, theirs.contiguous(), rtol=1e-12, atol=1e-13, msg=lambda text, layout=layout: f"{layout}: {text}"
            )


PIECES: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda x, a, b: a + b,
    lambda x, a, b: a - x * b,
    lambda x, a, b: a.t(),
    lambda x, a, b: x @ a + b,
    lambda x, a, b: torch.addmm(a, x, b),
    lambda x, a, b: (lambda c: torch.addmm(c, c, b))(x @ a),
    lambda x, a, b: torch.addmm(a.sum(0), b, x.t(), alpha=0.5),
    lambda x, a, b: torch.cat([a[:3], b[3:]]),
    lambda x, a, b: a * b.new_ones(6, 6) - b.mean(1, keepdim=True),
    lambda x, a, b: aten.tanh_backward(a, x) + b[:, :1],
    lambda x, a, b: aten._softmax_backward_data(a, x, 1, DTYPE),
    lambda x, a, b: aten.threshold_backward(b, x, 0.1) / 2,
    lambda x, a, b: (a.reshape(2, 3, 6) @ b.expand(2, 6, 6)).transpose(0, 1).reshape(6, 6),
    lambda x, a, b: a.flip(1) + b.roll(1, 0),
    lambda x, a, b: torch.stack([a.select(0, 2), *b.unbind(1)[:5]], 1).clone(),
]


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
@pytest.mark.parametrize(
    "sizes", [(8, 800, 20), (13, 200, 16), (30, 210, 64), (67, 97, 131), (100, 33, 50), (3, 600, 49)]
)
def test_larger_products(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Each matrix as it is and transposed, alone and onto something, against float64."""
    torch.manual_seed(0)
    m, k, n = sizes

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return (
            a @ b,
            (b.t() @ a.t()) * 2,
            torch.addmm(c, a, b, alpha=-0.3),
            torch.addmm(c.t() * 2, b.t(), a.t(), alpha=2),
        )

    wide = [random(m, k), random(k, n), random(m, n)]
    expected = function(*wide)
    for flip_a, flip_b, flip_c in itertools.product([False, True], repeat=3):
        flips = (flip_a, flip_b, flip_c)
        given = [t.t().contiguous().t() if flip else t for t, flip in zip(wide, flips, strict=True)]
        found = by_extension(function, [given[0].to(dtype)], [t.to(dtype) for t in given[1:]])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours.to(DTYPE), theirs.contiguous(), rtol=0, atol=(1e-13 if dtype == DTYPE else 1e-4) * k
            )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Chains of operations on values that are used again at random, of which the last and a random one are kept."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    steps = data.draw(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(0, 99), st.integers(0, 99)), min_size=1))
    kept = data.draw(st.integers(0, 99))

    def function(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        values = [s, t]
        for piece, first, second in steps:
            values.append(piece(x, values[first % len(values)], values[second % len(values)]))
        return values[-1], values[kept % len(values)], values[-1].t()

    x, s, t = (random(6, 6) / 3 for _ in range(3))
    for ours, theirs in zip(by_extension(function, [x], [s, t.t()]), function(x, s, t.t()), strict=True):
        torch.testing.assert_close(ours, theirs.contiguous(), rtol=1e-11, atol=1e-11)
