"""Random trees of tensors of every shape, memory layout, dtype and container, and the flaws they can have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fused_op_oracles import BF16, F16, F32, F64
from hypothesis import strategies as st
from problems_with_known_answers import DTYPE, flat, generator
from torch import Tensor
from torch.utils import _pytree as pytree

SHAPES = [(), (), (1,), (3,), (0,), (2, 2), (2, 0, 3), (2, 1, 2), (1, 2, 2, 1)]
DTYPES = [[F64], [F64], [F32], [F32, F64], [BF16], [F16], [BF16, F32], [F16, F32], [F16, BF16, F64]]
TOLERANCES = {F64: 1e-6, F32: 2e-3, F16: 2e-2, BF16: 1e-1}
"""Of the relative difference from the closed form, by the least precise dtype that takes part."""


class Pair(NamedTuple):
    first: Any
    second: Any


# Containers


def _by_name(leaves: list[Any]) -> dict[str, Any]:
    return {f"leaf {index}": leaf for index, leaf in enumerate(leaves)}


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": _by_name,
    "ordered dict": lambda leaves: OrderedDict(_by_name(leaves)),
    "nested": lambda leaves: {"b": (leaves[0], []), "a": [list(leaves[1:]), {}]},
    "named tuple": lambda leaves: Pair(leaves[0], {"rest": tuple(leaves[1:])}),
    "bare": lambda leaves: leaves[0] if len(leaves) == 1 else leaves,
}
FLAT = ["list", "tuple", "bare"]
"""What the functions on recorded losses take."""


# Memory


def _offset(values: Tensor) -> Tensor:
    return torch.cat([values.new_full((3,), 7.0), values.reshape(-1)])[3:].view(values.shape)


def _permuted(values: Tensor) -> Tensor:
    order = list(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def _every_second(values: Tensor) -> Tensor:
    return torch.stack([values, values.new_full(values.shape, 7.0)], -1)[..., 0]


def _channels_last(values: Tensor) -> Tensor:
    return values.to(memory_format=torch.channels_last) if values.dim() == 4 else values


def _negated(values: Tensor) -> Tensor:
    """With its negative bit set, as the imaginary part of a conjugated tensor has it."""
    if values.dtype not in (F32, F64):
        return values
    return torch.complex(values, -values).conj().imag


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda values: values,
    "offset": _offset,
    "permuted": _permuted,
    "every second": _every_second,
    "expanded": lambda values: values.reshape(-1)[:1].squeeze().expand(values.shape) if values.numel() else values,
    "channels last": _channels_last,
    "negated": _negated,
}


ANYWHERE = ["a whole number", "complex", "nan", "infinite", "no tensor", "sparse", "no leaves"]
UNLIKE = [*ANYWHERE, "a leaf fewer", "a leaf more", "another shape", "wider"]
"""Of what has to be like other tensors."""
SILENT = ("nan", "infinite")
"""Flaws of values: there is a closed form all the same, though perhaps not a finite one."""


# Trees


def numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal, in float64; for a shape without dimensions as well."""
    return torch.randn(tuple(shape), generator=generator(seed), dtype=DTYPE)


@dataclass(frozen=True)
class Sample:
    """Leaves in a container; `numbers` are their values, one after another in float64."""

    leaves: list[Tensor]
    container: str

    @property
    def tree(self) -> Any:
        return CONTAINERS[self.container](self.leaves)

    @property
    def numbers(self) -> Tensor:
        # In the order in which pytree takes the container apart, as the losses do.
        return flat([leaf for leaf in pytree.tree_leaves(self.tree) if isinstance(leaf, Tensor)])

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {leaf.dtype for leaf in self.leaves}


def flawed(sample: Sample, index: int, flaw: str) -> Sample | None:
    """`sample` with this flaw in the leaf `index`; None if the leaf cannot have it, as an empty one has no NaN."""
    leaves = sample.leaves
    leaf, before, rest = leaves[index], leaves[:index], leaves[index + 1 :]
    if flaw in SILENT and leaf.numel() == 0 or flaw == "wider" and leaf.dtype == F64:
        return None
    if flaw == "no leaves":
        return Sample([], "list")
    if flaw == "a leaf fewer":
        return Sample(before + rest, sample.container if before + rest and sample.container != "bare" else "list")
    if flaw == "a leaf more":
        return Sample([*leaves, leaf], sample.container)
    changed: Any = {
        "a whole number": lambda: leaf.long(),
        "complex": lambda: torch.complex(leaf.double(), leaf.double()),
        "nan": lambda: _with(leaf, float("nan")),
        "infinite": lambda: _with(leaf, float("-inf")),
        "no tensor": lambda: "weight" if leaf.dim() else 1.0,
        "sparse": lambda: leaf.detach().contiguous().to_sparse(),
        "another shape": lambda: leaf.new_ones(*leaf.shape, 2),
        "wider": lambda: leaf.double(),
    }[flaw]()
    return Sample([*before, changed, *rest], sample.container)


def _with(leaf: Tensor, value: float) -> Tensor:
    changed = leaf.detach().clone(memory_format=torch.contiguous_format)
    changed.view(-1)[-1] = value
    return changed


def joined(tree: Any) -> Tensor:
    """The leaves of `tree`, one after another, in float64 if one of them is, else in float32."""
    leaves = pytree.tree_leaves(tree)
    wide = F64 if any(leaf.dtype == F64 for leaf in leaves) else F32
    return torch.cat([leaf.reshape(-1).to(wide) for leaf in leaves])


def split(vector: Tensor, tree: Any) -> Any:
    """The inverse of :func:`joined`, with the dtypes of `tree`."""
    leaves, spec = pytree.tree_flatten(tree)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([p.reshape(x.shape).to(x.dtype) for p, x in zip(parts, leaves, strict=True)], spec)


@st.composite
def samples(draw: st.DrawFn, containers: Sequence[str] = tuple(CONTAINERS), most: int = 3) -> Sample:
    """Standard normal numbers, halved."""
    allowed = draw(st.sampled_from(DTYPES))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=most))
    leaves = []
    for shape in shapes:
        values = numbers(shape, draw(st.integers(0, 10**6))) / 2
        memory = MEMORY[draw(st.sampled_from(list(MEMORY)))]
        leaves.append(memory(values.to(draw(st.sampled_from(allowed)))))
    return Sample(leaves, draw(st.sampled_from(list(containers))))


@st.composite
def like(draw: st.DrawFn, sample: Sample) -> Sample:
    """Other numbers in other memory and dtypes, none wider than the state, in the same shapes and container."""
    wide = F64 in sample.dtypes
    leaves = []
    for leaf in sample.leaves:
        values = numbers(leaf.shape, draw(st.integers(0, 10**6)))
        memory = MEMORY[draw(st.sampled_from(list(MEMORY)))]
        dtype = draw(st.sampled_from([leaf.dtype, leaf.dtype, F64 if wide else F32, F32]))
        leaves.append(memory(values.to(dtype)))
    return Sample(leaves, sample.container)
