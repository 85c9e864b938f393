"""What recorded products take from torch's private side: fields of autograd's nodes, hooks, storages, zero tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from recorded_checks import calls, level
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hvp_engine._support import torch_compat, torch_compat_nodes
from hvp_engine._support.torch_compat_nodes import NodeFields
from hvp_engine.differentiation.recorded.library import Library

HEADER = Path(torch.__path__[0]) / "include/torch/csrc/autograd/generated/Functions.h"
W = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

SHOWN_BY_METADATA = {
    "at::ScalarType",
    "at::TensorOptions",
    "at::Layout",
    "torch::autograd::generated::TypeAndSize",
    "size_t",
    "::std::vector<at::ScalarType>",
}
"""Types of fields that Python does not see: dtypes, shapes, how many tensors a list has. The metadata of the nodes that
follow, and their number, have the same."""

ASKED_FOR = {"CatBackward0"}
"""Classes whose hidden fields the walk asks for itself: the sizes of a cat's parts follow, but of several constants."""

NOT_READ = {"retain_variables"}
"""Fields of which no product depends: whether buffers are kept."""


def weights() -> Tensor:
    return W.clone().requires_grad_()


def hidden_fields(header: str) -> dict[str, list[tuple[str, str]]]:
    """Of each generated class of nodes the fields (type, name) that it does not give to Python."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"struct TORCH_API (\w+) : public \w+ \{(.*?)\n\};", header, re.DOTALL):
        cls = getattr(torch._C._functions, name, None)
        shown = {attribute.removeprefix("_saved_") for attribute in dir(cls) if attribute.startswith("_saved_")}
        for line in body.splitlines():
            field = re.match(r"\s*([\w:<>,\s*?]+?)\s+(\w+)\s*(=[^;]*)?;\s*$", line)
            if field is None or "return" in line or "using" in line:
                continue
            kind, attribute = field[1].strip(), field[2]
            if attribute.endswith(("_released_", "_cached_kernel")) or not shown.isdisjoint(
                {attribute, attribute.removesuffix("_")}
            ):
                continue
            found.setdefault(name, []).append((kind, attribute))
    return found


@pytest.mark.skipif(not HEADER.exists(), reason="this torch has no headers")
def test_classes_that_hide_more_than_dtypes_and_shapes_are_known() -> None:
    found = hidden_fields(HEADER.read_text())
    assert len(found) > 50, "the header is not read"
    hiding = {
        name: [field for field in fields if field[0] not in SHOWN_BY_METADATA and field[1] not in NOT_READ]
        for name, fields in found.items()
    }
    unknown = {
        name: fields
        for name, fields in hiding.items()
        if fields and not torch_compat_nodes.HIDING_NODES.match(name) and name not in ASKED_FOR
    }
    assert not unknown, "name them in torch_compat_nodes.HIDING_NODES"
    assert {"AsStridedBackward0", "CatBackward0", "NativeDropoutBackward0"} <= {n for n, f in hiding.items() if f}


@pytest.mark.skipif(not HEADER.exists(), reason="this torch has no headers")
def test_classes_without_a_python_side_are_known() -> None:
    names = re.findall(r"struct TORCH_API (\w+) : public", HEADER.read_text())
    assert len(names) > 500
    missing = {name for name in names if not hasattr(torch._C._functions, name)}
    assert not {name for name in missing if not torch_compat_nodes.HIDING_NODES.match(name)}


def test_fields() -> None:
    w = weights()
    product = torch_compat_nodes.fields_of((w * w).grad_fn)
    assert product == NodeFields(("_saved_other", "_saved_self"), ())
    power = torch_compat_nodes.fields_of((w**3).grad_fn)
    assert power == NodeFields(("_saved_self",), ("_saved_exponent",))
    leaf = (w * w).grad_fn.next_functions[0][0]
    assert torch_compat_nodes.fields_of(leaf) == NodeFields((), ())
    for node in (torch.as_strided(w, (2,), (1,), 0).grad_fn, torch.block_diag(w, w).grad_fn):
        assert torch_compat_nodes.HIDING_NODES.match(node.name())
        assert "does not show what it holds" in torch_compat_nodes.fields_of(node)
    z = torch.zeros(3, dtype=torch.float64)
    z[:2] = w[:2]
    assert "CopySlices" in torch_compat_nodes.fields_of(z.grad_fn)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * g


class Twice0(Twice):
    """Its node is called as a generated one is not: with the suffix after the number."""


class MulBackward0(torch.autograd.Function):
    forward, backward = Twice.forward, Twice.backward


@pytest.mark.parametrize("function", [Twice, Twice0, MulBackward0])
def test_functions_of_users_show_nothing(function: type[torch.autograd.Function]) -> None:
    assert "does not show" in torch_compat_nodes.fields_of(function.apply(weights()).grad_fn)


def test_unpack_hooks() -> None:
    w = weights()
    assert not torch_compat_nodes.has_unpack_hook(w.exp().grad_fn._raw_saved_result)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        hooked, several = w.exp(), w[torch.tensor([0, 2])]
    assert torch_compat_nodes.has_unpack_hook(hooked.grad_fn._raw_saved_result)
    assert torch_compat_nodes.has_unpack_hook(several.grad_fn._raw_saved_indices)
    inside = checkpoint(torch.exp, w, use_reentrant=False)
    assert torch_compat_nodes.has_unpack_hook(inside.grad_fn._raw_saved_result)


def test_numbers_are_saved_without_hooks() -> None:
    """So the first tensor of a node does not tell of the others, if it is a number."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        node = (weights() * 2.0).grad_fn
    assert node._saved_other.shape == () and not torch_compat_nodes.has_unpack_hook(node._raw_saved_other)


def test_hooks() -> None:
    w = weights()
    assert not torch_compat_nodes.has_hooks(w)
    handle = w.register_hook(lambda g: g)
    assert torch_compat_nodes.has_hooks(w)
    handle.remove()
    assert not torch_compat_nodes.has_hooks(w)


def test_registered_hooks_are_counted() -> None:
    y = weights().exp()
    registrations = (
        lambda: y.register_hook(lambda g: g),
        lambda: y.grad_fn.register_hook(lambda a, b: a),
        lambda: y.grad_fn.register_prehook(lambda a: a),
        lambda: nn.Linear(2, 2).register_full_backward_hook(lambda *_: None),
    )
    for register in registrations:
        before = torch_compat_nodes.hooks_registered()
        register()
        assert torch_compat_nodes.hooks_registered() > before


def test_nodes_are_numbered_as_they_are_made() -> None:
    w = weights()
    before = torch_compat_nodes.sequence_number()
    first, second = w * 2, w * 3
    after = torch_compat_nodes.sequence_number()
    numbers = [torch_compat_nodes.sequence_number_of(y.grad_fn) for y in (first, second)]
    assert before <= numbers[0] < numbers[1] < after
    assert torch_compat_nodes.sequence_number_of(first.grad_fn.next_functions[0][0]) > after  # of a leaf


def test_metadata_of_inputs() -> None:
    w = weights()
    assert torch_compat_nodes.input_metadata(w.view(3, 1).grad_fn) == [(torch.float64, [3, 1])]
    assert torch_compat_nodes.input_metadata(w.float().grad_fn) == [(torch.float32, [3])]
    assert torch_compat_nodes.input_metadata(w.unbind(0)[1].grad_fn) == [(torch.float64, [])] * 3
    leaf = (w * w).grad_fn.next_functions[0][0]
    assert torch_compat_nodes.input_metadata(leaf) == [(torch.float64, [3])]


def test_storages_that_are_shared() -> None:
    x = torch.ones(4)
    assert not torch_compat.shares_storage(x)
    y = x[1:]
    assert torch_compat.shares_storage(x) and torch_compat.shares_storage(y)
    del y
    assert not torch_compat.shares_storage(x)
    detached = x.detach()
    assert torch_compat.shares_storage(detached)


def test_tensors_of_a_subclass() -> None:
    class Named(torch.Tensor):
        pass

    for x in (torch.ones(3, 4).t(), torch.ones(3).expand(2, 3), torch.ones(()), torch.eye(3).to_sparse()):
        named = torch_compat.subclass_of(Named, x)
        assert type(named) is Named and (named.shape, named.dtype, named.layout) == (x.shape, x.dtype, x.layout)
        with torch_compat.without_torch_functions_of_classes():
            assert type(named.t() if x.dim() else named + 1) is torch.Tensor
        assert x.is_sparse or type(named + 1) is Named


def test_elements_of_sparse_tensors() -> None:
    x = torch.eye(3)
    assert [torch_compat.elements_of(sparse) for sparse in (x.to_sparse(), x.to_sparse_csr())] == [3, 3]


def test_shapes_that_broadcast() -> None:
    shapes = [(), (1,), (3,), (0,), (2, 1), (2, 3), (4, 1, 3), (5, 1, 1, 1), (1, 1), (0, 1), (2, 2)]
    for first, second in product(shapes, repeat=2):
        sizes = torch.Size(first), torch.Size(second)
        try:
            expected = torch.broadcast_shapes(*sizes)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                torch_compat.broadcast_shapes(*sizes)
        else:
            assert torch_compat.broadcast_shapes(*sizes) == expected
    code = "import sys, torch; from hvp_engine._support.torch_compat import broadcast_shapes as f\n"
    code += "f(torch.Size([2, 1]), torch.Size([3])); assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_is_not_watched_inside_the_block() -> None:
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        with torch_compat.without_torch_functions():
            torch.ops.aten.sin.default(torch.sin(W))
        assert not seen
        torch.sin(W)
        assert seen == [torch.sin]


def test_autograd_calls_no_function_mode_but_hooks_do() -> None:
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for hooked in (False, True):
        w = weights()
        y = w.exp()
        if hooked:
            y.register_hook(lambda g: torch.mul(g, 2.0))
        z = y.square()
        with Watch():
            torch_compat.backward((z,), (W,), (w,))
        assert seen == ([torch.mul] if hooked else [])


CRASH = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
zeros = torch._efficientzerotensor((3,))
with Mode():
    torch.ops.aten.mul.Scalar(zeros, 2)
"""


def test_zero_tensors_crash_a_process() -> None:
    """Once torch has mended it, the recorder may leave them as they are."""
    assert torch_compat.is_zero_tensor(torch._efficientzerotensor((3,)))
    assert not torch_compat.is_zero_tensor(torch.zeros(3))
    assert subprocess.run([sys.executable, "-c", CRASH], capture_output=True).returncode < 0


def test_zero_tensors_are_recorded_as_zeros() -> None:
    w = weights()

    def loss() -> Tensor:
        _, t = torch.func.jvp(torch.func.grad(lambda r: torch.tanh(r * w).sum()), (W + 1,), (torch.ones_like(W),))
        return t.square().sum() + F.softplus(w).sum()

    assert {level(made) for made in calls(loss, [w], library=Library())} <= {1, 2}


def test_nodes_of_our_own_operators_show_all_that_they_keep() -> None:
    """Each level of attention, with a mask and dropout."""
    q, k, v = (torch.randn(1, 1, 3, 2, requires_grad=True) for _ in range(3))
    mask, seed = torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.tensor(1)
    output, _ = torch.ops.hvp_engine.attention(q, k, v, mask, seed, 0.5, False, 0.7)
    (gradient,) = torch.autograd.grad(output.sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), q, create_graph=True)
    for x, tensors in ((output, 7), (gradient, 8), (second, 11)):
        node = x.grad_fn
        assert node.name().startswith(torch_compat_nodes.OWN_NODES)
        assert torch_compat_nodes.fields_of(node) == NodeFields(("saved_tensors",), ("settings",))
        *places, p, causal, scale = node.settings  # "" where a tensor is saved, None where there is none
        assert (p, causal, scale) == (0.5, False, 0.7) and len(places) == tensors and {*places} <= {"", None}
        assert len(node.saved_tensors) == places.count("")
        assert not torch_compat_nodes.has_unpack_hook(node._raw_saved_tensors)
