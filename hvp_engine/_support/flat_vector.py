"""A list of tensors as one flat buffer with views.

Solvers work on one flat vector; autograd takes one tensor for each weight. A :class:`Layout` says where each
tensor lives in the flat buffer, and a :class:`FlatVector` is a buffer together with views that have the
weights' own shapes and strides, so that nothing is ever concatenated or split.

Every tensor starts at a multiple of :data:`ALIGNMENT` elements, so that vector loads are aligned whatever the sizes
of the tensors before it. For shapes (3,) and (20,) the starts are 0 and 16, and the buffer has 48 elements. The gaps
are zero and stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import foreach_copy_, foreach_norm, is_fake

ALIGNMENT = 16
"""The start of every tensor in a flat buffer is a multiple of so many elements."""

CHUNK = 4096
"""So many elements of a tensor are summed into one row of `partials`, on every backend."""

_LARGE = 1 << 16
"""Elements from which a vector of zeros takes longer than to zero its gaps one by one."""

STATE_DTYPES = (torch.float32, torch.float64)
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def padded(numel: int) -> int:
    """`numel` rounded up to the alignment."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def offsets_of(numels: Sequence[int]) -> tuple[int, ...]:
    """The start of each tensor in the flat buffer, and at the end the size of the buffer."""
    return tuple(accumulate((padded(n) for n in numels), initial=0))


def partial_rows(numels: Sequence[int]) -> int:
    """Rows of the `partials` buffer: one for each chunk, full or not, of each tensor; at least one."""
    return max(1, sum(-(-n // CHUNK) for n in numels))


def state_dtype_of(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """float64 if any tensor is float64, else float32 (for 16-bit weights too)."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def norm_of(tensors: Sequence[Tensor], layout: Layout | None = None) -> Tensor:
    """The Euclidean norm of all `tensors` together, at least one, as a 0-dim float64 tensor.

    If a layout says that they are shards, it is the norm of the whole vector.
    """
    norms = foreach_norm(list(tensors))
    norm = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    return norm if layout is None or layout.whole is None else layout.total(norm.square()).sqrt()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A new vector with the elements of all tensors, one after another."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector that has the elements of tensors with the shapes of these, one after another."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` without their autograd graphs."""
    return [tensor.detach() for tensor in tensors]


class Whole(Protocol):
    """A vector that is sharded over processes."""

    @property
    def numel(self) -> int:
        """Elements of the whole vector."""

    @property
    def rank(self) -> int:
        """The rank of this process."""

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the whole vector from sums over this process's shard; every process must call it."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a list live in a flat buffer: shapes, strides, dtypes and one device.

    `whole` is None unless these tensors are one process's shards; it then stands for the whole vector, and inner
    products and norms are those of the whole vector.
    """

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    whole: Whole | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """The layout of `tensors`: dense ones keep their strides, others are laid out row-major.

        Lists alike share one, so that what follows from it is worked out once; sizes of tensors without values may be
        symbols, which cannot be looked up.
        """
        make = cls if tensors and is_fake(tensors[0]) else _shared_layout
        return make(
            tuple([t.shape for t in tensors]),
            tuple([t.stride() if t.is_contiguous() else torch.empty_like(t, device="meta").stride() for t in tensors]),
            tuple([t.dtype for t in tensors]),
            tensors[0].device if tensors else torch.device("cpu"),
        )

    @cached_property
    def numels(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Elements of the vector, over all processes."""
        return sum(self.numels) if self.whole is None else self.whole.numel

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the whole vector from sums over the tensors of this process."""
        return sums if self.whole is None else self.whole.total(sums)

    def generator(self, seed: int) -> torch.Generator:
        """A generator for random vectors, different in every process that holds a shard."""
        generator = torch.Generator(device=self.device)
        return generator.manual_seed(seed if self.whole is None else seed + (self.whole.rank << 32))

    def refuse_parts(self, what: str) -> None:
        """Raise if vectors are sharded, since `what` needs them whole."""
        if self.whole is not None:
            raise ValueError(
                f"weights: expected tensors that each process has whole, for {what}; got DTensors: use hvp.Neumann, "
                "hvp.Chebyshev, hvp.ConjugateGradient or hvp.MINRES, which work on shards, or whole weights"
            )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return offsets_of(self.numels)[:-1]

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Where in a flat buffer the elements between two tensors begin and end."""
        ends = (start + numel for start, numel in zip(self.offsets, self.numels, strict=True))
        starts = (*self.offsets[1:], self.size)
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

    @cached_property
    def size(self) -> int:
        """Elements of the flat buffer, including gaps."""
        return offsets_of(self.numels)[-1]

    @cached_property
    def state_dtype(self) -> torch.dtype:
        return state_dtype_of(self.dtypes)

    @cached_property
    def partial_rows(self) -> int:
        return partial_rows(self.numels)

    @cached_property
    def low_precision(self) -> bool:
        """Whether some tensor's dtype differs from the state's, so that tangents have to be cast."""
        return any(dtype != self.state_dtype for dtype in self.dtypes)

    @cached_property
    def slices(self) -> Tensor:
        """What each row of `partials` sums, int64 (rows, 4) on the layout's device: the tensor, where the slice begins
        in it and in a flat buffer, and its elements.

        For tensors of 5,000 and 3 elements: (0, 0, 0, 4096), (0, 4096, 4096, 904) and (1, 0, 5008, 3).
        """
        numels, offsets = torch.tensor([self.numels, self.offsets], dtype=torch.int64, device="cpu")
        chunks = (numels + CHUNK - 1) // CHUNK
        tensor = torch.repeat_interleave(chunks)
        before = chunks.cumsum(0) - chunks  # rows of the tensors before
        start = CHUNK * (torch.arange(len(tensor), device="cpu") - before[tensor])
        count = (numels[tensor] - start).clamp(max=CHUNK)
        return torch.stack([tensor, start, offsets[tensor] + start, count], 1).to(self.device)

    @cached_property
    def orders(self) -> tuple[tuple[int, ...], ...]:
        """For each tensor the permutation of its dimensions that makes it row-major in memory.

        For a channels_last weight of shape (2, 3, 4, 5), with strides (60, 1, 15, 3), it is (0, 2, 3, 1).
        """
        return tuple(
            tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], d)))
            for shape, stride in zip(self.shapes, self.strides, strict=True)
        )

    def rows(self, tensors: Sequence[Tensor], apart_from: Sequence[Tensor] = ()) -> list[Tensor]:
        """`tensors` as row-major tensors in this layout's storage order.

        Copies a tensor only if its strides differ, or if it shares storage with one of `apart_from`: for a loss like
        (w1 * w2).sum() autograd returns views of the tangent itself as the product, and an in-place update of the
        tangent would overwrite what it still has to read.
        """
        taken = {state.untyped_storage().data_ptr() for state in apart_from}
        rows = []
        for tensor, order in zip(tensors, self.orders, strict=True):
            row = (
                tensor.permute(order).contiguous().resolve_neg()
            )  # kernels read memory, where a lazily negated tensor is not negated
            rows.append(row.clone() if row.untyped_storage().data_ptr() in taken else row)
        return rows

    def places(self) -> Tensor:
        """Where the elements of the tensors, each in row-major order, are in a flat buffer; int64 (numel,)."""
        index = torch.arange(self.size, device=self.device)
        return torch.cat([index[:0], *(view.reshape(-1) for view in self.views(index))])

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of `buffer` with the shapes and strides of the layout."""
        return [
            buffer.as_strided(shape, stride, buffer.storage_offset() + offset)
            for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
        ]

    def empty_partials(self) -> Tensor:
        """A buffer for the partial sums of one step: rows of (squared norm, squared norm, non-finite flag)."""
        return torch.zeros(self.partial_rows, 3, dtype=torch.float64, device=self.device)


_shared_layout = lru_cache(64)(Layout)


class FlatVector:
    """One flat buffer and its views.

    `data` is 1-d, contiguous, in the layout's state dtype; `views` are its parts with the weights' shapes and
    strides. `tangents` are what autograd takes as `grad_outputs`: the views themselves, or copies in the
    weights' lower precision, which :meth:`refresh` brings up to date.
    """

    def __init__(self, layout: Layout, data: Tensor | None = None):
        if data is None:
            data = torch.zeros(layout.size, dtype=layout.state_dtype, device=layout.device)
        self.layout = layout
        self.data = data
        self.views = layout.views(data)
        self.tangents = self.views
        if layout.low_precision:
            self.tangents = [
                view if view.dtype == dtype else torch.empty_like(view, dtype=dtype)
                for view, dtype in zip(self.views, layout.dtypes, strict=True)
            ]
            self.refresh()

    @classmethod
    def unset(cls, layout: Layout) -> FlatVector:
        """A vector that has to be written before it is read: without the pass over memory that zeros take."""
        if layout.size < _LARGE:
            return cls(layout)
        data = torch.empty(layout.size, dtype=layout.state_dtype, device=layout.device)
        for start, end in layout.gaps:
            data[start:end].zero_()
        return cls(layout, data)

    @classmethod
    def of(cls, layout: Layout, tensors: Sequence[Tensor]) -> FlatVector:
        """A new flat vector holding a copy of `tensors`."""
        vector = cls(layout)
        vector.copy_(tensors)
        return vector

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite with `tensors` (any strides, any floating dtype)."""
        if self.views:
            foreach_copy_(self.views, [t.detach() for t in tensors])
        self.refresh()

    def dot(self, other: FlatVector) -> Tensor:
        """The inner product, in the state dtype."""
        return self.layout.total(torch.dot(self.data, other.data))

    def norm(self) -> Tensor:
        """The Euclidean norm, in the state dtype."""
        norm = torch.linalg.vector_norm(self.data)
        return norm if self.layout.whole is None else self.layout.total(norm.double().square()).sqrt().to(norm.dtype)

    def all_finite(self) -> Tensor:
        """Whether all elements are finite, as a 0-dim tensor."""
        finite = torch.isfinite(self.data).all()
        return finite if self.layout.whole is None else self.layout.total((~finite).double()) == 0

    def assign(self, other: FlatVector) -> None:
        """Overwrite with another vector of this layout."""
        self.data.copy_(other.data)
        self.refresh()

    def in_dtypes(self) -> list[Tensor]:
        """The parts in the weights' dtypes: the views themselves, or copies where the state is wider."""
        dtypes = self.layout.dtypes
        return [view if view.dtype == dtype else view.to(dtype) for view, dtype in zip(self.views, dtypes, strict=True)]

    def refresh(self) -> None:
        """Copy `data` into the low-precision tangents."""
        if self.layout.low_precision:
            foreach_copy_(self.tangents, self.views)
