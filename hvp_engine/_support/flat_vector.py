"""A tree of tensors as one flat buffer with views.

Solvers work on one flat vector; autograd wants one tensor for each weight. A :class:`Layout` says where each
tensor lives in the flat buffer, and a :class:`FlatVector` is a buffer together with views that have the
weights' own shapes and strides, so that nothing is ever concatenated or split.

Every tensor starts at a multiple of :data:`ALIGNMENT` elements, so that vector loads are aligned whatever the
sizes before it. The gaps are zero and stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import foreach_copy_, foreach_norm

ALIGNMENT = 16
"""Elements to which the start of every tensor in a flat buffer is rounded up."""

CHUNK = 4096
"""Elements of one tensor whose partial sums form one row of `partials`, on every backend."""

STATE_DTYPES = (torch.float32, torch.float64)
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def padded(numel: int) -> int:
    """`numel` rounded up to the alignment."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def offsets_of(numels: Sequence[int]) -> tuple[int, ...]:
    """Start of each tensor in the flat buffer, and the size of the whole at the end."""
    return tuple(accumulate((padded(n) for n in numels), initial=0))


def partial_rows(numels: Sequence[int]) -> int:
    """Rows of the `partials` buffer: one for each started chunk of each tensor, at least one."""
    return max(1, sum(-(-n // CHUNK) for n in numels))


def state_dtype_of(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """float64 if any tensor is float64, else float32 (16-bit weights keep a float32 state)."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def norm_of(tensors: Sequence[Tensor], layout: Layout | None = None) -> Tensor:
    """The Euclidean norm of all `tensors` together, a 0-dim float64 tensor; there must be at least one.

    With a layout, it is that of the whole vector of which they may be a part.
    """
    norms = foreach_norm(list(tensors))
    norm = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    return norm if layout is None or layout.whole is None else layout.total(norm.square()).sqrt()


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` without their graphs."""
    return [tensor.detach() for tensor in tensors]


class Whole(Protocol):
    """What a vector is in all processes together, of which each holds a part."""

    @property
    def numel(self) -> int: ...

    @property
    def rank(self) -> int:
        """The number of this process."""

    def total(self, sums: Tensor) -> Tensor:
        """The sums over the vector, from those over each part."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a list live in a flat buffer: shapes, strides, dtypes and one device.

    `whole` is None, or says of what vector, spread over processes, these are a part; inner products and norms are
    those of the whole vector.
    """

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    whole: Whole | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """The layout of `tensors`: dense ones keep their strides, others are laid out row-major."""
        return cls(
            tuple(t.shape for t in tensors),
            tuple(t.stride() if t.is_contiguous() else torch.empty_like(t, device="meta").stride() for t in tensors),
            tuple(t.dtype for t in tensors),
            tensors[0].device if tensors else torch.device("cpu"),
        )

    @cached_property
    def numels(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Elements of the vector, in all processes together."""
        return sum(self.numels) if self.whole is None else self.whole.numel

    def total(self, sums: Tensor) -> Tensor:
        """From sums over the tensors here, those over the whole vector."""
        return sums if self.whole is None else self.whole.total(sums)

    def generator(self, seed: int) -> torch.Generator:
        """A generator of random vectors; no two parts of a vector draw alike."""
        generator = torch.Generator(device=self.device)
        return generator.manual_seed(seed if self.whole is None else seed + (self.whole.rank << 32))

    def refuse_parts(self, what: str) -> None:
        """Raise where vectors are spread over processes, for `what` needs them whole."""
        if self.whole is not None:
            raise ValueError(
                f"weights: expected tensors that each process has whole, for {what}; got DTensors: use hvp.Neumann, "
                "hvp.Chebyshev, hvp.ConjugateGradient or hvp.MINRES, which work on shards, or whole weights"
            )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return offsets_of(self.numels)[:-1]

    @cached_property
    def size(self) -> int:
        """Elements of the flat buffer, gaps included."""
        return offsets_of(self.numels)[-1]

    @cached_property
    def state_dtype(self) -> torch.dtype:
        return state_dtype_of(self.dtypes)

    @cached_property
    def partial_rows(self) -> int:
        return partial_rows(self.numels)

    @cached_property
    def low_precision(self) -> bool:
        """Whether some tensor's dtype differs from the state's, so that tangents must be cast."""
        return any(dtype != self.state_dtype for dtype in self.dtypes)

    @cached_property
    def orders(self) -> tuple[tuple[int, ...], ...]:
        """Permutation of each tensor's dimensions that makes its storage order row-major."""
        return tuple(
            tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], d)))
            for shape, stride in zip(self.shapes, self.strides, strict=True)
        )

    def rows(self, tensors: Sequence[Tensor], apart_from: Sequence[Tensor] = ()) -> list[Tensor]:
        """`tensors` as row-major tensors in this layout's storage order.

        Copies a tensor only where its strides differ, or where it shares storage with one of `apart_from`: for
        a loss like (w1 * w2).sum() autograd returns views of the tangent itself as the product, and an
        in-place update of the tangent would overwrite what it still has to read.
        """
        taken = {state.untyped_storage().data_ptr() for state in apart_from}
        rows = []
        for tensor, order in zip(tensors, self.orders, strict=True):
            row = tensor.permute(order).contiguous().resolve_neg()  # a lazily negated one would be read unnegated
            rows.append(row.clone() if row.untyped_storage().data_ptr() in taken else row)
        return rows

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of `buffer` with the shapes and strides of the layout."""
        return [
            buffer.as_strided(shape, stride, buffer.storage_offset() + offset)
            for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
        ]

    def empty_partials(self) -> Tensor:
        """Room for the partial sums of one step: rows of (squared norm, squared norm, non-finite flag)."""
        return torch.zeros(self.partial_rows, 3, dtype=torch.float64, device=self.device)


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
        """Whether nothing is NaN or infinite."""
        finite = torch.isfinite(self.data).all()
        return finite if self.layout.whole is None else self.layout.total((~finite).double()) == 0

    def assign(self, other: FlatVector) -> None:
        """Overwrite with another vector of this layout."""
        self.data.copy_(other.data)
        self.refresh()

    def refresh(self) -> None:
        """Bring low-precision tangents up to date with `data`."""
        if self.layout.low_precision:
            foreach_copy_(self.tangents, self.views)
