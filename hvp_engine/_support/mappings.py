"""Mappings of classes that torch's pytree does not know, such as the `BatchEncoding` of a tokenizer, in a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hvp_engine._support.pytree import Structure, taken_apart
from hvp_engine._support.torch_compat import pytree


class Opened:
    """A mapping whose values pytree may see. Put together again, it is of the mapping's own class, made from a dict."""

    def __init__(self, mapping: Mapping[Any, Any]):
        self.kind = type(mapping)
        self.items = {key: opened(value) for key, value in mapping.items()}


def opened(tree: Any) -> Any:
    """`tree` with every mapping that pytree takes for a leaf as one that it takes apart."""
    return pytree.tree_map(lambda leaf: Opened(leaf) if isinstance(leaf, Mapping) else leaf, tree)


def flatten_batch(batch: Any) -> tuple[list[Any], Structure]:
    """The leaves of a batch, those in mappings of any class among them, and its structure.

    Errors: `TypeError` when the batch is put together again, for a class that cannot be made from a dict. Anything else
    that an object holds, such as a tokenizer's encodings, is not in the new one.
    """
    leaves, structure = taken_apart(batch)
    if structure.shape is None and any(not isinstance(x, Tensor) and isinstance(x, Mapping) for x in leaves):
        leaves, structure = taken_apart(opened(batch))
    return leaves, structure


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


def _apart(node: Opened) -> tuple[list[Any], tuple[type, tuple[Any, ...]]]:
    return list(node.items.values()), (node.kind, tuple(node.items))


def _together(values: Any, context: tuple[type, tuple[Any, ...]]) -> Any:
    kind, keys = context
    items = dict(zip(keys, values, strict=True))
    try:
        made = kind(items)
        same = len(made) == len(items) and all(made[key] is value for key, value in items.items())
    except Exception as error:
        made, same = error, False
    if not same:
        raise TypeError(
            f"batch: expected mappings of classes that can be made from a dict and keep its values; got a "
            f"{kind.__name__} ({made if isinstance(made, Exception) else 'its values differ'}): pass dict(batch)"
        )
    return made


pytree.register_pytree_node(Opened, _apart, _together)
