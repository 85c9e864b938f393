"""Operations on abstract tensors give what they give on real ones, but for the values."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hvp_engine.differentiation.abstract_tensor import _ELEMENTWISE, AbstractTensor, abstract

aten = torch.ops.aten


def same_form(found: object, expected: object) -> bool:
    if isinstance(expected, (tuple, list)):
        assert isinstance(found, (tuple, list))
        return len(found) == len(expected) and all(map(same_form, found, expected))
    assert isinstance(found, AbstractTensor) and isinstance(expected, Tensor)
    strides = found.stride() == expected.stride() or not expected.numel()
    forms = [(t.shape, t.dtype, t.device, t.layout) for t in (found, expected)]
    return strides and forms[0] == forms[1]


def laid_out() -> dict[str, Tensor]:
    image = torch.rand(2, 3, 4, 5)
    return {
        "rows": torch.rand(4, 5),
        "columns": torch.rand(5, 4).t(),
        "expanded": torch.rand(5).expand(4, 5),
        "expanded across": torch.rand(4, 1).expand(4, 5),
        "sliced": torch.rand(4, 9)[:, :5],
        "every other": torch.rand(4, 10)[:, ::2],
        "number": torch.rand(()),
        "row": torch.rand(5),
        "column": torch.rand(4, 1),
        "single": torch.rand(1, 1),
        "empty": torch.rand(0, 4, 5),
        "image": image,
        "image, channels last": image.to(memory_format=torch.channels_last),
        "image, sliced": torch.rand(2, 6, 4, 5)[:, ::2],
        "permuted": torch.rand(4, 2, 5, 3).permute(1, 3, 0, 2),
        "double": torch.rand(4, 5, dtype=torch.float64),
        "half": torch.rand(4, 5).bfloat16(),
        "whole numbers": torch.arange(20).reshape(4, 5),
        "mask": torch.rand(4, 5) > 0.5,
    }


TENSORS = laid_out()


@pytest.mark.parametrize("first", TENSORS)
def test_two_operands(first: str) -> None:
    x = TENSORS[first]
    for second, y in TENSORS.items():
        for operation in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.maximum.default):
            try:
                expected = operation(x, y)
            except RuntimeError:  # they do not fit
                break
            assert same_form(operation(abstract(x), abstract(y)), expected), (second, operation)


@pytest.mark.parametrize("name", [name for name, x in TENSORS.items() if x.is_floating_point()])
def test_elementwise(name: str) -> None:
    x = TENSORS[name]
    for operation in _ELEMENTWISE:
        required = [a for a in operation._schema.arguments if not a.has_default_value()]
        arguments = [x if str(a.type) == "Tensor" else 2.0 for a in required]
        given = [abstract(a) if isinstance(a, Tensor) else a for a in arguments]
        assert same_form(operation(*given), operation(*arguments)), operation


@pytest.mark.parametrize("name", TENSORS)
def test_views_and_other_operations(name: str) -> None:
    x = TENSORS[name]
    a = abstract(x)
    assert same_form(a, x)
    calls = [
        lambda t: t.detach(),
        lambda t: t.unsqueeze(0),
        lambda t: t.expand(3, *t.shape),
        lambda t: t.new_empty((2, 3)),
        lambda t: torch.empty_like(t, dtype=torch.float64),
        lambda t: aten._to_copy.default(t, dtype=torch.float64),
        lambda t: aten.gt.Scalar(t, 0),
        lambda t: aten.full_like.default(t, 1.0, device=torch.device("cpu")),
        lambda t: aten.cat.default([t.reshape(-1), t.reshape(-1)]),
        lambda t: aten.sum.default(t),
        lambda t: aten.sum.dim_IntList(t, []),
        lambda t: aten.sum.dim_IntList(t, None, True),
        lambda t: aten.sum.dim_IntList(t, [-1] if t.dim() else []),
    ]
    if x.dim() > 1:
        calls += [
            lambda t: t.transpose(0, 1),
            lambda t: t.permute(*range(1, t.dim()), 0),
            lambda t: t[..., 1:],
            lambda t: t.select(-1, 0),
            lambda t: t.split(1, -1),
            lambda t: t.unbind(-1),
            lambda t: aten.sum.dim_IntList(t, [0], True),
            lambda t: aten.sum.dim_IntList(t, [0, -1]),
            lambda t: t.detach() if t.stride(0) >= 0 else t,
        ]
    for call in calls:
        assert same_form(call(a), call(x))


def test_sparse() -> None:
    x = torch.eye(3).to_sparse()
    assert abstract(x).layout is torch.sparse_coo and abstract(x).shape == x.shape


def test_no_values() -> None:
    with pytest.raises(RuntimeError):
        abstract(torch.ones(3)).sum().item()


def test_the_compiler_stays_out() -> None:
    """A first program of a process does not wait for the import of torch.compile."""
    code = """
import sys, torch, hvp_engine as hvp
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
w, x, y = list(net.parameters()), torch.randn(5, 4), torch.randint(3, (5,))
for _ in range(6):
    loss = torch.nn.functional.cross_entropy(net(x), y) + 0.1 * sum((p**2).sum() for p in w)
    f = torch.autograd.grad(loss, w, create_graph=True)
    hvp.approx_inverse_hvp([torch.ones_like(p) for p in w], f, w, 20, 0.1)
from hvp_engine.differentiation.recorded.library import LIBRARY
assert LIBRARY.built == 1, LIBRARY.built
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
