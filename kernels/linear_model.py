"""All terms of a linear model's Neumann series in one launch: what both forms share, and their limits.

A row is one output of one right-hand side. A program takes a group of rows: all outputs of one right-hand side if the
loss couples them (softmax), else any 16 rows. Rows and samples are padded to powers of two, at least 16.

* Dual form (linear_dual.py): `linear_model_dual_terms` keeps the Gram matrix of the inputs in shared memory, and S of
  the term and of the sum, the first outputs and the loss's curvature in registers, from the first term to the last.
  Only two steps touch vectors as long as the features: torch's product with the inputs before, and
  `linear_model_expand` after, whose programs share the features among them.
* Direct form (linear_direct.py): `linear_model_direct_terms` keeps the outputs and the curvature in registers and
  sweeps over the features once for each term: a tile of the inputs is used for the product that ends one term and for
  the one that begins the next. v, p and the inputs stay in the caches (784 x 10 weights and 50 samples are 0.2 MB).

The inputs may have any dtype no wider than the state's. Sums are in the state's dtype, never in TensorFloat-32; norms
in float64.

Beyond these limits, with the padded rows and samples of one program, plain torch runs instead, and
:func:`linear_model_limit` says why:

* dual: rows * samples^2 <= 2^18 (16 rows and 128 samples, 64 and 64, 128 and 32);
* direct: rows * samples <= 2048 in float32, 1024 in float64; at most 64 tiles of features, of 32 features where
  rows * samples <= 1024 in float32, else of 16.

Within them hardly any register is spilled: ptxas reports at most 8 bytes of local memory for each thread at 10 outputs
and 50 samples, and at the limits 72 in float32 and 320 in float64. Shared memory takes at most 72 KiB (float32) or 144
KiB (float64), with 128 samples, so the dual form is also limited to what the GPU offers. The limit of tiles is an
estimate: one after another takes about a microsecond, and a term in plain torch costs the host about 64 of these.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.linear_model.reference import Factors

LEAST = 16
"""The smallest side of a tile that Triton multiplies."""

DUAL_PRODUCTS = 1 << 18
DIRECT_BYTES = 8192
DIRECT_TILES = 64


@triton.jit
def group_rows(group, rows, outputs, ROWS: tl.constexpr):
    """This program's rows, their outputs, and which of the rows exist."""
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0).to(tl.int64) * group + lane
    return row, row % outputs, (lane < group) & (row < rows)


@triton.jit
def curve(u, curvature, probabilities):
    """The Hessian of the loss in the outputs, times u."""
    if probabilities is not None:
        u -= tl.sum(probabilities * u, 0)[None, :]
    return curvature * u


@triton.jit
def measure(x):
    """The squared norm of each row in float64, and whether it holds a NaN or an infinity."""
    finite = tl.abs(x) < float("inf")
    wide = x.to(tl.float64)
    return tl.sum(wide * wide, 1), tl.max(1 - finite.to(tl.int32), 1)


@triton.jit
def add_each(x, squared, bad):
    """Add to the figures of :func:`measure` those of one more element in each row."""
    wide = x.to(tl.float64)
    return squared + wide * wide, tl.maximum(bad, 1 - (tl.abs(x) < float("inf")).to(tl.int32))


@triton.jit
def open_bias(v, decay, damped, row, output, outputs, size, bias, inside):
    """The bias of each row of the right-hand side, and its decay plus damping."""
    start = tl.load(v + row // outputs * size + bias + output, mask=inside, other=0.0)
    return start, tl.load(decay + bias + output, mask=inside, other=0.0) + damped


@triton.jit
def step_bias(curved, shift, start, term, total, step, HORNER: tl.constexpr):
    """The bias of the next term, and of the sum that includes it; a product with the bias is a sum over samples."""
    source = total if HORNER else term
    product = tl.sum(curved, 1) + shift * source
    term = (start if HORNER else term) - step * product
    return term, total + term


@triton.jit
def close_bias(v, p, place, mask, term, total, step, squared_term, squared_sum, bad, HORNER: tl.constexpr):
    """Write the bias, as the weights are written, and add it to the last three figures."""
    tl.store(p + place, step * total, mask=mask)
    if not HORNER:
        tl.store(v + place, term, mask=mask)
    squared_term, bad = add_each(term, squared_term, bad)
    squared_sum, bad = add_each(total, squared_sum, bad)
    return squared_term, squared_sum, bad


@triton.jit
def record(figures, row, inside, squared_start, bad_start, squared_residual, squared_sum, bad):
    """Write the figures of each row."""
    cell = figures + 6 * row
    tl.store(cell, squared_start, mask=inside)
    tl.store(cell + 1, squared_start * 0, mask=inside)
    tl.store(cell + 2, bad_start.to(tl.float64), mask=inside)
    tl.store(cell + 3, squared_residual, mask=inside)
    tl.store(cell + 4, squared_sum, mask=inside)
    tl.store(cell + 5, bad.to(tl.float64), mask=inside)


@dataclass(frozen=True)
class Tiling:
    """How programs share the work of one model.

    Attributes:
        group: rows of one program.
        rows: `group`, padded.
        samples: the number of samples, padded.
        features: features of one tile in the direct form.
        wide: whether the state is float64.
    """

    group: int
    rows: int
    samples: int
    features: int
    wide: bool

    @classmethod
    def of(cls, factors: Factors) -> Tiling:
        group = LEAST if factors.probabilities is None else factors.outputs
        rows, samples = (max(LEAST, triton.next_power_of_2(n)) for n in (group, len(factors.inputs)))
        wide = factors.curvature.dtype == torch.float64
        return cls(group, rows, samples, 16 if wide or rows * samples > 1024 else 32, wide)

    def programs(self, rows: int) -> int:
        return triton.cdiv(rows, self.group)

    @property
    def dual_warps(self) -> int:
        return 16 if not self.wide and self.rows * self.samples**2 == DUAL_PRODUCTS else 8

    @property
    def direct_warps(self) -> int:
        return 16 if not self.wide and self.rows > LEAST else 8

    @property
    def dual_shared_bytes(self) -> int:
        """The Gram matrix and S."""
        return (8 if self.wide else 4) * self.samples * (self.samples + self.rows)


def linear_model_limit(factors: Factors, dual: bool) -> str | None:
    """Why the terms of this model do not fit one launch, or None if they do."""
    tiling = Tiling.of(factors)
    rows, samples = tiling.rows, tiling.samples
    what = f"{tiling.group} outputs together and {len(factors.inputs)} samples in {factors.curvature.dtype}"
    if dual:
        if rows * samples**2 > DUAL_PRODUCTS:
            return f"the Gram matrix and {what} do not fit on chip"
        device = factors.inputs.device
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
            if tiling.dual_shared_bytes > most:
                return f"the Gram matrix takes {tiling.dual_shared_bytes} bytes of shared memory; this GPU has {most}"
        return None
    if rows * samples * (8 if tiling.wide else 4) > DIRECT_BYTES:
        return f"{what} do not fit on chip"
    features = factors.inputs.shape[1]
    if features > DIRECT_TILES * tiling.features:
        return f"{features} features are more than {DIRECT_TILES * tiling.features}, too many for one multiprocessor"
    return None


def numbers(v: Tensor, alpha: float, damping: float) -> tuple[Tensor, Tensor]:
    """alpha and damping in device memory, since Triton passes a Python float in 32 bits."""
    alpha_tensor, damping_tensor = (torch.full((), x, dtype=torch.float64, device=v.device) for x in (alpha, damping))
    return alpha_tensor, damping_tensor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
