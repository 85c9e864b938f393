"""nn.LSTM and nn.GRU as strangers use them: products with the Hessian by every engine that takes part, named, against
torch's own double backward in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support.torch_compat import without_onednn
from hvp_engine.differentiable import gru, lstm
from hvp_engine.differentiable.recurrent import layers
from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.errors import TraceError

ENGINES = ("eager", "recorded", "linearized")


class Wrapped(nn.Sequential):
    """A layer deep inside of wrappers, of which only the outputs go on."""

    class Output(nn.Module):
        def __init__(self, layer: nn.RNNBase):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    def __init__(self, layer: nn.RNNBase, width: int):
        super().__init__(nn.Linear(3, 4), nn.Sequential(self.Output(layer)), nn.Tanh(), nn.Linear(width, 2))


class Sorted(nn.Module):
    """Sentences of different lengths, in any order."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer, self.lengths = layer, torch.tensor([2, 5, 3])

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        output, state = self.layer(packed)
        assert isinstance(output, PackedSequence)
        states = state if isinstance(state, tuple) else (state,)
        return pad_packed_sequence(output, batch_first=True)[0].sum(1) + sum(
            s.transpose(0, 1).flatten(1) for s in states
        )


class Learned(nn.Module):
    """Initial states that are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, 2)
        self.start = nn.ParameterList([nn.Parameter(torch.randn(2, 1, 4) / 2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        output, (h, c) = self.layer(x, tuple(start.expand(2, x.shape[1], 4).contiguous() for start in self.start))
        return output.sum(0) + h[-1] * c[0]


class Tied(nn.Module):
    """The same layer twice, once on the output of the other call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)[0] * 2)[0]


class Truncated(nn.Module):
    """A state from the words before, as a constant, as truncated backpropagation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            _, state = self.layer(x[:2])
        return self.layer(x[2:], state)[0]


class Language(nn.Module):
    """A language model whose embedding is its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 4), nn.LSTM(4, 4, 2, dropout=0.0, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.layer(self.embedding(words))[0], self.embedding.weight).flatten(0, 1)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 4), nn.LSTM(4, 3, 2, bidirectional=True)
        self.tags = nn.Linear(6, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(self.layer(self.embedding(words))[0])


class Translator(nn.Module):
    """An encoder's last state is where the decoder starts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(3, 4, bias=False), nn.GRU(2, 4)
        self.scores = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(x)
        return self.scores(self.decoder(x[..., :2].flip(0), state)[0])


class Frozen(nn.Module):
    """The first of two layers is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(3, 4).requires_grad_(False), nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


class Unbatched(nn.Module):
    """One sequence, without a dimension for the batch; only the cell's last state is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, 0])[1][1]


def numbers() -> Tensor:
    return torch.randn(5, 3, 3)


def words() -> Tensor:
    return torch.randint(11, (3, 5))


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LSTM in wrappers": (lambda: Wrapped(nn.LSTM(4, 3, batch_first=True), 3), numbers),
    "GRU in wrappers, both directions": (lambda: Wrapped(nn.GRU(4, 3, 2, bidirectional=True), 6), numbers),
    "packed LSTM": (lambda: Sorted(nn.LSTM(3, 4, batch_first=True)), lambda: torch.randn(3, 5, 3)),
    "packed GRU": (lambda: Sorted(nn.GRU(3, 4, batch_first=True)), lambda: torch.randn(3, 5, 3)),
    "learned states": (Learned, numbers),
    "tied": (Tied, numbers),
    "truncated": (Truncated, numbers),
    "language model": (Language, words),
    "tagger": (Tagger, words),
    "translator": (Translator, numbers),
    "frozen layer": (Frozen, numbers),
    "unbatched": (Unbatched, numbers),
}


def problem_of(name: str) -> tuple[dict[str, Tensor], Callable[..., Tensor], Tensor]:
    """Weights, the loss as a function of them, and a batch; in float64."""
    torch.manual_seed(0)
    make, batch = FORMS[name]
    module, inputs = make().double(), batch()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    network = hvp.functional(module)

    def loss(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
        return network(weights, batch).cos().mean() + 0.1 * sum(w.square().sum() for w in weights.values())

    return {name: w for name, w in module.named_parameters() if w.requires_grad}, loss, inputs


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with a word for each layer that the operations of this package compute."""
    seen: list[str] = []

    def noting(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            seen.append(kind)
            return call(*arguments)

        return noted

    for kind in ("lstm", "gru"):
        monkeypatch.setattr(layers, f"_{kind}_layer", noting(kind, getattr(layers, f"_{kind}_layer")))
    return seen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_torchs_own_double_backward(form: str, engine: str, ours: list[str]) -> None:
    weights, loss, batch = problem_of(form)
    with without_onednn():
        gradient = torch.autograd.grad(loss(weights, batch), list(weights.values()), create_graph=True)
    assert not ours
    made = hvp.engines.create(engine)
    if engine == "linearized" and form.startswith("packed"):  # as before: torch packs by the values of the lengths
        with pytest.raises(TraceError, match="tensor values"):
            hvp.HessianOperator(loss, weights, batch, engine=made)
        return
    for _ in range(3):  # a recorded program is made at the second sight, and runs at the third
        operator = hvp.HessianOperator(loss, weights, batch, engine=made)
        assert operator._linearization.fallback is None, operator._linearization.fallback
        for _ in range(2):
            tangents = {name: torch.randn_like(w) for name, w in weights.items()}
            found = operator @ tangents
            expected = torch.autograd.grad(gradient, list(weights.values()), list(tangents.values()), retain_graph=True)
            for mine, theirs in zip(found.values(), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert ours
    if engine == "recorded":
        assert operator._linearization.program is not None
        # The graph shows all that the operations keep; that of torch's padding hides something.
        assert bool(operator._linearization._known.hidden) == form.startswith("packed")


@pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_under_vmap(kind: Callable[..., nn.RNNBase], engine: str) -> None:
    """One sequence after another, which torch's own layers refuse, in both losses of a hypergradient."""
    torch.manual_seed(0)
    layer = kind(3, 2).double()
    network, weights, batch = hvp.functional(layer), dict(layer.named_parameters()), torch.randn(4, 3, 3).double()

    def at_once(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return network(weights, x.transpose(0, 1))[0].transpose(0, 1)

    def mapped(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.vmap(lambda one: network(weights, one)[0])(x)

    def hypergradient(outputs: Callable[..., Tensor], engine: str) -> Tensor:
        def train(weights: dict[str, Tensor], hyper: Tensor, x: Tensor) -> Tensor:
            penalty = sum(w.square().sum() for w in weights.values())
            return outputs(weights, x).cos().mean() + hyper.exp() * penalty

        def val(weights: dict[str, Tensor], hyper: Tensor, x: Tensor) -> Tensor:
            return (outputs(weights, x) - 1).square().mean()

        hyper = torch.tensor(-2.0, dtype=torch.float64)
        assert hvp.HessianOperator(train, weights, hyper, batch, engine=engine).linear_map.fallback is None
        implicit = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), engine)
        for _ in range(3):
            result = implicit(weights, hyper, batch, batch)
        return torch.cat([part.flatten() for part in (result.grads, *result.solution.value.values())])

    torch.testing.assert_close(hypergradient(mapped, engine), hypergradient(at_once, "eager"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["LSTM in wrappers", "GRU in wrappers, both directions"])
def test_what_checkpointing_computes_again_is_ours_too(form: str, ours: list[str]) -> None:
    """It happens in the backward pass, where a recurrence hides its own work from those who watch for user code."""
    weights, loss, batch = problem_of(form)
    tangents = {name: torch.randn_like(w) for name, w in weights.items()}
    expected = hvp.HessianOperator(loss, weights, batch, engine=hvp.engines.create("eager")) @ tangents
    once = len(ours)

    def checkpointed(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
        return checkpoint(loss, weights, batch, use_reentrant=False)

    operator = hvp.HessianOperator(checkpointed, weights, batch, engine=hvp.engines.create("eager"))
    assert operator._linearization.fallback is None
    torch.testing.assert_close(operator @ tangents, expected, rtol=1e-9, atol=1e-12)
    assert len(ours) >= 3 * once


LAYERS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    f"{kind.__name__}{options or ''}": (kind, options)
    for kind in (nn.LSTM, nn.GRU)
    for options in (
        {},
        {"num_layers": 3, "dropout": 0.4},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True},
        {"bias": False},
    )
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_derivatives_are_torchs(name: str, packed: bool, ours: list[str]) -> None:
    """With the same dropout masks from the same seed."""
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    rnn = kind(3, 4, **options).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 1, 4, 2])

    def derivatives() -> list[Tensor]:
        torch.manual_seed(1)
        first = rnn.batch_first
        inputs = pack_padded_sequence(x[:4], lengths, first, enforce_sorted=False) if packed else x
        output, state = rnn(inputs)
        values = [output.data if packed else output, *(state if isinstance(state, tuple) else [state])]
        loss = sum((value.sin() * (1 + value)).sum() for value in values)
        gradient = torch.autograd.grad(loss, [x, *rnn.parameters()], create_graph=True)
        tangents = [torch.randn_like(g) for g in gradient]
        return [*values, *gradient, *torch.autograd.grad(gradient, [x, *rnn.parameters()], tangents)]

    with without_onednn():
        expected = derivatives()
    assert not ours
    with plain_kernels():
        found = derivatives()
    assert ours
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_half_precision_is_computed_in_float32(kind: Callable[..., nn.RNNBase], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rnn, x = kind(3, 4).to(dtype), torch.randn(5, 2, 3).to(dtype)
    with plain_kernels():
        output, _ = rnn(x)
        (gradient,) = torch.autograd.grad(output.square().sum(), rnn.weight_hh_l0, create_graph=True)
        assert output.dtype == gradient.dtype == dtype
        (product,) = torch.autograd.grad(gradient.square().sum(), rnn.weight_hh_l0)
        wide = kind(3, 4)
        wide.load_state_dict({name: w.float() for name, w in rnn.state_dict().items()})
        (of_wide,) = torch.autograd.grad(wide(x.float())[0].square().sum(), wide.weight_hh_l0, create_graph=True)
        (expected,) = torch.autograd.grad(of_wide.square().sum(), wide.weight_hh_l0)
    torch.testing.assert_close(product.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def left_to_torch() -> dict[str, Callable[[], Any]]:
    x = torch.randn(5, 2, 3)

    def autocast() -> Any:
        with torch.autocast("cpu"):
            return nn.LSTM(3, 4)(x)

    return {
        "projections": lambda: nn.LSTM(3, 4, proj_size=2)(x),
        "autocast": autocast,
        "nn.RNN": lambda: nn.RNN(3, 4)(x),
    }


@pytest.mark.parametrize("name", left_to_torch())
def test_left_to_torch(name: str, ours: list[str]) -> None:
    with plain_kernels():
        left_to_torch()[name]()
    assert not ours


def test_a_projected_layer_has_products_by_torchs_kernels(ours: list[str]) -> None:
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 4, proj_size=2).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    network = hvp.functional(rnn)
    operator = hvp.HessianOperator(lambda w: network(w, x)[0].sin().sum(), rnn, engine="eager")
    dense = operator.dense()
    torch.testing.assert_close(dense, dense.T)
    assert dense.abs().max() > 0 and not ours


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: nn.LSTM(3, 4)(torch.randn(0, 2, 3)), "sequence length"),
        (lambda: nn.LSTM(3, 4)(torch.randn(5, 2, 2)), "input.size"),
        (lambda: nn.GRU(3, 4)(torch.randn(5, 2, 3), torch.randn(1, 3, 4)), "hidden size"),
        (lambda: nn.LSTM(3, 4)(torch.randn(5, 2, 3).double()), "dtype|type"),
        (lambda: lstm(torch.randn(5, 2, 3)), "argument"),
        (lambda: gru(1, 2, 3, 4, 5, 6, 7, 8, 9), "."),
    ],
)
def test_bad_arguments_get_torchs_errors(make: Callable[[], Any], error: str) -> None:
    with plain_kernels(), pytest.raises((RuntimeError, ValueError, TypeError, AttributeError), match=error):
        make()
