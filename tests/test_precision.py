"""Low precision: errors against float64 within twice those of plain torch, autocast, loss scaling, and TF32 told."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, generator, randn, relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from bench import precision as bench
from hvp_engine._support.precision import float32_arithmetic
from hvp_engine.diagnostics import doctor
from hvp_engine.differentiation import self_check

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")

LOW = [torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 8e-4}


# Errors of the series


@pytest.mark.parametrize("condition", [10.0, 1e5])
@pytest.mark.parametrize("iterations", [5, 40])
@pytest.mark.parametrize("dtype", bench.DTYPES, ids=str)
def test_a_series_errs_at_most_twice_as_much_as_plain_torch(dtype, iterations, condition):
    problem = bench.quadratic(condition, seed=1)
    found = bench.errors(problem, dtype, iterations)
    for form in bench.FORMS:
        assert found[form] <= 2 * found[f"plain torch, {form}"], (form, found)
        assert found[form] < BOUND[dtype], (form, found)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_errors_do_not_grow_with_the_number_of_terms_where_those_of_plain_torch_do(dtype):
    few, many = (bench.errors(bench.quadratic(1e3, seed=2), dtype, count) for count in (5, 100))
    for form in bench.FORMS:
        assert many[form] < 2 * few[form]
        assert many[f"plain torch, {form}"] > 3 * few[f"plain torch, {form}"]


@cache
def trained(hidden: int | None) -> bench.Problem:
    return bench.network(hidden, seed=3)


@pytest.mark.parametrize("dtype", bench.DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [None, 16], ids=["logistic", "mlp"])
def test_a_network_errs_at_most_twice_as_much_as_plain_torch(hidden, dtype):
    found = bench.errors(trained(hidden), dtype, 20)
    for form in bench.FORMS:
        assert found[form] <= 2 * found[f"plain torch, {form}"], (form, found)
        assert found[form] < BOUND[dtype], (form, found)


def test_the_table_is_written_whole_with_a_row_for_each_method(tmp_path):
    rows = bench.measure([lambda seed: bench.quadratic(10.0, seed)], (2,), seeds=2)
    assert len(rows) == 4 + 4 + 6
    file = tmp_path / "new" / "precision.csv"
    bench.write(file, rows)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + len(rows) and lines[0].startswith("problem,condition,dtype,iterations,method,median")
    assert bench.table(rows).count("\n") == len(bench.DTYPES)


# Hypergradients of models in low precision


class Digits:
    """A small classifier on random data, with a penalty for each weight, and a plain loop to compare with."""

    def __init__(self, device: torch.device):
        self.module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
        self.net = hvp.functional(self.module)
        names = [name for name, _ in self.module.named_parameters()]
        shapes = [p.shape for p in self.module.parameters()]
        self.weights = {
            n: (0.4 * randn(*s, seed=k)).to(device) for k, (n, s) in enumerate(zip(names, shapes, strict=True))
        }
        self.hyper = {n: torch.full_like(w, -2.0) for n, w in self.weights.items()}
        self.x, self.labels = (
            randn(96, 8, seed=20).to(device),
            torch.randint(4, (96,), generator=generator(21)).to(device),
        )
        self.autocast: Callable[[], Any] = contextlib.nullcontext

    def train(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        with self.autocast():
            scores = self.net(weights, batch[0])
        penalty = sum((h.exp() * w.square()).sum() for w, h in zip(weights.values(), hyper.values(), strict=True))
        return cross_entropy(scores, batch[1]) + penalty / 2

    def val(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        with self.autocast():
            scores = self.net(weights, batch[0])
        return cross_entropy(scores, batch[1])

    def arguments(self, rounded_to: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        """Weights, hyperparameters and batches, rounded to one dtype and held in another."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(rounded_to).to(dtype)

        weights, hyper = ({n: cast(t) for n, t in tree.items()} for tree in (self.weights, self.hyper))
        return weights, hyper, (cast(self.x[:64]), self.labels[:64]), (cast(self.x[64:]), self.labels[64:])

    def ours(self, arguments: tuple[Any, ...], solver: Any, engine: str = "eager") -> Any:
        return hvp.Hypergradient(self.train, self.val, solver=solver, engine=engine)(*arguments)

    def by_plain_torch(self, arguments: tuple[Any, ...], iterations: int, alpha: float) -> Tensor:
        """The hypergradient by a list loop in the precision of the weights."""
        weights, hyper, train_batch, val_batch = arguments
        weights, hyper = ({n: t.clone().requires_grad_() for n, t in tree.items()} for tree in (weights, hyper))
        w, h = list(weights.values()), list(hyper.values())
        v = torch.autograd.grad(self.val(weights, hyper, val_batch), w)
        f = torch.autograd.grad(self.train(weights, hyper, train_batch), w, create_graph=True)
        x = bench.plain(
            lambda t: list(torch.autograd.grad(f, w, t, retain_graph=True)), list(v), iterations, alpha, "accumulate"
        )
        return -flat(torch.autograd.grad(f, h, x)).cpu()


ITERATIONS, ALPHA = 30, 0.5


def of(result: Any) -> Tensor:
    return flat(list(result.grads.values())).cpu()


@pytest.mark.parametrize("form", bench.FORMS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_model_in_low_precision(device, dtype, form):
    digits = Digits(device)
    solver = hvp.Neumann(ITERATIONS, ALPHA, form=form)
    truth = of(digits.ours(digits.arguments(dtype, DTYPE), solver))
    result = digits.ours(digits.arguments(dtype, dtype), solver)
    assert all(g.dtype == dtype for g in result.grads.values())
    assert all(x.dtype == dtype for x in result.solution.value.values())
    error = relative_error(of(result), truth)
    plain = relative_error(digits.by_plain_torch(digits.arguments(dtype, dtype), ITERATIONS, ALPHA), truth)
    assert error <= 2 * plain
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_in_the_losses(device, dtype, engine):
    digits = Digits(device)
    solver = hvp.Neumann(ITERATIONS, ALPHA)
    truth = of(digits.ours(digits.arguments(torch.float32, DTYPE), solver))
    digits.autocast = lambda: torch.autocast(device.type, dtype=dtype)
    arguments = digits.arguments(torch.float32, torch.float32)
    result = digits.ours(arguments, solver, engine)
    assert all(g.dtype == torch.float32 for g in result.grads.values())
    error = relative_error(of(result), truth)
    plain = relative_error(digits.by_plain_torch(arguments, ITERATIONS, ALPHA), truth)
    assert 0.1 * torch.finfo(dtype).eps < error <= 2 * plain  # autocast does something, and no more than to plain torch
    assert not torch.is_autocast_enabled(device.type)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_traces_are_trusted_as_far_as_autocast_is_precise(device, dtype):
    """float32 weights, products in 16 bits: what the engines round differently is no impurity of the loss."""
    digits = Digits(device)
    digits.autocast = lambda: torch.autocast(device.type, dtype=dtype)
    arguments = digits.arguments(torch.float32, torch.float32)
    hg = hvp.Hypergradient(digits.train, digits.val, hvp.Neumann(ITERATIONS, ALPHA), engine="linearized")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is replaced by 'eager'")
        found = of(hg(*arguments))
    [functions] = hg.engine._cache.values()
    assert functions.distrust is None and functions.partition.dtypes == {torch.float32, dtype}
    assert (
        relative_error(found, of(digits.ours(arguments, hvp.Neumann(ITERATIONS, ALPHA)))) < 4 * torch.finfo(dtype).eps
    )


def test_a_hidden_number_under_autocast_is_found(device):
    digits = Digits(device)
    digits.autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    scale = ContextVar("scale", default=1.0)
    hg = hvp.Hypergradient(
        lambda w, h, b: scale.get() * digits.train(w, h, b),
        digits.val,
        hvp.Neumann(ITERATIONS, ALPHA),
        engine="linearized",
    )
    arguments = digits.arguments(torch.float32, torch.float32)
    hg(*arguments)
    scale.set(1.2)
    with pytest.warns(UserWarning, match="replaced by 'eager' for train_loss.*function of its arguments"):
        for _ in range(9):
            hg(*arguments)


def test_autocast_around_the_call_reaches_the_losses_alone(device):
    digits = Digits(device)
    arguments = digits.arguments(torch.float32, torch.float32)
    solver = hvp.Neumann(ITERATIONS, ALPHA)
    truth = of(digits.ours(digits.arguments(torch.float32, DTYPE), solver))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = digits.ours(arguments, solver)
        assert all(g.dtype == torch.float32 for g in result.grads.values())
        assert relative_error(of(result), truth) < 0.05
        value = hvp.solve(lambda v: 4.0 * v, torch.ones(2, device=device), hvp.Neumann(40, alpha=0.2)).value
        torch.testing.assert_close(value, torch.full((2,), 0.25, device=device))


# Loss scaling


def scaled(digits: Digits, train_scale: float, val_scale: float) -> hvp.Hypergradient:
    return hvp.Hypergradient(
        lambda *a: train_scale * digits.train(*a),
        lambda *a: val_scale * digits.val(*a),
        solver=hvp.Neumann(ITERATIONS),
        engine="eager",
    )


def test_a_scaled_training_loss_has_the_same_hypergradient(device):
    """H and the mixed derivative scale alike and alpha="auto" with them; a power of two leaves all roundings alike."""
    digits = Digits(device)
    arguments = digits.arguments(torch.float32, torch.float32)
    one, many = scaled(digits, 1.0, 1.0)(*arguments), scaled(digits, 1024.0, 1.0)(*arguments)
    assert relative_error(of(many), of(one)) < 1e-5
    assert many.solution.alpha == pytest.approx(one.solution.alpha / 1024, rel=1e-4)
    assert many.solution.residual_norm == pytest.approx(one.solution.residual_norm, rel=1e-3)


def test_a_scaled_validation_loss_scales_the_hypergradient(device):
    digits = Digits(device)
    arguments = digits.arguments(torch.float32, torch.float32)
    one, many = scaled(digits, 1.0, 1.0)(*arguments), scaled(digits, 1.0, 256.0)(*arguments)
    assert relative_error(of(many) / 256, of(one)) < 1e-5


def test_fixed_steps_damping_and_inverse_products_scale_as_documented(device):
    digits = Digits(device)
    arguments = digits.arguments(torch.float32, torch.float32)

    def run(scale: float) -> Tensor:
        solver = hvp.Neumann(ITERATIONS, ALPHA / scale, damping=0.3 * scale)
        train = lambda *a: scale * digits.train(*a)  # noqa: E731
        return of(hvp.Hypergradient(train, digits.val, solver=solver, engine="eager")(*arguments))

    assert relative_error(run(512.0), run(1.0)) < 1e-5

    w = randn(3, seed=1).float().to(device).requires_grad_()
    v = torch.ones(3, device=device)
    loss = (w**4).sum()
    (x,) = hvp.approx_inverse_hvp(v, loss, w, 20, 0.01)
    (y,) = hvp.approx_inverse_hvp(v, 64 * loss, w, 20, 0.01 / 64)
    torch.testing.assert_close(64 * y, x)


def test_scaling_saves_float16_products_from_underflow(device):
    """A mean over many outputs: its second derivatives are below the smallest float16 unless the loss is scaled."""
    x = torch.randn(64, 8, generator=generator(5)).to(device)
    w = torch.randn(8, generator=generator(6)).to(device)
    hyper = torch.tensor(1.0, device=device)

    def run(dtype: torch.dtype, scale: float) -> Tensor:
        small = x.to(dtype) * 1e-2

        def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
            return (
                scale * (((small @ w) ** 2) / 2 * h.to(dtype) + 1e-5 * h.to(dtype) * w.square().sum() / 64).sum() / 4096
            )

        def val(w: Tensor, h: Tensor, batch: Any) -> Tensor:
            return w.square().sum() / 2

        hg = hvp.Hypergradient(train, val, solver=hvp.Neumann(10), engine="eager")
        return hg(w.half().to(dtype), hyper.to(dtype), None, None).grads.double().cpu()

    truth = run(DTYPE, 1.0)
    assert abs(run(torch.float16, 4096.0) / truth - 1) < 0.02
    with pytest.raises(hvp.DivergenceError, match="float16 can hold.*loss scaling"):
        run(torch.float16, 1.0)


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        (1e-9, "got only zeros in .* products.*fixed alpha"),
        (1e-6, r"entries up to 65,504; got entries up to [\d.]+e\+"),
    ],
)
@pytest.mark.parametrize("style", ["solve", "approx_inverse_hvp", "Hypergradient"])
def test_what_float16_cannot_hold_is_an_error_and_not_nan(device, style, curvature, message):
    """Curvature that underflows to zero, or whose inverse overflows; nothing of the caller's changes."""
    w = torch.ones(5, device=device, dtype=torch.float16, requires_grad=True)
    h = torch.zeros((), device=device, dtype=torch.float16)
    before = [w.clone(), h.clone(), torch.get_rng_state()]

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (w * w * (curvature / 2)).sum() * (1 + h)

    def val(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return w.sum()

    def run(alpha: Any) -> list[Tensor]:
        if style == "solve":
            solved = hvp.solve(lambda v: v * torch.tensor(curvature).half(), torch.ones_like(w), hvp.Neumann(20, alpha))
            return [solved.value]
        if style == "approx_inverse_hvp":
            return list(hvp.approx_inverse_hvp(torch.ones_like(w), train(w, h, None), w, 20, alpha))
        return [hvp.Hypergradient(train, val, hvp.Neumann(20, alpha), engine="eager")(w, h, None, None).grads]

    with pytest.raises(hvp.DivergenceError, match=message) as error:
        run("auto")
    assert all(remedy in str(error.value) for remedy in ("loss scaling", "bfloat16", "fixed alpha"))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, [w, h, torch.get_rng_state()], strict=True))
    assert w.grad is None and w.requires_grad


# What float32 is


@pytest.fixture
def restored_settings() -> Iterator[None]:
    backends = [
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    ]
    kept = [backend.fp32_precision for backend in backends]
    yield
    for backend, setting in zip(backends, kept, strict=True):
        backend.fp32_precision = setting


def test_tf32_is_told(restored_settings):
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        backend.fp32_precision = "ieee"
    assert float32_arithmetic("cuda") == "full precision"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert float32_arithmetic("cuda").startswith("matrix products in tf32 (")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert float32_arithmetic("cuda").startswith("matrix products in tf32, convolutions in tf32 (")
    assert doctor.examine().float32["cuda"] == float32_arithmetic("cuda")
    assert float32_arithmetic("cpu") == "full precision"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert float32_arithmetic("cpu").startswith("matrix products in bf16 (")
    assert "matrix products in bf16" in str(doctor.examine())


def test_a_report_says_how_precise_float32_is():
    hypergradient = hvp.Hypergradient(lambda w, h, b: (w * h).sum(), lambda w, h, b: w.sum(), engine="eager")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"float32 products on {device}: {float32_arithmetic(device)}" in hypergradient.report()


@pytest.mark.parametrize(("setting", "tolerance"), [("ieee", 1e-3), ("tf32", 2e-2), ("bf16", 5e-2)])
def test_an_engine_may_differ_from_eager_by_what_float32_is_reduced_to(restored_settings, setting, tolerance):
    """Two evaluations of one product in TF32 differ by more than float32's rounding; that is no engine's fault."""
    torch.backends.mkldnn.conv.fp32_precision = setting
    theirs = [torch.ones(1000)]
    for factor, found in ((1 + 0.9 * tolerance, None), (1 + 1.2 * tolerance, pytest.approx(1.2 * tolerance, rel=1e-3))):
        assert self_check.difference([factor * theirs[0]], theirs, [torch.float32]) == found
    assert self_check.difference([1.0001 * theirs[0].double()], [theirs[0].double()], [torch.float64]) is not None


def test_the_tolerance_is_that_of_the_device(restored_settings):
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        backend.fp32_precision = "ieee"
    assert self_check._tolerance(torch.float32, "cuda") == self_check._tolerance(torch.float32, "cpu") == 1e-3
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert self_check._tolerance(torch.float32, "cuda") == 2e-2
    assert self_check._tolerance(torch.float64, "cuda") == 1e-9
    assert self_check._tolerance(torch.float32, "cpu") == 1e-3
