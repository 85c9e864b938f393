"""Batches that are mappings of classes that torch's pytree does not know, as tokenizers return them."""

from __future__ import annotations

import types
import warnings
from collections import ChainMap, UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.mappings import map_leaves
from hvp_engine._support.pytree import flatten_batch

DTYPE = torch.float64


class Encoding(UserDict):
    """A tokenizer's batch: items as attributes, and something beside them that is no tensor."""

    def __init__(self, data: Mapping[str, Any], words: list[str] | None = None):
        super().__init__(data)
        self.words = words

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Subclass(dict):  # type: ignore[type-arg]
    """pytree takes a subclass of dict for a leaf."""


class ReadOnly(Mapping[str, Any]):
    """The least that a mapping is."""

    def __init__(self, data: Mapping[str, Any]):
        self._data = dict(data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Named(ReadOnly):
    """One that a dict alone does not make."""

    def __init__(self, name: str, data: Mapping[str, Any]):
        super().__init__(data)
        self.name = name


class Doubling(ReadOnly):
    """One that does not keep the values that it is given."""

    def __init__(self, data: Mapping[str, Any]):
        super().__init__({key: 2 * value for key, value in data.items()})


KINDS = [Encoding, Subclass, ReadOnly, types.MappingProxyType, ChainMap]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def content(seed: int) -> dict[str, Any]:
    return {"x": randn(5, 3, seed=seed), "y": randn(5, seed=seed + 100), "kind": "regression"}


def losses() -> tuple[Any, Any]:
    def val(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (batch["x"] @ w - batch["y"]).square().mean()

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return val(w, h, batch) + h.exp() * w.square().square().sum()

    return train, val


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["linearized", "auto", "eager"])
def test_a_hypergradient_reads_each_batch(engine: str, kind: Any) -> None:
    """One trace, and the values of every call: nothing of the first batch is kept."""
    mapped = hvp.Hypergradient(*losses(), hvp.Neumann(3, 0.1), engine)
    plain = hvp.Hypergradient(*losses(), hvp.Neumann(3, 0.1), "eager")
    w, h = randn(3, seed=1), torch.zeros((), dtype=DTYPE)
    for seed in range(4):
        train, val = content(2 * seed), content(2 * seed + 1)
        found = mapped(w, h, kind(train), kind(val))
        torch.testing.assert_close(found.grads, plain(w, h, train, val).grads, rtol=1e-10, atol=1e-12)
    if engine == "linearized":
        assert mapped.report().count("1 traces in") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_operators_and_gauss_newton(kind: Any) -> None:
    w, given = randn(3, seed=1), content(3)
    loss = lambda w, batch: (batch["x"] @ w - batch["y"]).square().mean()  # noqa: E731
    expected = 2 * given["x"].mT @ given["x"] / 5
    H = hvp.HessianOperator(loss, w, kind(given), engine="linearized")
    torch.testing.assert_close(H @ w, expected @ w)
    given["x"] += 1  # in place: the operator was made of other values
    with pytest.raises(ValueError, match="changed in place"):
        H @ w


def test_nested_and_beside_others() -> None:
    train, val = losses()
    nested = hvp.Hypergradient(
        lambda w, h, batch: train(w, h, batch["parts"][1]["inner"]) * batch["scale"],
        lambda w, h, batch: val(w, h, batch["parts"][1]["inner"]),
        hvp.Neumann(3, 0.1),
        "linearized",
    )
    plain = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.1), "eager")
    w, h = randn(3, seed=1), torch.zeros((), dtype=DTYPE)
    for seed in range(3):
        batch = Encoding({"parts": [None, ReadOnly({"inner": Encoding(content(seed))})], "scale": 1.0})
        expected = plain(w, h, content(seed), content(seed)).grads
        torch.testing.assert_close(nested(w, h, batch, batch).grads, expected, rtol=1e-10, atol=1e-12)


def test_a_loss_sees_the_class_and_its_attributes() -> None:
    seen = set()

    def train(w: Tensor, h: Tensor, batch: Encoding) -> Tensor:
        seen.add(type(batch))
        return (batch.x @ w - batch.y).square().mean() + h * w.square().sum()

    val = lambda w, h, batch: (batch.x @ w - batch.y).square().mean()  # noqa: E731
    w, h, batch = randn(3, seed=1), torch.ones((), dtype=DTYPE), Encoding(content(2))
    hvp.Hypergradient(train, val, hvp.Neumann(3, 0.1), "linearized")(w, h, batch, batch)
    assert seen == {Encoding}


def test_what_an_object_holds_beside_its_items_is_not_kept_by_a_trace() -> None:
    """`words` is not in the trace's batch, so the loss fails there; `auto` takes an engine without a trace, whose batch
    is the caller's."""

    def train(w: Tensor, h: Tensor, batch: Encoding) -> Tensor:
        return len(batch.words) * (batch["x"] @ w).square().mean() + h * w.square().square().sum()

    val = lambda w, h, batch: w.square().sum()  # noqa: E731
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.1))
    eager = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.1), "eager")
    w, h = randn(3, seed=1), torch.ones((), dtype=DTYPE)
    for seed in range(4):
        batch = Encoding(content(seed), ["a"] * (seed + 1))
        found, expected = hypergradient(w, h, batch, batch).grads, eager(w, h, batch, batch).grads
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)  # recorded rounds differently
    assert "the loss cannot be traced: TypeError" in hypergradient.report()
    with pytest.raises(TypeError, match="NoneType"):
        hvp.Hypergradient(train, val, hvp.Neumann(3, 0.1), "linearized")(w, h, batch, batch)


@pytest.mark.parametrize("make", [lambda data: Named("name", data), Doubling])
def test_a_class_that_a_dict_does_not_make_says_what_to_pass(make: Any) -> None:
    w, h, data = randn(3, seed=1), torch.zeros((), dtype=DTYPE), content(2)
    del data["kind"]
    with pytest.raises(TypeError, match=r"made from a dict.*pass dict\(batch\)"):
        hvp.Hypergradient(*losses(), hvp.Neumann(3, 0.1), "linearized")(w, h, make(data), make(data))
    eager = hvp.Hypergradient(*losses(), hvp.Neumann(3, 0.1), "eager")(w, h, make(data), make(data)).grads
    auto = hvp.Hypergradient(*losses(), hvp.Neumann(3, 0.1))(w, h, make(data), make(data)).grads
    torch.testing.assert_close(auto, eager, rtol=1e-12, atol=1e-14)


def test_tuner() -> None:
    """The same run as with dicts, from a loader, digit for digit."""

    def run(kind: Any) -> Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1, dtype=DTYPE)
        hyper = torch.zeros((), dtype=DTYPE, requires_grad=True)
        net = hvp.functional(module)
        val = lambda w, h, b: (net(w, b["x"]).squeeze(-1) - b["y"]).square().mean()  # noqa: E731
        tuner = hvp.Tuner(
            module,
            hyper,
            lambda w, h, b: val(w, h, b) + h.exp() * sum(t.square().sum() for t in w.values()),
            val,
            weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.05),
            hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05),
            inner_steps=2,
            solver=hvp.Neumann(3, 0.05),
        )
        rows = [{"x": randn(3, seed=i), "y": randn(1, seed=100 + i)[0]} for i in range(12)]
        collate = lambda rows: kind(torch.utils.data.default_collate(rows))  # noqa: E731
        loader = torch.utils.data.DataLoader(rows, 4, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuner.fit(loader, loader, 3, progress=False)
        return hyper.detach().clone()

    assert torch.equal(run(Encoding), run(dict)) and float(run(dict)) != 0


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_and_back(kind: Any) -> None:
    data = content(2)
    leaves, structure = flatten_batch([kind(data), 3])
    assert [leaf is given for leaf, given in zip(leaves, [*data.values(), 3], strict=True)] == [True] * 4
    back = structure.rebuild([None, *leaves[1:]])
    assert type(back[0]) is kind and back[0]["x"] is None and back[0]["y"] is data["y"]
    assert flatten_batch([kind(content(4)), 3])[1] == structure
    assert hash(flatten_batch([kind(content(4)), 3])[1]) == hash(structure)
    assert flatten_batch([kind(dict(list(data.items())[:2])), 3])[1] != structure


@pytest.mark.parametrize("kind", KINDS)
def test_mapped_tensors(kind: Any) -> None:
    batch = kind(content(2))
    assert map_leaves(lambda t: t, batch) is batch  # nothing to move
    moved = map_leaves(lambda t: t.float(), batch)
    assert moved["x"].dtype == torch.float32 and batch["x"].dtype == DTYPE and moved["kind"] == "regression"
    if kind in (Encoding, Subclass, ChainMap):
        assert type(moved) is kind


def test_a_mapped_copy_keeps_what_the_object_holds_beside_its_items() -> None:
    batch = Encoding(content(2), ["a", "b"])
    moved = map_leaves(lambda t: t.float(), batch)
    assert moved.words == ["a", "b"] and moved.x.dtype == torch.float32 and batch.x.dtype == DTYPE
