"""The compiled ops on random sizes, addresses, layouts and overlaps, against mathematics; also by `make sanitize`."""

from __future__ import annotations

import math
from typing import Any

import torch
from fused_op_oracles import BF16, F16, F32, F64, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp_engine._support.flat_vector import CHUNK
from hvp_engine.ops import OPS
from hvp_engine.ops.backend import use_backend

EXTENTS = st.sampled_from([0, 1, 2, 3, 7, 8, 17, 33])
SHAPES = st.one_of(
    st.lists(EXTENTS, max_size=3).map(tuple),
    st.integers(0, 70).map(lambda size: (size,)),
    st.integers(CHUNK - 3, CHUNK + 20).map(lambda size: (size,)),
)
KINDS = ["dense", "offset", "permuted", "every second", "expanded", "own part", "other memory of the state", "partials"]


def in_exact_memory(tensor: Tensor, offset: int) -> Tensor:
    """A copy that starts `offset` elements into its memory and ends where that ends."""
    memory = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)
    return memory[offset:].view(tensor.shape).copy_(tensor)


def product_of(draw: Any, case: Case, index: int, dtype: torch.dtype, kind: str) -> Tensor:
    """The product for tensor `index`, as `kind` says, where its shape allows that."""
    shape, numel = case.layout.shapes[index], case.layout.numels[index]
    state = draw(st.sampled_from(case.states))
    values = torch.randn(shape).to(dtype)
    if kind == "own part":
        return state.views[index]
    if kind == "other memory of the state" and numel:
        return state.data[draw(st.integers(0, len(state.data) - numel)) :][:numel].view(shape)
    if kind == "partials" and case.states[0].data.dtype == F64:
        return case.partials.fill_(0.5).view(-1)[draw(st.integers(0, 2))].expand(shape)
    if kind == "offset":
        return in_exact_memory(values, draw(st.integers(1, 9)))
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        back = sorted(range(len(shape)), key=order.__getitem__)
        return values.permute(order).contiguous().permute(back)
    if kind == "every second" and shape:
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if kind == "expanded":
        return torch.randn(()).to(dtype).expand(shape)
    return values


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_any_memory(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state = data.draw(st.sampled_from([F32, F64]))
    shapes = data.draw(st.lists(SHAPES, max_size=4))
    dtypes = [data.draw(st.sampled_from([state, F32, BF16, F16])) for _ in shapes]
    weights = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    case = Case.of(data.draw(st.sampled_from(list(OPS))), weights, state)
    least = case.layout.offsets[-1] + case.layout.numels[-1] if shapes else 0
    for vector in case.states:
        size = data.draw(st.sampled_from([least, case.layout.size]))
        vector.data = in_exact_memory(vector.data[:size], data.draw(st.integers(0, 5)))
        vector.views = case.layout.views(vector.data)
    kinds = [data.draw(st.sampled_from(KINDS)) for _ in shapes]
    with use_backend("cpp"):
        step = case.bind()
    products = [product_of(data.draw, case, i, dtypes[i], kind) for i, kind in enumerate(kinds)]
    assert [math.prod(product.shape) for product in products] == list(case.layout.numels)
    if case.name == "cg_step" and state == F64:
        step(products)  # only the memory: sanitizers keep its sums from being vectorized, and so less exact
    else:
        case.run_and_check(products, step)
