"""Taking containers apart and putting them together."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.mappings import map_leaves
from hvp_engine._support.pytree import check_like, check_scalar, flatten
from hvp_engine._support.tensor_lists import as_list


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


A, B, C = randn(2, seed=1), randn(3, seed=2), randn(1, seed=3)[0]


@pytest.mark.parametrize(
    "tree",
    [A, [A, B], (A, B), {"x": A, "y": [B, (C,)]}, Pair(A, B), [[A], [], {"z": C}]],
    ids=["tensor", "list", "tuple", "nested", "named tuple", "with empty parts"],
)
def test_flatten_and_rebuild(tree: Any) -> None:
    leaves, structure = flatten(tree, "x")
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    rebuilt = structure.rebuild([leaf + 1 for leaf in leaves])
    assert type(rebuilt) is type(tree)
    again, same = flatten(rebuilt, "x")
    assert same == structure
    for leaf, after in zip(leaves, again, strict=True):
        assert torch.equal(after, leaf + 1)


def test_module_is_the_dict_of_its_parameters_that_require_grad() -> None:
    module = nn.Linear(2, 3)
    leaves, structure = flatten(module, "module")
    assert leaves[0] is module.weight
    assert list(structure.rebuild(leaves)) == ["weight", "bias"]
    module.weight.requires_grad_(False)
    leaves, structure = flatten(module, "module")
    assert list(structure.rebuild(leaves)) == ["bias"]


def test_structures_differ() -> None:
    assert flatten([A, B], "x")[1] != flatten((A, B), "x")[1]
    assert flatten({"a": A}, "x")[1] != flatten({"b": A}, "x")[1]


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ([], ValueError, r"^x: expected at least one tensor; got an empty list"),
        ({}, ValueError, r"^x: expected at least one tensor; got an empty dict"),
        (nn.ReLU(), ValueError, r"^x: expected at least one tensor"),
        ({"a": [A, 1.0]}, TypeError, r"^x\['a'\]\[1\]: expected a tensor; got float"),
        (None, TypeError, r"^x: expected a tensor; got NoneType"),
        ([A.long()], TypeError, r"^x\[0\]: expected a real floating dtype.*got torch.int64"),
        ([A.to(torch.complex64)], TypeError, r"^x\[0\]: .*complex64: view it as real with torch.view_as_real"),
        ([A.bool()], TypeError, r"^x\[0\]: .*got torch.bool"),
        ([A.to_sparse()], TypeError, r"^x\[0\]: expected a dense tensor.*to_dense"),
        ([A, A.to("meta")], ValueError, r"^x: expected all tensors on one device; got cpu, meta"),
    ],
)
def test_flatten_refuses(tree: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flatten(tree, "x")


@pytest.mark.parametrize("tensors", [A, [A, B], (A, B), iter([A, B])], ids=["tensor", "list", "tuple", "iterator"])
def test_as_list(tensors: Any) -> None:
    result = as_list(tensors, "x")
    assert result[0] is A and len(result) in (1, 2)


def test_as_list_takes_dicts_and_modules_in_their_order() -> None:
    module = nn.Linear(2, 2)
    assert [id(tensor) for tensor in as_list(module, "x")] == [id(module.weight), id(module.bias)]
    assert [id(tensor) for tensor in as_list({"b": B, "a": A}, "x")] == [id(B), id(A)]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (3, TypeError, r"^x: expected a tensor or a sequence of tensors; got int"),
        (None, TypeError, r"^x: expected a tensor or a sequence of tensors; got NoneType"),
        ([[A], [B]], TypeError, r"^x: expected a flat sequence"),
        ([[A, B]], TypeError, r"^x: expected a flat sequence"),
        ([], ValueError, r"^x: expected at least one tensor"),
        ({"a": [A]}, TypeError, r"^x"),
    ],
)
def test_as_list_refuses(tensors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_list(tensors, "x")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([A], ValueError, r"^v: expected 2 tensors, one for each of w; got 1"),
        ([A, B, C], ValueError, r"^v: expected 2 tensors, one for each of w; got 3"),
        ([A, A], ValueError, r"^v\[1\]: expected shape \(3,\) as w\[1\]; got \(2,\)"),
        ([A, B.to("meta")], ValueError, r"^v\[1\]: expected device cpu as w\[1\]; got meta"),
    ],
)
def test_check_like_refuses(tensors: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_like(tensors, Layout.of([A, B]), "v", "w")


def test_check_like_on_dtypes() -> None:
    single = Layout.of([A.float(), B.to(torch.bfloat16)])
    check_like([A.to(torch.bfloat16), B.float()], single, "v", "w")
    with pytest.raises(
        TypeError, match=r"^v\[0\]: expected a floating dtype no wider than torch.float32.*got torch.float64"
    ):
        check_like([A, B.float()], single, "v", "w")
    check_like([A, B], Layout.of([A, B.float()]), "v", "w")


@pytest.mark.parametrize("loss", [C, C.reshape(1), C.requires_grad_()])
def test_check_scalar_accepts(loss: Tensor) -> None:
    check_scalar(loss, "loss")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.0, TypeError, r"^loss: expected a scalar tensor; got float"),
        (B, ValueError, r"^loss: expected a scalar tensor; got shape \(3,\): reduce it with .mean\(\) or .sum\(\)"),
        (torch.zeros(0), ValueError, r"^loss: expected a scalar tensor; got shape \(0,\)"),
        (torch.tensor(1), TypeError, r"^loss: expected a floating dtype; got torch.int64"),
    ],
)
def test_check_scalar_refuses(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_scalar(loss, "loss")


def test_map_leaves_keeps_what_is_no_tensor() -> None:
    tree = {"x": torch.ones(2, dtype=DTYPE), "label": "a", "n": [3, None]}
    found = map_leaves(lambda t: t + 1, tree)
    assert torch.equal(found["x"], torch.full((2,), 2.0, dtype=DTYPE))
    assert (found["label"], found["n"]) == ("a", [3, None])
