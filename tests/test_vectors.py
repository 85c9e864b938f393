"""Layouts and flat vectors: views share memory, have the weights' strides, and leave the gaps alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp_engine._support.flat_vector import (
    ALIGNMENT,
    CHUNK,
    FlatVector,
    Layout,
    offsets_of,
    padded,
    partial_rows,
    state_dtype_of,
)


def numbered(shape: tuple[int, ...], order: tuple[int, ...] | None = None, dtype=torch.float32) -> Tensor:
    """A dense tensor of distinct values whose dimensions lie in memory in `order`, outermost first."""
    order = order or tuple(range(len(shape)))
    stored = torch.arange(math.prod(shape), dtype=dtype).reshape([shape[d] for d in order])
    return stored.permute([order.index(d) for d in range(len(shape))])


@st.composite
def dense_tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    return numbered(shape, tuple(draw(st.permutations(range(len(shape))))))


@st.composite
def any_tensors(draw: st.DrawFn) -> Tensor:
    """Dense, sliced, expanded or with odd strides in dimensions of size 1."""
    tensor = draw(dense_tensors())
    for d in range(tensor.dim()):
        match draw(st.integers(0, 5)):
            case 0:
                tensor = tensor[(slice(None),) * d + (slice(None, None, 2),)]
            case 1:
                tensor = tensor.narrow(d, 0, min(1, tensor.shape[d])).expand(
                    *tensor.shape[:d], min(3, 3 * tensor.shape[d]), *tensor.shape[d + 1 :]
                )
            case 2 if tensor.shape[d] == 1:
                stride = list(tensor.stride())
                stride[d] = draw(st.sampled_from([0, 1, 2, 7, 1000]))
                tensor = tensor.as_strided(tensor.shape, stride)
    return tensor


def test_slices_cut_each_tensor_into_chunks() -> None:
    numels = (0, 1, CHUNK, 0, 0, 2 * CHUNK + 7, 5, 0)
    layout = Layout.of([torch.empty(n) for n in numels])
    expected = [
        [tensor, begin, offset + begin, min(CHUNK, numel - begin)]
        for tensor, (numel, offset) in enumerate(zip(numels, layout.offsets, strict=True))
        for begin in range(0, numel, CHUNK)
    ]
    assert layout.slices.tolist() == expected and len(expected) == layout.partial_rows
    assert layout.slices.dtype == torch.int64 and layout.slices.is_contiguous()
    assert Layout.of([]).slices.shape == (0, 4)


def test_offsets_are_aligned_and_hold_the_size_at_the_end() -> None:
    assert offsets_of([]) == (0,)
    assert offsets_of([1, 0, 16, 17, 5]) == (0, 16, 16, 32, 64, 80)
    assert [padded(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_partial_rows_count_started_chunks() -> None:
    assert partial_rows([]) == partial_rows([0]) == 1  # room for one row of zeros, so that totals always exist
    assert partial_rows([1, 0, CHUNK, CHUNK + 1]) == 4


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ([], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_state_dtype(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert state_dtype_of(dtypes) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(any_tensors(), max_size=4))
def test_a_flat_vector_holds_its_tensors(tensors: list[Tensor]) -> None:
    layout = Layout.of(tensors)
    vector = FlatVector.of(layout, tensors)
    assert vector.data.shape == (layout.size,)
    assert layout.size % ALIGNMENT == 0
    for view, tensor in zip(vector.views, tensors, strict=True):
        assert torch.equal(view, tensor)
        assert view.shape == tensor.shape
    vector.data += 1
    for view, tensor in zip(vector.views, tensors, strict=True):
        assert torch.equal(view, tensor + 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(any_tensors(), max_size=4))
def test_views_do_not_overlap_and_gaps_stay_zero(tensors: list[Tensor]) -> None:
    layout = Layout.of(tensors)
    vector = FlatVector(layout)
    for view in vector.views:
        view += 1
    assert vector.data.sum() == sum(tensor.numel() for tensor in tensors)
    assert ((vector.data == 0) | (vector.data == 1)).all()
    for start, numel in zip(layout.offsets, layout.numels, strict=True):
        assert start % ALIGNMENT == 0
        assert (vector.data[start : start + numel] == 1).all(), "a tensor's elements must be contiguous in the buffer"


@settings(max_examples=200, deadline=None)
@given(dense_tensors())
def test_dense_tensors_keep_their_strides(tensor: Tensor) -> None:
    (view,) = FlatVector(Layout.of([tensor])).views
    for size, mine, theirs in zip(tensor.shape, view.stride(), tensor.stride(), strict=True):
        assert mine == theirs or size == 1 or tensor.numel() == 0


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(6, 8)[:, ::2], torch.randn(5, 1).expand(5, 4), torch.randn(1).expand(9), torch.randn(4, 6, 3)[:, 1:3]],
    ids=["strided", "expanded", "one value", "sliced"],
)
def test_other_tensors_get_a_dense_view(tensor: Tensor) -> None:
    (view,) = FlatVector.of(Layout.of([tensor]), [tensor]).views
    assert torch.equal(view, tensor)
    assert view.is_contiguous()


@settings(max_examples=300, deadline=None)
@given(any_tensors(), st.data())
def test_rows_have_the_storage_order_of_the_view(weight: Tensor, data: st.DataObject) -> None:
    """Whatever the strides of a product, its row holds its elements where the weight's view holds them."""
    order = tuple(data.draw(st.permutations(range(weight.dim()))))
    product = numbered(tuple(weight.shape), order) + 1
    layout = Layout.of([weight])
    (row,) = layout.rows([product])
    assert row.is_contiguous()
    buffer = torch.zeros(layout.size)
    buffer[: row.numel()] = row.reshape(-1)
    (view,) = layout.views(buffer)
    assert torch.equal(view, product)


def test_rows_of_channels_last_weights() -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    layout = Layout.of([weight])
    assert layout.orders == ((0, 2, 3, 1),)
    product = torch.randn(2, 3, 4, 5)
    (row,) = layout.rows([product])
    assert torch.equal(row, product.permute(0, 2, 3, 1))
    same = product.to(memory_format=torch.channels_last)
    (row,) = layout.rows([same])
    assert row.data_ptr() == same.data_ptr(), "a product with the weight's strides must not be copied"


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1, 1), (3, 1, 5), (1, 3, 1, 5), (2, 1, 1, 1), (1,), ()])
@pytest.mark.parametrize("odd", [0, 1, 3, 1000])
def test_dimensions_of_size_one_cost_no_copy(shape: tuple[int, ...], odd: int) -> None:
    """Their strides are arbitrary and may tie with others: elements and order must not depend on them."""
    plain = numbered(shape)
    strides = [odd if size == 1 else stride for size, stride in zip(shape, plain.stride(), strict=True)]
    weight = plain.as_strided(shape, strides)
    layout = Layout.of([weight])
    assert torch.equal(FlatVector.of(layout, [weight]).views[0], plain)
    (row,) = layout.rows([plain])
    assert row.data_ptr() == plain.data_ptr()
    assert torch.equal(row.reshape(-1), plain.reshape(-1))


def test_rows_are_apart_from_the_states() -> None:
    weights = [torch.randn(3, 4), torch.randn(3, 4)]
    layout = Layout.of(weights)
    vector = FlatVector.of(layout, weights)
    rows = layout.rows([vector.views[1], weights[0]], apart_from=[vector.data])
    assert rows[1].data_ptr() == weights[0].data_ptr()
    vector.data.zero_()
    assert torch.equal(rows[0], weights[1])


def test_rows_resolve_lazy_negation() -> None:
    """The imaginary part of a conjugate carries a bit instead of negated values, which raw pointers would miss."""
    negated = torch.randn((), dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    (row,) = Layout.of([torch.zeros(())]).rows([negated])
    assert not row.is_neg() and torch.equal(row, negated)


def test_no_tensors_and_empty_tensors() -> None:
    for tensors in ([], [torch.empty(0)], [torch.empty(3, 0, 2), torch.empty(0)]):
        layout = Layout.of(tensors)
        vector = FlatVector.of(layout, tensors)
        assert layout.size == vector.data.numel() == 0
        assert [view.shape for view in vector.views] == [tensor.shape for tensor in tensors]
        assert layout.empty_partials().shape == (1, 3)
        assert [row.numel() for row in layout.rows(tensors)] == [0] * len(tensors)


def test_mixed_dtypes_share_one_state_and_tangents_follow_it() -> None:
    weights = [torch.randn(3), torch.randn(2, 2).to(torch.bfloat16), torch.randn(()).half()]
    layout = Layout.of(weights)
    assert layout.state_dtype == torch.float32 and layout.low_precision
    vector = FlatVector.of(layout, weights)
    assert [tangent.dtype for tangent in vector.tangents] == [weight.dtype for weight in weights]
    assert vector.tangents[0] is vector.views[0]
    vector.data.fill_(1.001)
    assert torch.equal(vector.tangents[1], weights[1]), "copies change only when refreshed"
    vector.refresh()
    for view, tangent in zip(vector.views, vector.tangents, strict=True):
        assert torch.equal(tangent, view.to(tangent.dtype))


def test_low_precision_tangents_keep_the_strides_of_the_weight() -> None:
    weight = torch.randn(2, 3, 4, 5).to(torch.bfloat16, memory_format=torch.channels_last)
    vector = FlatVector.of(Layout.of([weight]), [weight])
    assert vector.tangents[0].stride() == vector.views[0].stride() == weight.stride()
    assert torch.equal(vector.tangents[0], weight)


def test_full_precision_tangents_are_the_views() -> None:
    layout = Layout.of([torch.randn(3), torch.randn(2)])
    assert not layout.low_precision
    vector = FlatVector(layout)
    assert vector.tangents is vector.views


def test_an_assigned_vector_shares_nothing() -> None:
    weights = [torch.randn(3, 2), torch.randn(5).to(torch.bfloat16)]
    vector = FlatVector.of(Layout.of(weights), weights)
    other = FlatVector(vector.layout)
    other.assign(vector)
    vector.data.zero_()
    vector.refresh()
    assert torch.equal(other.views[0], weights[0])
    assert torch.equal(other.tangents[1], weights[1])


def test_views_of_a_buffer_inside_another() -> None:
    layout = Layout.of([torch.randn(2, 3), torch.randn(4)])
    memory = torch.zeros(100)
    for view in layout.views(memory[7 : 7 + layout.size]):
        view.fill_(1)
    assert memory[7:13].eq(1).all() and memory[23:27].eq(1).all() and memory.sum() == 10


def test_copying_takes_tensors_of_other_strides_and_dtypes() -> None:
    layout = Layout.of([torch.randn(3, 4), torch.randn(5)])
    source = [
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True).T,
        torch.randn(1, dtype=torch.bfloat16).expand(5),
    ]
    vector = FlatVector.of(layout, source)
    for view, tensor in zip(vector.views, source, strict=True):
        assert torch.equal(view, tensor.float())
        assert not view.requires_grad


def test_lists_alike_share_a_layout():
    """So that its offsets, and the tables that kernels read, are made once."""
    lists = [[torch.randn(3, 4), torch.randn(5, 2).T.double()] for _ in range(2)]
    assert Layout.of(lists[0]) is Layout.of(lists[1])
    for other in (
        [torch.randn(3, 4), torch.randn(2, 5).double()],
        [torch.randn(3, 4), torch.randn(5, 2).T],
        lists[0][:1],
        [tensor.to("meta") for tensor in lists[0]],
    ):
        assert Layout.of(other) != Layout.of(lists[0])
