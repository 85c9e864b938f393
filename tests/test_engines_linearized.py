"""The traced engine against eager: values, reuse, retraces, the self-check, the accumulating terms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.trace.fused_update import accumulating_pays
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

DTYPE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


class LoopedCell(nn.Module):
    """A recurrent net as a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.cell = nn.LSTMCell(6, 6)
        self.decoder = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        state = (torch.zeros(tokens.shape[0], 6, dtype=DTYPE),) * 2
        outputs = []
        for step in range(tokens.shape[1]):
            state = self.cell(self.embedding(tokens[:, step]), state)
            outputs.append(self.decoder(state[0]))
        return torch.stack(outputs, 2)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = kind(6, 5, 2, batch_first=True)
        self.decoder = nn.Linear(5, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.layers(self.embedding(tokens))[0]).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.layer(self.embedding(tokens))).transpose(1, 2)


def convolutional(*, training: bool) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )
    return net.train(training)


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(11, (3, 4)), torch.randint(11, (3, 4))


def images(channels: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(4, channels, 6, 6, dtype=DTYPE), torch.randint(5, (4,))


def vectors(width: int = 200, batch: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width, dtype=DTYPE), torch.randint(5, (batch,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "linear": (lambda: nn.Linear(200, 5), vectors),
    "mlp": (lambda: nn.Sequential(nn.Linear(200, 120), nn.Tanh(), nn.Linear(120, 5)), vectors),
    "relu": (lambda: nn.Sequential(nn.Linear(200, 9), nn.ReLU(), nn.Linear(9, 5, bias=False)), vectors),
    "dropout": (lambda: nn.Sequential(nn.Linear(200, 9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 5)), vectors),
    "batchnorm, training": (lambda: convolutional(training=True), images),
    "batchnorm, evaluation": (lambda: convolutional(training=False), images),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens),
    "gru": (lambda: Recurrent(nn.GRU), tokens),
    "looped cell": (LoopedCell, tokens),
    "attention with dropout": (Attention, tokens),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5)),
        images,
    ),
}

DECAYS = ("scaled", "global", "for each weight")


def build(name: str, decay: str) -> tuple[Any, dict[str, Tensor], Any, Any, Any, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    make, batch = MODELS[name]
    module = make().to(DTYPE)
    net = hvp.functional(module)
    weights = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}
    hyper: Any = torch.tensor(-3.0, dtype=DTYPE)
    if decay == "for each weight":
        hyper = {key: torch.randn_like(weight) - 3 for key, weight in weights.items()}

    def train(weights: dict[str, Tensor], hyper: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(net(weights, batch[0]), batch[1])
        if decay == "scaled":
            return loss * hyper.exp()
        if decay == "global":
            return loss + hyper.exp() * sum(weight.square().sum() for weight in weights.values())
        return loss + sum((hyper[key].exp() * weight.square()).sum() for key, weight in weights.items())

    def val(weights: dict[str, Tensor], hyper: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(weights, batch[0]), batch[1])

    return module, weights, hyper, train, val, batch()


def flat(tree: Any) -> Tensor:
    leaves, _ = flatten(tree, "tree")
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def compare(first: Any, second: Any, tolerance: float = 1e-9) -> None:
    a, b = flat(first), flat(second)
    assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-14


CASES = [(name, "for each weight", "accumulate") for name in MODELS]
CASES += [("mlp", decay, form) for decay in DECAYS for form in ("accumulate", "horner")] + [
    ("lstm", "scaled", "horner")
]


@pytest.mark.parametrize(("name", "decay", "form"), CASES)
def test_hypergradient_equals_eagers(name: str, decay: str, form: Any) -> None:
    _, weights, hyper, train, val, batch = build(name, decay)
    solver = hvp.Neumann(4, alpha=0.05, form=form, damping=0.3)
    results = {}
    for engine in ("eager", "linearized"):
        hypergradient = hvp.Hypergradient(train, val, solver, engine=engine)
        hypergradient(weights, hyper, batch, batch)
        results[engine] = hypergradient(weights, hyper, batch, batch)
    eager, traced = results["eager"], results["linearized"]
    compare(traced.solution.value, eager.solution.value)
    compare(traced.grads, eager.grads)
    compare(traced.train_loss, eager.train_loss)
    assert traced.solution.residual_norm == pytest.approx(eager.solution.residual_norm, rel=1e-9)
    assert not any(functions.distrust for functions in hypergradient.engine._cache.values())
    assert traced.gradient_norm == pytest.approx(float(eager.gradient_norm), rel=1e-9)


def engine_and_problem(name: str, decay: str = "global") -> tuple[LinearizedEngine, Problem]:
    _, weights, hyper, train, _, batch = build(name, decay)
    leaves, structure = flatten(weights, "weights")
    hyper_leaves, hyper_structure = flatten(hyper, "hyper")
    return LinearizedEngine(), Problem(train, leaves, structure, hyper_leaves, hyper_structure, (batch,), "train_loss")


def test_most_of_a_wide_nets_products_are_never_formed() -> None:
    engine, problem = engine_and_problem("mlp", "for each weight")
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization)
    parts = linearization.functions.partition
    assert parts.accumulates
    assert parts.terms[0][0] == 1 and parts.terms[0][1] == 0  # the wide layer: one matrix product, nothing else
    assert all(len(diagonals) == 1 for diagonals in parts.diagonals)  # the decay of each weight, one factor


def test_products_are_accumulated_on_a_gpu_only_where_that_saves_more_than_its_launches() -> None:
    for device, count, pays in (("cpu", 10, True), ("cuda", 10, False), ("cuda", 1000, False), ("cuda", 3000, True)):
        layout = Layout((torch.Size((count, count)),), ((count, 1),), (torch.float32,), torch.device(device))
        assert accumulating_pays(layout) == pays


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("solver", [hvp.Neumann(6, 0.05), hvp.Neumann(6, 0.05, form="horner")])
def test_accumulating_terms_equal_plain_ones(solver: hvp.Neumann, damping: float) -> None:
    engine, problem = engine_and_problem("mlp", "for each weight")
    linearization = engine.linearize(problem)
    solver = hvp.Neumann(solver.iterations, solver.alpha, solver.form, damping)
    v = [torch.randn_like(weight) for weight in problem.weights]
    fast = engine.run(linearization, v, solver, None)
    slow = engines.EagerEngine().run(linearization, v, solver, None)
    first, second = fast.read(fast.finish().tolist()), slow.read(slow.finish().tolist())
    compare(fast.value.data, slow.value.data, 1e-12)
    assert first.residual_norm == pytest.approx(second.residual_norm, rel=1e-10)


@pytest.mark.parametrize("loss", ["swapped", "square", "transposed", "constant times", "product"])
def test_products_that_are_views_of_the_tangent(loss: str) -> None:
    """Accumulating in place must not overwrite what it still has to read."""
    torch.manual_seed(0)
    weights = [torch.randn(150, 150, dtype=DTYPE), torch.randn(150, 150, dtype=DTYPE)]
    matrix = torch.randn(150, 150, dtype=DTYPE)
    losses: dict[str, Callable[..., Tensor]] = {
        "swapped": lambda w: (w[0] * w[1]).sum(),
        "square": lambda w: (w[0].square() + w[1].square()).sum() / 2,
        "transposed": lambda w: (w[0] * w[0].t()).sum() + (w[0] * w[1].t()).sum(),
        "constant times": lambda w: ((matrix @ w[0]) * w[0]).sum() + (w[1] @ matrix * w[0]).sum(),
        "product": lambda w: (w[0] @ w[1] * matrix).sum(),  # H t = (matrix t[1]^T, t[0]^T matrix)
    }
    v = [torch.randn_like(w) for w in weights]
    solutions = [
        hvp.HessianOperator(losses[loss], weights, engine=engine).solve(v, hvp.Neumann(4, 1e-3, damping=0.1)).value
        for engine in ("eager", "linearized")
    ]
    compare(solutions[1], solutions[0], 1e-12)


def test_new_values_reuse_the_trace_and_new_shapes_retrace() -> None:
    _, weights, hyper, train, val, batch = build("mlp", "for each weight")
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="linearized")
    eager = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="eager")
    engine = hypergradient.engine
    assert isinstance(engine, LinearizedEngine)
    for scale in (1.0, 0.5, -2.0):
        here = {key: scale * weight for key, weight in weights.items()}
        there = {key: scale + value for key, value in hyper.items()}
        other = (batch[0] * scale, batch[1].flip(0))
        compare(hypergradient(here, there, other, batch).grads, eager(here, there, other, batch).grads)
    assert engine.traces == 1
    smaller = (batch[0][:3], batch[1][:3])
    compare(hypergradient(weights, hyper, smaller, batch).grads, eager(weights, hyper, smaller, batch).grads)
    assert engine.traces == 2
    assert "2 traces" in hypergradient.report()


def test_a_module_put_into_evaluation_retraces() -> None:
    module, weights, hyper, train, val, batch = build("batchnorm, training", "global")
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="linearized")
    eager = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="eager")
    for training in (True, False, True):
        module.train(training)
        compare(hypergradient(weights, hyper, batch, batch).grads, eager(weights, hyper, batch, batch).grads)


def test_buffers_are_read_by_reference_and_left_alone() -> None:
    module, weights, hyper, train, val, batch = build("batchnorm, evaluation", "global")
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="linearized")
    eager = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="eager")
    hypergradient(weights, hyper, batch, batch)
    module[1].running_mean.add_(0.5)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    compare(hypergradient(weights, hyper, batch, batch).grads, eager(weights, hyper, batch, batch).grads)
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


def test_a_hidden_tensor_that_is_another_is_caught() -> None:
    """The trace keeps the tensor that was there when it was made; the tenth call finds out."""
    torch.manual_seed(1)
    data = torch.randn(8, dtype=DTYPE)
    scale = ContextVar("scale", default=torch.rand(8, dtype=DTYPE) + 1)

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (scale.get() * (w - data).square()).sum() + h.exp() * w.square().sum()

    hypergradient = hvp.Hypergradient(train, lambda w, h, b: w.square().sum(), hvp.Neumann(5, 0.1), "linearized")
    w, h = torch.randn(8, dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    hypergradient(w, h, None, None)
    scale.set(scale.get() + 1)
    with pytest.warns(UserWarning, match="replaced by 'eager' for train_loss.*function of its arguments"):
        for _ in range(9):
            last = hypergradient(w, h, None, None)
    eager = hvp.Hypergradient(train, lambda w, h, b: w.square().sum(), hvp.Neumann(5, 0.1), "eager")
    compare(last.grads, eager(w, h, None, None).grads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(hypergradient(w, h, None, None).grads, last.grads)


def test_control_flow_on_values_is_refused_with_a_remedy() -> None:
    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return w.square().sum() * (2 if bool(w.sum() > 0) else 3) + h * w.sum()

    w, h = torch.ones(3), torch.tensor(1.0)
    hypergradient = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.1), engine="linearized")
    with pytest.raises(hvp.TraceError, match="train_loss.*engine='eager'"):
        hypergradient(w, h, None, None)
    automatic = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.1), engine="auto")
    automatic(w, h, None, None)
    assert "cannot be traced" in automatic.report()


def test_a_loss_that_changes_a_tensor_is_refused() -> None:
    counter = torch.zeros(())

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        counter.add_(1)
        return w.square().sum() + h * w.sum()

    hypergradient = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.1), engine="linearized")
    with pytest.raises(hvp.TraceError, match="without side effects"):
        hypergradient(torch.ones(3), torch.tensor(1.0), None, None)


def test_unused_weights_and_hyperparameters_get_zeros() -> None:
    def train(w: list[Tensor], h: list[Tensor], batch: Any) -> Tensor:
        return w[0].square().sum() * h[0].exp()

    w = [torch.ones(3, dtype=DTYPE), torch.ones(2, dtype=DTYPE)]
    h = [torch.zeros((), dtype=DTYPE), torch.zeros(4, dtype=DTYPE)]
    for engine in ("eager", "linearized"):
        hypergradient = hvp.Hypergradient(train, lambda w, h, b: w[0].sum() + w[1].sum(), hvp.Neumann(30, 0.4), engine)
        grads = hypergradient(w, h, None, None).grads
        torch.testing.assert_close(grads[0], torch.tensor(-3.0, dtype=DTYPE))
        torch.testing.assert_close(grads[1], torch.zeros(4, dtype=DTYPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(150, 120), nn.Tanh(), nn.Linear(120, 5)).to(dtype)
    net, x, y = hvp.functional(module), torch.randn(7, 150, dtype=dtype), torch.randint(5, (7,))
    weights = {key: parameter.detach() for key, parameter in module.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(weights, x).float(), y)

    v = {key: torch.randn_like(weight) for key, weight in weights.items()}
    values = [
        hvp.HessianOperator(loss, weights, engine=engine).solve(v, hvp.Neumann(3, 0.1)).value
        for engine in ("eager", "linearized")
    ]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    compare({k: t.double() for k, t in values[1].items()}, {k: t.double() for k, t in values[0].items()}, tolerance)


def test_automatic_choice_reports_its_evidence() -> None:
    _, weights, hyper, train, val, batch = build("mlp", "for each weight")
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05))
    eager = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine="eager")
    for _ in range(3):
        compare(hypergradient(weights, hyper, batch, batch).grads, eager(weights, hyper, batch, batch).grads)
    report = hypergradient.report()
    assert "engine auto" in report and "one term: eager" in report and "linearized" in report


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_compressed_sparse_tensor_is_refused_with_its_line() -> None:
    adjacency = torch.eye(3).to_sparse_csr()

    def loss(w: Tensor) -> Tensor:
        return (adjacency @ w).square().sum()

    with pytest.raises(hvp.TraceError, match=r"compressed sparse one at .*adjacency @ w.*to_sparse_coo"):
        hvp.HessianOperator(loss, torch.ones(3, 2), engine="linearized") @ torch.ones(3, 2)
    assert torch.equal(hvp.HessianOperator(loss, torch.ones(3, 2)) @ torch.ones(3, 2), 2 * torch.ones(3, 2))


def test_an_automatic_operator_does_not_trace_what_cannot_repay() -> None:
    operator = hvp.HessianOperator(lambda w: w.pow(4).sum(), torch.ones(3, dtype=DTYPE))
    engine = operator.engine
    assert isinstance(engine, engines.AutoEngine)
    engine.expected_products = 0
    fresh = engines.AutoEngine(expected_products=0)
    again = hvp.HessianOperator(lambda w: w.pow(4).sum(), torch.ones(3, dtype=DTYPE), engine=fresh)
    compare(again @ torch.ones(3, dtype=DTYPE), operator @ torch.ones(3, dtype=DTYPE))
    assert "a trace would take" in fresh.report()


def test_same_draws_as_eager_and_fresh_ones_at_every_call() -> None:
    _, weights, hyper, train, val, batch = build("dropout", "scaled")
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(2, 0.05), engine="linearized")
    state = torch.get_rng_state()
    first = hypergradient(weights, hyper, batch, batch).solution.value
    second = hypergradient(weights, hyper, batch, batch).solution.value
    assert not torch.allclose(flat(first), flat(second))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("error")
def test_parameters_that_require_grad_draw_no_warning() -> None:
    """Torch warns, once in a process, when such a tensor becomes a number."""
    weights = nn.Linear(3, 2, dtype=DTYPE)
    x = torch.ones(4, 3, dtype=DTYPE)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for engine in ("eager", "linearized"):
            operator = hvp.HessianOperator(
                lambda w: F.linear(x, w["weight"], w["bias"]).square().sum(),
                dict(weights.named_parameters()),
                engine=engine,
            )
            assert operator.dense().shape == (8, 8)
    finally:
        torch.set_warn_always(always)
