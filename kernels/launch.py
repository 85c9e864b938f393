"""A kernel on a list of tensors: the tables that it reads, and its launch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hvp_engine._support.flat_vector import ALIGNMENT, CHUNK, Layout, offsets_of
from hvp_engine._support.pytree import check_like
from hvp_engine.kernels.rows import spread_total
from hvp_engine.ops import Op

WARPS = 8
"""For one row of 4096 elements: 16 for each thread, which are enough loads in flight and few enough registers."""

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_tables(layout: Layout, dtypes: Sequence[torch.dtype]) -> list[tuple[tl.dtype, Tensor]]:
    """For each dtype among the products the table of its rows, which :mod:`hvp_engine.kernels.rows` describes."""
    return _row_tables(layout.numels, tuple(dtypes), layout.device)


@lru_cache(16)  # 50 million weights have a table of 12,000 rows, half a MB that takes 30 ms to make
def _row_tables(
    numels: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[tuple[tl.dtype, Tensor]]:
    entries: dict[torch.dtype, list[tuple[int, ...]]] = {}
    row = 0
    for tensor, (numel, offset, dtype) in enumerate(zip(numels, offsets_of(numels), dtypes, strict=False)):
        for chunk, begin in enumerate(range(0, numel, CHUNK)):
            entry = (tensor, chunk, (offset + begin) // ALIGNMENT, min(CHUNK, numel - begin), row)
            entries.setdefault(dtype, []).append(entry)
            row += 1
    return [(TYPES[dtype], torch.tensor(rows, dtype=torch.int64, device=device)) for dtype, rows in entries.items()]


class MultiTensorLaunch:
    """One kernel bound to its state; calling it with the list of products launches it once for each dtype.

    If there is a measuring kernel, it is launched first, and the total of what it wrote is put where the other finds
    it. Both take (states..., row table, address table, arguments..., partials). The row tables depend on the layout
    and the dtypes of the products. The address table is uploaded again only when an address or the stream has changed.
    """

    def __init__(
        self,
        op: Op,
        kernel: Any,
        measure: Any | None,
        states: Sequence[Tensor],
        layout: Layout,
        arguments: Sequence[Tensor],
        partials: Tensor,
    ):
        self._op = op
        self._kernel = kernel
        self._measure = measure
        self._states = tuple(states)
        self._layout = layout
        self._arguments = tuple(arguments)
        self._partials = partials
        self._device = partials.device
        self._spans = [(s.data_ptr(), s.data_ptr() + s.nbytes) for s in (*states, partials) if s.numel()]
        self._dtypes = list(layout.dtypes)
        self._rows = row_tables(layout, layout.dtypes)
        self._uploaded: tuple[int, tuple[int, ...]] | None = None
        self._addresses = torch.empty(0, dtype=torch.int64, device=self._device)
        self._captured: list[tuple[Tensor, Tensor]] = []

    def __call__(self, products: Sequence[Tensor]) -> None:
        if not self._readable(products):
            products = self._conformed(products)
        if not self._rows:
            self._partials.zero_()
            return
        with device_of(self._partials):
            addresses = self._table_of(tuple(product.data_ptr() for product in products))
            if self._measure is not None:
                self._launch(self._measure, addresses)
                spread_total[(1,)](self._partials, len(self._partials), BLOCK=1024)
            self._launch(self._kernel, addresses)

    def _launch(self, kernel: Any, addresses: Tensor) -> None:
        for dtype, rows in self._rows:
            kernel[(len(rows),)](
                *self._states, rows, addresses, *self._arguments, self._partials,
                PRODUCT=dtype, CHUNK=CHUNK, num_warps=WARPS,
            )  # fmt: skip

    def _readable(self, products: Sequence[Tensor]) -> bool:
        """Whether the kernel can read the products in place: laid out as expected, and apart from what it writes."""
        layout = self._layout
        return len(products) == len(layout.shapes) and all(
            isinstance(product, Tensor)
            and product.dtype == dtype
            and product.shape == shape
            and product.stride() == stride
            and product.device == layout.device
            and not product.is_neg()
            and not any(
                start < product.data_ptr() + product.nbytes and product.data_ptr() < end for start, end in self._spans
            )
            for product, dtype, shape, stride in zip(products, self._dtypes, layout.shapes, layout.strides, strict=True)
        )

    def _conformed(self, products: Sequence[Tensor]) -> list[Tensor]:
        """The products as the kernel can read them, with row tables for their dtypes; raises if they do not fit."""
        check_like(products, self._layout, f"{self._op.name}: {self._op.product}", "weights", self._states[0].dtype)
        dtypes = [product.dtype for product in products]
        if dtypes != self._dtypes:
            self._dtypes, self._rows = dtypes, row_tables(self._layout, dtypes)
        return self._layout.rows(products, apart_from=(*self._states, self._partials))

    def _table_of(self, addresses: tuple[int, ...]) -> Tensor:
        """The addresses on the device. Fresh memory for every upload: an earlier kernel may still read the last."""
        if self._device.type != "cuda":
            return torch.tensor(addresses, dtype=torch.int64)
        if torch.cuda.is_current_stream_capturing():
            # A graph copies from the pinned memory at every replay, so it must live as long as this object.
            self._captured.append(self._upload(addresses))
            return self._captured[-1][1]
        key = torch.cuda.current_stream().cuda_stream, addresses
        if key != self._uploaded:
            _, self._addresses = self._upload(addresses)
            self._uploaded = key
        return self._addresses

    def _upload(self, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
        return host, host.to(self._device, non_blocking=True)
