"""The cudagraph engine against eager, in float64: on a GPU with CUDA graphs, on a CPU with recorded calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from recorder_on_cpu import WAITS, CallRecorder, OutOfMemory
from torch import Tensor

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.recording import CaptureError, CudaRecorder, Recorder
from hvp_engine.solvers import Solver

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
Make = Callable[..., CudaGraphEngine]


@pytest.fixture
def make(device: torch.device) -> Iterator[Make]:
    recorder: type[Recorder] = CudaRecorder if device.type == "cuda" else CallRecorder
    with hvp.use_backend("auto" if device.type == "cuda" else "reference"):
        yield lambda **options: CudaGraphEngine(recorder=recorder, **options)


def train(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: Tensor) -> Tensor:
    residual = torch.tanh(batch @ weights["a"]) - weights["b"]
    return residual.square().mean() + (hyper["decay"].exp() * weights["a"].square()).sum() + weights["b"].square().sum()


def val(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ weights["a"]) - weights["b"] + hyper["shift"]).square().mean()


def point(device: torch.device, seed: int, rows: int = 6) -> tuple[Any, Any, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    weights = {"a": normal(3, 4, scale=0.3), "b": normal(4, scale=0.3)}
    hyper = {"decay": normal(3, 4, scale=0.2), "shift": normal(4, scale=0.1), "unused": normal(2)}
    return weights, hyper, normal(rows, 3), normal(5, 3)


def assert_same(ours: hvp.HypergradientResult, theirs: hvp.HypergradientResult) -> None:
    torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.solution.value, theirs.solution.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.gradient_norm, theirs.gradient_norm)
    assert float(ours.train_loss) == pytest.approx(float(theirs.train_loss))
    assert ours.solution.status == theirs.solution.status
    assert ours.solution.residual_norm == pytest.approx(theirs.solution.residual_norm, rel=1e-6, abs=1e-9)


def both(engine: CudaGraphEngine, solver: Any = None, losses: Any = (train, val)) -> tuple[Any, Any]:
    solver = hvp.Neumann(6) if solver is None else solver
    ours = hvp.Hypergradient(*losses, solver, engine=engine)
    theirs = hvp.Hypergradient(*losses, solver, engine="eager")
    theirs.draws.base = ours.draws.base
    return ours, theirs


SOLVERS = {
    "automatic": hvp.Neumann(6),
    "accumulate": hvp.Neumann(6, 0.1, form="accumulate", damping=0.1),
    "horner": hvp.Neumann(6, 0.1, damping=0.1),
    "identity": hvp.Identity(),
    "conjugate gradient": hvp.ConjugateGradient(6, tol=0.0),
    "chebyshev": hvp.Chebyshev(6),
    "minres": hvp.MINRES(6, tol=0.0),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_replays_with_new_values_are_as_eager(make: Make, device: torch.device, name: str) -> None:
    engine = make()
    ours, theirs = both(engine, SOLVERS[name])
    for call in range(3):
        arguments = point(device, call)
        assert_same(ours(*arguments), theirs(*arguments))
        if call == 1:
            recordings = engine.tally.recordings
    assert engine.tally.recordings == recordings  # nothing was recorded after the second call
    assert "term by term" not in engine.report() and "eager instead" not in engine.report()


def test_the_step_is_set_for_every_replay(make: Make, device: torch.device) -> None:
    ours, theirs = both(make())
    alphas = []
    for scale in (1.0, 3.0, 0.2):
        weights, hyper, train_batch, val_batch = point(device, 0)
        arguments = weights, hyper, scale * train_batch, val_batch
        result = ours(*arguments)
        assert_same(result, theirs(*arguments))
        alphas.append(result.solution.alpha)
    assert len(set(alphas)) == 3


def test_each_shape_is_recorded_once(make: Make, device: torch.device) -> None:
    engine = make()
    ours, theirs = both(engine)
    for call, rows in enumerate((6, 9, 6, 9, 6)):
        arguments = point(device, call, rows)
        assert_same(ours(*arguments), theirs(*arguments))
    assert engine.tally.buffers == 2
    assert "2 shapes recorded" in engine.report() and "2 kept (at most 8)" in engine.report()


def test_shapes_kept_are_bounded(make: Make, device: torch.device) -> None:
    engine = make(most_shapes=1)
    ours, theirs = both(engine)
    for call, rows in enumerate((6, 9, 6)):
        arguments = point(device, call, rows)
        assert_same(ours(*arguments), theirs(*arguments))
    assert engine.tally.buffers == 3
    assert "1 kept (at most 1)" in engine.report()
    with pytest.raises(ValueError, match="most_shapes: expected an int >= 1; got 0"):
        make(most_shapes=0)


def test_solvers_kept_are_bounded(make: Make, device: torch.device) -> None:
    engine = make()
    weights, hyper, batch, _ = point(device, 0)
    operator = hvp.HessianOperator(train, weights, hyper, batch, engine=engine)
    eager = hvp.HessianOperator(train, weights, hyper, batch, engine="eager")
    for iterations in (1, 2, 3, 4, 5, 1):
        solver = hvp.Neumann(iterations, 0.1)
        torch.testing.assert_close(operator.solve(weights, solver).value, eager.solve(weights, solver).value)
    before = engine.tally.recordings
    operator.solve(weights, hvp.Neumann(5, 0.1))
    assert engine.tally.recordings == before  # it was among the last four
    operator.solve(weights, hvp.Neumann(2, 0.1))
    assert engine.tally.recordings == before + 1


def test_two_objects_take_turns(make: Make, device: torch.device) -> None:
    pairs = [both(make(), hvp.Neumann(6)), both(make(), hvp.Neumann(3, 0.05))]
    for call in range(3):
        for ours, theirs in pairs:
            arguments = point(device, call)
            assert_same(ours(*arguments), theirs(*arguments))


def test_one_engine_for_two_operators_at_once(make: Make, device: torch.device) -> None:
    engine = make()
    points = [point(device, seed)[:3] for seed in range(2)]
    operators = [hvp.HessianOperator(train, *p, engine=engine) for p in points]
    eager = [hvp.HessianOperator(train, *p, engine="eager") for p in points]
    for _ in range(2):
        for (v, *_), ours, theirs in zip(points, operators, eager, strict=True):
            torch.testing.assert_close(ours @ v, theirs @ v)
            torch.testing.assert_close(ours.solve(v, hvp.Neumann(4)).value, theirs.solve(v, hvp.Neumann(4)).value)
    assert engine.tally.buffers == 2
    del operators, ours
    hvp.HessianOperator(train, *points[0], engine=engine)
    assert engine.tally.buffers == 2  # the buffers are free again


def test_results_are_not_overwritten(make: Make, device: torch.device) -> None:
    engine = make()
    ours, _ = both(engine, hvp.Neumann(6, 0.1, form="accumulate"))
    arguments = point(device, 0)
    kept = ours(*arguments)
    operator = hvp.HessianOperator(train, *arguments[:3], engine=engine)
    found = [kept.grads, kept.train_loss, kept.solution.value, operator @ arguments[0], operator.gradient]
    before = [torch.utils._pytree.tree_map(torch.clone, item) for item in found]
    for seed in range(1, 4):
        ours(*point(device, seed))
    operator.solve(arguments[0], hvp.Neumann(3, 0.1))
    torch.testing.assert_close(found, before, rtol=0, atol=0)


def test_the_callers_tensors_stay_as_they_were(make: Make, device: torch.device) -> None:
    ours, _ = both(make())
    arguments = point(device, 0)
    before = torch.utils._pytree.tree_map(torch.clone, arguments)
    generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    for _ in range(2):
        ours(*arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(generator, after)


def test_dropout_draws_anew_for_every_call(make: Make, device: torch.device) -> None:
    def dropped(weights: Any, hyper: Any, batch: Tensor) -> Tensor:
        return train(weights, hyper, torch.nn.functional.dropout(batch, 0.5))

    ours, theirs = both(make(), hvp.Neumann(6), (dropped, val))
    arguments = point(device, 0)
    results = []
    for _ in range(3):
        result = ours(*arguments)
        assert_same(result, theirs(*arguments))  # the same masks as eager, one for all terms
        results.append(float(result.train_loss))
    assert len(set(results)) == 3


def test_low_precision_weights(make: Make, device: torch.device) -> None:
    weights, hyper, train_batch, val_batch = point(device, 0)
    weights = {"a": weights["a"].bfloat16(), "b": weights["b"].float()}
    hyper = {name: tensor.float() for name, tensor in hyper.items()}

    def widened(loss: Any) -> Any:
        return lambda w, h, batch: loss({name: tensor.float() for name, tensor in w.items()}, h, batch)

    losses = widened(train), widened(val)
    ours, theirs = both(make(), hvp.Neumann(6, 0.1), losses)
    for _ in range(2):
        result = ours(weights, hyper, train_batch.float(), val_batch.float())
        expected = theirs(weights, hyper, train_batch.float(), val_batch.float())
        torch.testing.assert_close(result.grads, expected.grads, rtol=2e-2, atol=2e-3)
        assert result.solution.value["a"].dtype == torch.bfloat16


# Where something cannot be recorded


@torch.library.custom_op("hvp_tests::waiting_total", mutates_args=())
def waiting_total(batch: Tensor) -> Tensor:
    return batch.new_full((), batch.sum().item())


@waiting_total.register_fake
def _(batch: Tensor) -> Tensor:
    return batch.new_empty(())


WAITS.add(torch.ops.hvp_tests.waiting_total.default)


def test_a_loss_that_waits_is_left_to_eager(make: Make, device: torch.device) -> None:
    def waiting(weights: Any, hyper: Any, batch: Tensor) -> Tensor:
        return train(weights, hyper, batch) * (1 + waiting_total(batch).square())

    engine = make()
    ours, theirs = both(engine, hvp.Neumann(6), (waiting, val))
    for call in range(2):
        arguments = point(device, call)
        assert_same(ours(*arguments), theirs(*arguments))
    assert "eager instead: train_loss cannot be recorded: RuntimeError" in engine.report()
    assert engine.tally.buffers == 0
    assert_device_is_fine(device)
    ours, theirs = both(engine)
    assert_same(ours(*arguments), theirs(*arguments))
    assert engine.tally.buffers == 1


class Waiting(Solver):
    """Neumann that looks at the device for every term."""

    damping = 0.0
    estimates_spectrum = True  # type: ignore[assignment]

    def allocate(self, layout: Any) -> Any:
        iteration: Any = hvp.Neumann(6).allocate(layout)
        step = iteration.step

        def waiting(product: Any) -> None:
            assert not product[0].sum().isnan().item()
            step(product)

        iteration.step = waiting
        return iteration


def test_a_solver_that_waits_goes_term_by_term(make: Make, device: torch.device) -> None:
    engine = make()
    for solver in (Waiting(), hvp.Neumann(6), hvp.Exact()):
        ours, theirs = both(engine, solver)
        for call in range(2):
            arguments = point(device, call)
            assert_same(ours(*arguments), theirs(*arguments))
    assert "Waiting term by term: RuntimeError" in engine.report()
    assert "Neumann term by term" not in engine.report()
    assert_device_is_fine(device)


def test_an_error_in_the_middle_of_a_recording(make: Make, device: torch.device) -> None:
    weights, hyper, batch, _ = point(device, 0)
    recorder: Any = make()._recorder(device)
    bodies = iter([0, 0, 1])  # on a GPU the second run is a warm-up as well

    def body() -> list[Tensor]:
        product = weights["a"] @ weights["b"]
        if device.type == "cpu" or next(bodies):
            raise ArithmeticError("in the middle")
        return [product]

    with pytest.raises(CaptureError, match="ArithmeticError: in the middle"):
        recorder.record(body)
    assert_device_is_fine(device)
    recording = recorder.record(lambda: [weights["a"] @ weights["b"], torch.rand(3, device=device)])
    recording.replay()
    first = recording.outputs[1].clone()
    torch.testing.assert_close(recording.outputs[0], weights["a"] @ weights["b"])
    recording.replay()
    assert not torch.equal(recording.outputs[1], first)
    assert_device_is_fine(device)


def assert_device_is_fine(device: torch.device) -> None:
    if device.type == "cuda":
        assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        assert torch.cuda.get_sync_debug_mode() == 0
        assert not torch.cuda.is_current_stream_capturing()
    assert bool(torch.isfinite(torch.rand(100, device=device)).all())


def test_full_memory_while_buffers_are_made_is_left_to_eager(make: Make) -> None:
    """Whichever tensor does not fit: eager goes on, the report says why, and nothing of the attempt is kept."""
    weights, hyper, batch, _ = point(torch.device("cpu"), 0)
    eager = hvp.HessianOperator(train, weights, hyper, batch, engine="eager")
    expected = eager.solve(weights, hvp.Neumann(4, 0.1)).value
    places = set()
    for number in range(10_000):
        engine = make()
        make_graphs = engine._captured
        full = OutOfMemory(number)

        def made(*arguments: Any) -> Any:
            with full:  # noqa: B023
                return make_graphs(*arguments)  # noqa: B023

        engine._captured = made  # type: ignore[method-assign]
        operator = hvp.HessianOperator(train, weights, hyper, batch, engine=engine)
        torch.testing.assert_close(operator.solve(weights, hvp.Neumann(4, 0.1)).value, expected)
        if not full.failed:
            break
        places.add(full.failed)
        assert "eager instead: loss cannot be recorded: OutOfMemoryError: CUDA out of memory" in engine.report()
        assert "how to avoid it" not in engine.report() and engine._kept == []
    assert number >= 10 and {"aten.clone.default", "aten.empty_like.default", "aten.zeros.default"} <= places


def test_full_memory_in_a_solve_leaves_its_terms_one_by_one(make: Make) -> None:
    weights, hyper, batch, _ = point(torch.device("cpu"), 0)
    eager = hvp.HessianOperator(train, weights, hyper, batch, engine="eager")
    expected = eager.solve(weights, hvp.Neumann(4, 0.1)).value
    for number in range(1000):
        engine = make()
        operator = hvp.HessianOperator(train, weights, hyper, batch, engine=engine)
        graphs = engine._kept[0]
        make_solve, full = graphs.solve, OutOfMemory(number)

        def made(*arguments: Any) -> Any:
            with full:  # noqa: B023
                return make_solve(*arguments)  # noqa: B023

        graphs.solve = made  # type: ignore[method-assign]
        torch.testing.assert_close(operator.solve(weights, hvp.Neumann(4, 0.1)).value, expected)
        if not full.failed:
            break
        assert "Neumann term by term: OutOfMemoryError: CUDA out of memory" in engine.report()
        graphs.solve = make_solve  # type: ignore[method-assign]
        operator.solve(weights, hvp.Neumann(4, 0.1))
        assert "Neumann term by term" in engine.report()  # though it fits by now: what went before is told
    assert number >= 3


def test_what_is_not_trusted_keeps_no_buffers(make: Make, device: torch.device) -> None:
    scale = ContextVar("scale", default=1.0)

    def bound(weights: Any, hyper: Any, batch: Tensor) -> Tensor:
        return scale.get() * train(weights, hyper, batch)

    engine = make()
    ours, theirs = both(engine, hvp.Neumann(6, 0.1), (bound, val))
    with pytest.warns(UserWarning, match="is replaced by 'eager'"):
        for call in range(10):  # the tenth is compared with eager
            scale.set(1.0 if call < 9 else 2.0)
            result = ours(*point(device, call))
    assert_same(result, theirs(*point(device, 9)))
    assert engine._kept == []


def test_control_flow_is_left_to_eager(make: Make, device: torch.device) -> None:
    def branching(weights: Any, hyper: Any, batch: Tensor) -> Tensor:
        return train(weights, hyper, batch) * (2 if bool(batch.sum() > 0) else 1)

    engine = make()
    ours, theirs = both(engine, hvp.Neumann(6), (branching, val))
    for seed in range(3):
        arguments = point(device, seed)
        assert_same(ours(*arguments), theirs(*arguments))
    assert "eager instead: train_loss: expected a loss without control flow" in engine.report()


def test_a_preconditioner_goes_term_by_term(make: Make, device: torch.device) -> None:
    engine = make()
    weights, *_ = arguments = point(device, 0)
    diagonal = hvp.DiagonalPreconditioner([torch.full_like(w, 2.0) for w in weights.values()])
    ours, theirs = both(engine, hvp.ConjugateGradient(6, preconditioner=diagonal))
    assert_same(ours(*arguments), theirs(*arguments))
    assert "ConjugateGradient term by term: its preconditioner is the caller's code" in engine.report()


class Baked(Solver):
    """Neumann whose recording would keep the step of its first solve: `adapt` sets a Python number."""

    damping = 0.0
    estimates_spectrum = True  # type: ignore[assignment]

    def allocate(self, layout: Any) -> Any:
        iteration: Any = hvp.Neumann(6).allocate(layout)
        adapt, start = iteration.adapt, iteration.start

        def bake(estimate: Any) -> None:
            adapt(estimate)
            iteration.baked = iteration.alpha

        def begin(v: Any) -> None:
            start(v)
            iteration._alpha.fill_(iteration.baked)

        iteration.adapt, iteration.start = bake, begin
        return iteration


def test_a_solver_with_a_baked_in_number_is_found_out(make: Make, device: torch.device) -> None:
    engine = make()
    ours, _ = both(engine, Baked())
    weights, hyper, train_batch, val_batch = point(device, 0)
    with pytest.warns(UserWarning, match="Baked goes term by term from now on: its graph gives a result that differs"):
        for scale in (1.0, 1.5):
            arguments = weights, hyper, scale * train_batch, val_batch
            result = ours(*arguments)
    assert result.solution.alpha is not None
    _, theirs = both(engine, hvp.Neumann(6, result.solution.alpha))
    torch.testing.assert_close(result.grads, theirs(*arguments).grads, rtol=1e-9, atol=1e-12)
    assert "Baked term by term: its graph gives a result" in engine.report()


def test_without_a_gpu_it_is_eager_and_says_so() -> None:
    arguments = point(torch.device("cpu"), 0)
    ours, theirs = both(CudaGraphEngine())
    assert_same(ours(*arguments), theirs(*arguments))
    assert "eager instead: CUDA graphs need a CUDA device; got cpu" in ours.report()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inputs_on_another_device_are_left_to_eager() -> None:
    weights, hyper, train_batch, val_batch = point(torch.device("cuda"), 0)
    hyper["decay"] = torch.tensor(0.1, dtype=torch.float64)
    engine = engines.create("cudagraph")
    with contextlib.suppress(RuntimeError):  # eager itself may not take it
        hvp.Hypergradient(train, val, engine=engine)(weights, hyper, train_batch, val_batch)
    assert "weights on cuda:0 and inputs on cpu" in engine.report()
