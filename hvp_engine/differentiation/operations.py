"""What recorders of operations have to know about operators."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hvp_engine._support.torch_compat import schema_of

aten = torch.ops.aten

FILLS: dict[Any, int | None] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default)),
    **dict.fromkeys((aten.new_empty.default, aten.new_empty_strided.default, aten.empty_permuted.default)),
}

WITH_MEMORY = {aten._efficientzerotensor.default: aten.zeros.default}
"""What is done instead, with the same arguments: zeros without memory crash some operations under a dispatch mode."""

METADATA = {
    *(aten.is_same_size.default, aten.is_set_to.default),
    *(aten.sym_size.default, aten.sym_stride.default, aten.sym_numel.default),
}
"""Operations that give no tensors and read no values."""

SIZED_BY_KNOWN_VALUES = {aten.index.Tensor, aten.masked_select.default}
"""Operators whose second argument decides the size of the result: a mask, or a list with masks in it. In products those
are known; the size is written down with them."""

TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
"""Views of known tensors that are written down where they are used, since rewrites look for them."""


@dataclass(frozen=True)
class Kind:
    """What a recorder has to know of an operator.

    Attributes:
        written: the arguments that it writes to, each by its place and by its name.
        sized: whether known values decide the shape of the result, which is written down with them.
        refused: why a product with this operator in it cannot be written down.
    """

    mutates: bool
    written: frozenset[int | str]
    sized: bool
    refused: str


@cache
def kind_of_operation(operation: Any) -> Kind:
    schema = schema_of(operation)
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    sized = operation in SIZED_BY_KNOWN_VALUES
    refused = ""
    if schema.is_mutable and written != [True] + [False] * (len(written) - 1):
        refused = f"{operation} writes to several arguments"
    if torch.Tag.nondeterministic_seeded in operation.tags:
        refused = f"{operation} draws random numbers"
    if not sized and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags):
        refused = f"{operation} looks at values"
    places = {place for place, there in enumerate(written) if there}
    return Kind(
        schema.is_mutable, frozenset(places | {schema.arguments[place].name for place in places}), sized, refused
    )


@cache
def may_be_view(operation: Any) -> bool:
    """Whether the result may share memory with the first argument."""
    if operation is operator.getitem:
        return True
    schema = schema_of(operation)
    if schema is None:  # unknown: be careful
        return True
    return any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
