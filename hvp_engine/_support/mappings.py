"""Functions applied to the tensors of a batch, in mappings of classes that torch's pytree does not know as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hvp_engine._support.torch_compat import pytree


def map_leaves(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with `function` applied to every tensor in it; other leaves are kept.

    A mapping that pytree does not know becomes a copy with its new values, or a dict where a copy cannot be changed; it
    stays itself if `function` returned every tensor in it as it was.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return _with_values(leaf, function) if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(mapped, tree)


def _with_values(mapping: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Mapping[Any, Any]:
    changed: dict[Any, Any] = {}
    for key, value in mapping.items():
        new = map_leaves(function, value)
        before, after = (pytree.tree_leaves(tree) for tree in (value, new))
        if any(x is not y for x, y in zip(before, after, strict=True)):
            changed[key] = new
    if not changed:
        return mapping
    try:
        result: Any = copy.copy(mapping)
        for key, value in changed.items():
            result[key] = value
    except TypeError:  # one that cannot be changed, as types.MappingProxyType
        return {**mapping, **changed}
    return result
