"""Trees of tensors: the caller's containers taken apart and checked, and results put back into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import shown
from hvp_engine._support.dtensor import Shard, is_sharded, local_part
from hvp_engine._support.flat_vector import INPUT_DTYPES, Layout
from hvp_engine._support.torch_compat import pytree
from hvp_engine.errors import GraphError

Tree = Any
"""A tensor, or any nesting of tuples, lists, dicts and dataclasses that torch's pytree knows."""


@dataclass(frozen=True)
class Structure:
    """How to rebuild a tree from the list of its leaves, in which DTensors are represented by this process's shards."""

    spec: pytree.TreeSpec
    shards: tuple[Shard | None, ...] | None = None
    shape: Shape | None = field(default=None, compare=False, repr=False)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.shards))  # torch's goes through the tree at every call

    def rebuild(self, leaves: Sequence[Any]) -> Tree:
        """The tree of these leaves, with shards as DTensors again."""
        if self.shape is not None:
            return _together(self.shape, iter(leaves))
        if self.shards is not None:
            leaves = [
                leaf if shard is None else shard.wrap(leaf) for leaf, shard in zip(leaves, self.shards, strict=True)
            ]
        return pytree.tree_unflatten(list(leaves), self.spec)

    def of_autograd(self, tree: Tree, inputs: Sequence[Tensor] = ()) -> Tree:
        """What `torch.autograd.grad` returned, put into this container; any other tree as it is.

        Its tuple becomes a list or a single tensor, and None (of `allow_unused=True`) zeros like the one of `inputs`.
        """
        kind = self.spec.type  # None: a single tensor
        alone = kind is None and type(tree) is tuple and len(tree) == 1
        if not alone and (type(tree) not in (tuple, list) or kind not in (tuple, list)):
            return tree
        if len(tree) == len(inputs):
            tree = [torch.zeros_like(x) if part is None else part for part, x in zip(tree, inputs, strict=True)]
        return tree[0] if kind is None else kind(tree)

    @property
    def whole(self) -> Structure:
        """The same tree of whole tensors."""
        return self if self.shards is None else Structure(self.spec)


Shape = tuple[Any, ...]
"""How an ordinary tree is made: (), a leaf; (kind, keys, shapes) of a dict, a list or a tuple; only dicts have keys."""

_LEAVES = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_MOST_SHAPES = 1024
_structures: dict[Shape, Structure] = {}


def taken_apart(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree, and its structure.

    Torch's own functions take 10 us for a dict of two tensors. Dicts, lists and tuples of tensors and plain values are
    taken apart here, and those alike have one structure, whose hash is known.
    """
    leaves: list[Any] = []
    shape = _shape_of(tree, leaves)
    if shape is None:
        leaves, spec = pytree.tree_flatten(tree)
        return leaves, Structure(spec)
    structure = _structures.get(shape)
    if structure is None:
        if len(_structures) >= _MOST_SHAPES:
            _structures.clear()
        structure = _structures[shape] = Structure(pytree.tree_flatten(tree)[1], None, shape)
    return leaves, structure


def _shape_of(tree: Tree, leaves: list[Any]) -> Shape | None:
    """The shape of an ordinary tree, whose leaves are appended; None for any other."""
    kind = type(tree)
    if kind in _LEAVES:
        leaves.append(tree)
        return ()
    if kind is not dict and kind is not list and kind is not tuple:
        return None
    shapes: list[Shape] = []
    for part in tree.values() if kind is dict else tree:
        if type(part) in _LEAVES:  # as in the call below, which takes longer
            leaves.append(part)
            shapes.append(())
            continue
        shape = _shape_of(part, leaves)
        if shape is None:
            return None
        shapes.append(shape)
    return kind, tuple(tree) if kind is dict else (), tuple(shapes)


def _together(shape: Shape, leaves: Iterator[Any]) -> Tree:
    if not shape:
        return next(leaves)
    kind, keys, shapes = shape
    parts = [_together(part, leaves) if part else next(leaves) for part in shapes]
    return dict(zip(keys, parts, strict=True)) if kind is dict else kind(parts)


class Opened:
    """A mapping of a class that torch's pytree does not know, such as the `BatchEncoding` of a tokenizer, whose values
    pytree may see. Put together again, it is of the mapping's own class, made from a dict."""

    def __init__(self, mapping: Mapping[Any, Any]):
        self.kind = type(mapping)
        self.items = {key: opened(value) for key, value in mapping.items()}


def opened(tree: Any) -> Any:
    """`tree` with every mapping that pytree takes for a leaf as one that it takes apart."""
    return pytree.tree_map(lambda leaf: Opened(leaf) if isinstance(leaf, Mapping) else leaf, tree)


def _apart(node: Opened) -> tuple[list[Any], tuple[type, tuple[Any, ...]]]:
    return list(node.items.values()), (node.kind, tuple(node.items))


def _mapping_of(values: Any, context: tuple[type, tuple[Any, ...]]) -> Any:
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


pytree.register_pytree_node(Opened, _apart, _mapping_of)


def flatten_batch(batch: Any) -> tuple[list[Any], Structure]:
    """The leaves of a batch, those in mappings of any class among them, and its structure.

    Errors: `TypeError` when the batch is put together again, for a class that cannot be made from a dict. Anything else
    that an object holds, such as a tokenizer's encodings, is not in the new one.
    """
    leaves, structure = taken_apart(batch)
    if structure.shape is None and any(not isinstance(x, Tensor) and isinstance(x, Mapping) for x in leaves):
        leaves, structure = taken_apart(opened(batch))
    return leaves, structure


def flatten(tree: Tree, name: str, sharded: bool = False) -> tuple[list[Tensor], Structure]:
    """The leaves of `tree`, each checked to be a real floating tensor, all on one device.

    DTensors are refused unless `sharded`; the list then has this process's shards.

    Errors: `TypeError` for a leaf that is no tensor or of an unsupported dtype, `ValueError` for an empty tree or
    several devices, :class:`GraphError` in inference mode; `name` is the argument that the message names.
    """
    refuse_inference_mode(name)
    tree = trainable(tree)
    leaves, structure = taken_apart(tree)
    shards = None
    if not PLAIN.issuperset(map(type, leaves)) and any(map(is_sharded, leaves)):
        if not sharded:
            raise TypeError(
                f"{name}: expected tensors that are whole in this process; got DTensors, which are supported as "
                "weights and hyperparameters of hvp.Hypergradient and hvp.HessianOperator with hvp.DataParallel losses"
            )
        shards = tuple(Shard.of(leaf, name) if is_sharded(leaf) else None for leaf in leaves)
        leaves = [local_part(leaf.detach()) if is_sharded(leaf) else leaf for leaf in leaves]
    if not all(map(_is_usable, leaves)):
        raise _unusable_leaf(tree, name)
    if not leaves:
        raise ValueError(f"{name}: expected at least one tensor; got an empty {type(tree).__name__}")
    devices = {leaf.device for leaf in leaves}
    if len(devices) > 1:
        raise ValueError(
            f"{name}: expected all tensors on one device; got {', '.join(sorted(map(str, devices)))}: "
            "move them together"
        )
    return leaves, structure if shards is None else Structure(structure.spec, shards)


PLAIN = {Tensor, torch.nn.Parameter}
"""Types of which no leaf is a DTensor."""


def trainable(tree: Tree) -> Tree:
    """A module's parameters that require grad, by name; any other tree as it is."""
    if not isinstance(tree, torch.nn.Module):
        return tree
    return {name: parameter for name, parameter in tree.named_parameters() if parameter.requires_grad}


def refuse_inference_mode(name: str) -> None:
    """Raise in inference mode, where autograd records nothing whatever the grad mode."""
    if torch.is_inference_mode_enabled():
        raise GraphError(
            f"{name}: expected a call outside torch.inference_mode, where nothing can be differentiated; got one "
            "inside: make it under torch.inference_mode(False)"
        )


def _is_usable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in INPUT_DTYPES and leaf.layout is torch.strided


def is_plain(part: Any) -> bool:
    return type(part) in PLAIN and _is_usable(part)


def _unusable_leaf(tree: Tree, name: str) -> TypeError:
    """The error for the first leaf that cannot be used, which says where in the tree it is."""
    path, leaf = next(item for item in pytree.tree_leaves_with_path(tree) if not _is_usable(item[1]))
    where = f"{name}{pytree.keystr(path)}"
    if not isinstance(leaf, Tensor):
        remedy = f": pass torch.tensor({leaf})" if isinstance(leaf, (int, float)) else ""
        return TypeError(f"{where}: expected a tensor; got {shown(leaf)}{remedy}")
    if leaf.dtype not in INPUT_DTYPES:
        return TypeError(
            f"{where}: expected a real floating dtype (float32, float64, bfloat16 or float16); got {leaf.dtype}"
            + (": view it as real with torch.view_as_real" if leaf.is_complex() else "")
        )
    return TypeError(f"{where}: expected a dense tensor; got layout {leaf.layout}: use .to_dense()")


def check_like(tensors: Any, layout: Layout, name: str, like: str, widest: torch.dtype | None = None) -> None:
    """Raise unless `tensors` is a list of tensors with the number, shapes and device of `layout`, none of them wider
    than `widest`.

    Arguments:
        name, like: the argument that the message names, and the one that it must resemble.
        widest: the layout's state dtype if None.

    Errors: `TypeError` for a container or leaf of another type, or a dtype; `ValueError` for anything else.
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple of tensors as {like}; got {type(tensors).__name__}")
    if len(tensors) != len(layout.shapes):
        raise ValueError(f"{name}: expected {len(layout.shapes)} tensors, one for each of {like}; got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        check_leaf_like(tensor, index, layout, name, like, widest)


def check_leaf_like(
    tensor: Any, index: int, layout: Layout, name: str, like: str, widest: torch.dtype | None = None
) -> None:
    """:func:`check_like` for one tensor of the list."""
    shape, widest = layout.shapes[index], widest or layout.state_dtype
    usable = isinstance(tensor, Tensor) and tensor.dtype in INPUT_DTYPES and tensor.dtype.itemsize <= widest.itemsize
    if usable and tensor.shape == shape and tensor.device == layout.device:
        return
    where = f"{name}[{index}]"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor; got {type(tensor).__name__}")
    if not usable:
        raise TypeError(
            f"{where}: expected a floating dtype no wider than {widest}; got {tensor.dtype}: cast it with .to({widest})"
        )
    if tensor.shape != shape:
        raise ValueError(f"{where}: expected shape {tuple(shape)} as {like}[{index}]; got {tuple(tensor.shape)}")
    raise ValueError(
        f"{where}: expected device {layout.device} as {like}[{index}]; got {tensor.device}: "
        f"move it with .to({str(layout.device)!r})"
    )


def check_scalar(loss: Any, name: str) -> None:
    """Raise unless `loss` is a floating tensor with one element."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"{name}: expected a scalar tensor; got shape {tuple(loss.shape)}: reduce it with .mean() or .sum()"
        )
    if not loss.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype; got {loss.dtype}")
