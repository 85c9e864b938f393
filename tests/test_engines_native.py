"""The engine `linearized` on native programs: the numbers of eager, in use where it is said, never silently wrong."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, NETWORKS, flat, randn, relative_error
from threads_at_once import at_once
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from bench.problems import build
from hvp_engine import _C
from hvp_engine._support.pytree import flatten
from hvp_engine._support.torch_compat import loaded_library
from hvp_engine.differentiation.native import extension
from hvp_engine.differentiation.native import program as native_program
from hvp_engine.differentiation.native.operations import UnsupportedError
from hvp_engine.differentiation.native.program import NativeProgram
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines import EagerEngine, create
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine
from hvp_engine.solvers.base import Solver

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")

FOREIGN = {"channels_last conv", "batchnorm, training"}
"""Networks with operators that native programs lack."""

SOLVERS: dict[str, Solver] = {
    "horner": hvp.Neumann(7, alpha=0.02),
    "horner, damped": hvp.Neumann(7, alpha=0.02, damping=0.3),
    "accumulate": hvp.Neumann(7, alpha=0.02, form="accumulate"),
    "accumulate, damped": hvp.Neumann(7, alpha=0.02, form="accumulate", damping=0.3),
    "one term": hvp.Neumann(1, alpha=0.02),
    "no term": hvp.Neumann(0, alpha=0.02),
    "chebyshev": hvp.Chebyshev(7, bounds=(0.1, 40.0)),
    "chebyshev, damped": hvp.Chebyshev(7, bounds=(0.1, 40.0), damping=0.3),
    "heavy ball": hvp.Chebyshev(7, bounds=(0.1, 40.0), form="heavy_ball"),
    "cg": hvp.ConjugateGradient(6, damping=5.0),
    "minres": hvp.MINRES(6, damping=5.0),
}


def problem_of(name: str, decay: str = "for each weight") -> Problem:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    weights = {key: parameter.detach() for key, parameter in network.module.named_parameters()}
    hyper = {
        "none": {"h": torch.zeros((), dtype=DTYPE)},
        "one": {"h": torch.tensor(-1.0, dtype=DTYPE)},
        "for each weight": {key: randn(*w.shape, seed=i) / 3 for i, (key, w) in enumerate(weights.items())},
    }[decay]

    def loss(w: dict[str, Tensor], h: dict[str, Tensor]) -> Tensor:
        value = network.loss_of(net(w, network.x))
        if decay == "none":
            return value + 0 * h["h"]
        return value + sum((h.get(key, h.get("h")).exp() * weight.square()).sum() for key, weight in w.items())  # type: ignore[union-attr]

    return problem_at(loss, weights, hyper)


def problem_at(loss: Callable[..., Tensor], weights: Any, hyper: Any, *inputs: Any) -> Problem:
    leaves, structure = flatten(weights, "weights")
    values, hyper_structure = flatten(hyper, "hyper")
    return Problem(loss, [t.detach() for t in leaves], structure, [t.detach() for t in values], hyper_structure, inputs)


def native(problem: Problem) -> tuple[LinearizedEngine, TracedLinearization, NativeProgram]:
    """The engine, its linearization, and the program that makes products there."""
    engine = LinearizedEngine()
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization), linearization.fallback
    programs = linearization.functions.native
    assert programs is not None and programs.program is not None, programs
    return engine, linearization, programs.program


@pytest.mark.parametrize("decay", ["none", "one", "for each weight"])
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - FOREIGN))
def test_every_solver_as_eager(name: str, decay: str) -> None:
    problem = problem_of(name, decay)
    engine, linearization, _ = native(problem)
    eager = EagerEngine().linearize(problem)
    v = [randn(*weight.shape, seed=50 + i) for i, weight in enumerate(problem.weights)]
    assert relative_error(flat(linearization.product(v)), flat(eager.product(v))) < 1e-12
    for key, solver in SOLVERS.items():
        ours, theirs = engine.run(linearization, v, solver, None), EagerEngine().run(eager, v, solver, None)
        first, second = ours.outcome(), theirs.outcome()
        assert relative_error(ours.value.data, theirs.value.data) < 1e-10, key
        assert first.residual_norm == pytest.approx(second.residual_norm, rel=1e-8), key
        assert (first.status, first.finite, ours.steps) == (second.status, second.finite, theirs.steps), key


@pytest.mark.parametrize("name", ["logistic", "mlp", "mlp-one-decay", "lenet", "lstm", "looped-lstm", "transformer"])
def test_measured_problems_in_float32(name: str) -> None:
    """As accurate as eager, against float64, at one of two points at least: at the kink of a ReLU, rounding decides."""
    errors: list[tuple[float, float]] = []
    for scale in (1.0, 1.001):
        errors.append(_errors_in_float32(name, scale))
        if errors[-1][0] <= 2 * errors[-1][1] + 1e-7:
            return
    raise AssertionError(errors)


def _errors_in_float32(name: str, scale: float) -> tuple[float, float]:
    """Of the native engine and of eager, with all weights times `scale`."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        problem = build(name, dtype=dtype)
        weights = {key: (weight.detach() * scale).requires_grad_() for key, weight in problem.weights.items()}
        at = problem_at(problem.train_loss, weights, problem.hyper, problem.train)
        solver = hvp.Neumann(4, alpha=problem.alpha)
        if dtype == torch.float32:
            engine, linearization, _ = native(at)
            found["native"] = flat(engine.run(linearization, problem.vector, solver, None).value.views)
        eager = EagerEngine()
        found[str(dtype)] = flat(eager.run(eager.linearize(at), problem.vector, solver, None).value.views)
    truth = found["torch.float64"]
    return relative_error(found["native"], truth), relative_error(found["torch.float32"], truth)


def test_hypergradients_by_name() -> None:
    network = NETWORKS["mlp"]()
    net, results = hvp.functional(network.module), {}
    weights = dict(network.module.named_parameters())
    hyper = {key: torch.full_like(w, -1.0, requires_grad=True) for key, w in weights.items()}

    def val(w: Any, h: Any, _: Any) -> Tensor:
        return network.loss_of(net(w, network.x.flip(1)))

    def train(w: Any, h: Any, _: Any) -> Tensor:
        return network.loss_of(net(w, network.x)) + sum((h[k].exp() * w[k].square()).sum() for k in w)

    for name in ("eager", "linearized"):
        hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(9, alpha=0.05), engine=name)
        results[name] = hypergradient(weights, hyper, None, None)
    assert "products and terms by the extension" in hypergradient.report()
    mine, theirs = (flat(list(results[name].grads.values())) for name in ("linearized", "eager"))
    assert relative_error(mine, theirs) < 1e-12


class Swapped(torch.autograd.Function):
    """a b, whose gradient shows the other factor as it is, where nothing is made of the value."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.dot(b)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b.view_as(b), a.view_as(a)


@pytest.mark.parametrize("form", ["horner", "accumulate"])
def test_products_that_are_tangents_of_other_weights(form: Any) -> None:
    """An update in place of the one weight must not change what is a summand for the other."""
    weights, v = ([randn(5, seed=seed + part) for part in (0, 1)] for seed in (3, 7))
    solver, found = hvp.Neumann(4, alpha=0.1, form=form), {}
    for name in ("eager", "linearized"):
        engine = create(name)
        operator = hvp.HessianOperator(lambda w: Swapped.apply(*w), weights, engine=engine)
        found[name] = flat(operator.solve(v, solver).value)
    assert "products and terms by the extension" in engine.report()
    assert relative_error(found["linearized"], found["eager"]) < 1e-12


@pytest.mark.parametrize(
    ("shape", "groups", "reason"),
    [((4, 2, 3, 3), 2, "a convolution with groups"), ((32, 32, 3, 3), 1, "convolutions that are as fast")],
)
def test_what_the_extension_lacks_is_said(shape: tuple[int, ...], groups: int, reason: str) -> None:
    x = randn(3, shape[1] * groups, 6, 6, seed=0)
    engine = LinearizedEngine()

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return F.conv2d(x, w, groups=groups).tanh().sum() * h.exp()

    problem = problem_at(loss, randn(*shape, seed=1), torch.tensor(0.1, dtype=DTYPE))
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization)
    assert f"by PyTorch's operators, since the extension lacks: {reason}" in engine.report()


def test_without_blas_the_operators_of_pytorch_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "PROBLEM", "no symbol sgemm_")
    engine, problem = LinearizedEngine(), problem_of("mlp")
    linearization = engine.linearize(problem)
    v = [torch.randn_like(w) for w in problem.weights]
    compare = EagerEngine().linearize(problem).product(v)
    assert relative_error(flat(linearization.product(v)), flat(compare)) < 1e-12
    assert "no symbol sgemm_" in engine.report()


def test_blas_is_looked_for_where_it_is_said() -> None:
    assert extension.PROBLEM == "" == _C.blas_problem()
    try:
        _C.find_blas("/nowhere/libnone.so")
        assert _C.blas_problem() == "/nowhere/libnone.so is not loaded"
    finally:
        _C.find_blas(loaded_library("torch_cpu"))
    assert _C.blas_problem() == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_left_to_pytorch(dtype: torch.dtype) -> None:
    problem = problem_at(lambda w, h: (w.square() * h).sum(), torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype))
    engine = LinearizedEngine()
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization)
    linearization.product([torch.ones(3, dtype=dtype)])
    assert f"tensors of {dtype}" in engine.report()


def test_new_values_need_no_new_program() -> None:
    problem = problem_of("mlp")
    engine, first, program = native(problem)
    other = Problem(
        problem.loss, [-w for w in problem.weights], problem.weight_structure, [h + 1 for h in problem.hyperparameters],
        problem.hyperparameter_structure, problem.inputs,
    )  # fmt: skip
    second = engine.linearize(other)
    v = [torch.randn_like(w) for w in problem.weights]
    for at, linearization in ((problem, first), (other, second), (problem, first)):
        expected = EagerEngine().linearize(at).product(v)
        assert relative_error(flat(linearization.product(v)), flat(expected)) < 1e-12
    assert (
        isinstance(second, TracedLinearization)
        and second.functions.native is not None
        and second.functions.native.program is program
    )


def test_tangents_of_any_strides_and_products_in_new_memory() -> None:
    problem = problem_of("mlp")
    _, linearization, _ = native(problem)
    v = [torch.randn(w.shape[::-1], dtype=DTYPE).t() if w.dim() == 2 else torch.randn((), dtype=DTYPE).expand(w.shape)
         for w in problem.weights]  # fmt: skip
    expected = EagerEngine().linearize(problem).product(v)
    first = linearization.product(v)
    kept = flat(first)
    second = linearization.product([2 * t for t in v])
    assert relative_error(kept, flat(expected)) < 1e-12
    assert torch.equal(kept, flat(first)) and relative_error(flat(second), 2 * kept) < 1e-12


def test_residuals_of_any_strides() -> None:
    """Those of another point may be laid out otherwise than those that the program was made with."""
    problem = problem_of("looped rnn")
    _, linearization, program = native(problem)
    v = [torch.randn_like(w) for w in problem.weights]
    expected = flat(linearization.product(v))
    turned = [r.movedim(0, -1).contiguous().movedim(-1, 0) if r.dim() > 1 else r for r in linearization._residuals]
    assert any(a.stride() != b.stride() for a, b in zip(turned, linearization._residuals, strict=True))
    for residuals in (turned, [torch.stack([r, r], -1)[..., 0] for r in turned]):
        assert relative_error(flat(program.bind(residuals).product(v, linearization.layout)), expected) < 1e-13


@pytest.mark.parametrize("layout", ["transposed", "every second", "channels last"])
def test_weights_of_any_strides(layout: str) -> None:
    dense = randn(4, 6, seed=1)
    w = {
        "transposed": dense.t().contiguous().t(),
        "every second": torch.stack([dense, dense], -1)[..., 0],
        "channels last": dense.view(2, 2, 2, 3).contiguous(memory_format=torch.channels_last),
    }[layout]
    x = randn(5, 6, seed=2)
    problem = problem_at(
        lambda w, h: torch.tanh(x @ w.reshape(4, 6).t()).square().sum() + (h * w.square()).sum(),
        w,
        randn(*w.shape, seed=3),
    )
    engine, linearization, _ = native(problem)
    v = [randn(*w.shape, seed=4)]
    for solver in SOLVERS.values():
        theirs = EagerEngine().run(EagerEngine().linearize(problem), v, solver, None)
        ours = engine.run(linearization, v, solver, None)
        assert relative_error(flat(ours.value.views), flat(theirs.value.views)) < 1e-11


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_many_decays(count: int) -> None:
    x = randn(3, 6, seed=1)

    def loss(w: Tensor, h: list[Tensor]) -> Tensor:
        return torch.tanh(x @ w.t()).square().sum() + sum((e.exp() * w.square()).sum() for e in h)  # type: ignore[return-value]

    hyper = [randn(*((4, 6), (4, 1), (6,), (1,))[i % 4], seed=i) / 9 for i in range(count)]
    problem = problem_at(loss, randn(4, 6, seed=2), hyper)
    engine, linearization, _ = native(problem)
    v = [randn(4, 6, seed=4)]
    for solver in SOLVERS.values():
        theirs = EagerEngine().run(EagerEngine().linearize(problem), v, solver, None)
        assert relative_error(engine.run(linearization, v, solver, None).value.data, theirs.value.data) < 1e-11


def test_a_fault_of_ours_leaves_the_operators_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("planned")

    monkeypatch.setattr(native_program, "plan", broken)
    monkeypatch.setattr("hvp_engine.differentiation.trace.rewriting.Attempts.record", lambda *arguments: None)
    engine, problem = LinearizedEngine(), problem_of("mlp")
    v = [torch.randn_like(w) for w in problem.weights]
    compare = EagerEngine().linearize(problem).product(v)
    assert relative_error(flat(engine.linearize(problem).product(v)), flat(compare)) < 1e-12
    assert "making a native program failed: RuntimeError: planned" in engine.report()


def test_tangents_of_another_shape_are_refused() -> None:
    problem = problem_of("mlp")
    _, linearization, _ = native(problem)
    with pytest.raises(Exception, match="expected a tensor of shape"):
        linearization.product([torch.zeros(2, dtype=DTYPE) for _ in problem.weights])


def test_memory_that_was_freed_or_moved_is_not_read_where_it_was() -> None:
    slots = _C.Slots(True, [(0, (3,), (1,)), (0, (3,), (1,))])
    memory, copy = _C.Memory(slots), _C.Program(slots, 0, [], [0, 1, 3, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1])
    source, result = torch.ones(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    assert memory.put(0, [source, result]) == -1
    source.set_(torch.full((3,), 7.0, dtype=DTYPE))
    copy.run(memory, [[]])
    assert result.tolist() == [7.0, 7.0, 7.0]
    source.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        copy.run(memory, [[]])


def test_divergence_is_noticed() -> None:
    problem = problem_of("mlp")
    engine, linearization, _ = native(problem)
    v = [torch.randn_like(w) for w in problem.weights]
    diverged = engine.run(linearization, v, hvp.Neumann(400, alpha=50.0), None).outcome()
    assert diverged.failed


def test_threads_share_one_linearization() -> None:
    problem = problem_of("lstm")
    engine, linearization, _ = native(problem)
    vs = [[torch.randn_like(w) for w in problem.weights] for _ in range(4)]
    solver = hvp.Neumann(5, alpha=0.01)
    expected = [engine.run(linearization, v, solver, None).value.data for v in vs]
    start = threading.Barrier(len(vs))

    def work(index: int) -> bool:
        start.wait()
        found = [engine.run(linearization, vs[index], solver, None).value.data.clone() for _ in range(30)]
        return all(torch.equal(one, expected[index]) for one in found)

    assert at_once(*(partial(work, index) for index in range(len(vs)))) == [True] * len(vs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_torch_threads(threads: int) -> None:
    """Large enough that operations are shared."""
    problem = problem_at(
        lambda w, h, x: (torch.tanh(x @ w["a"].t() + w["b"]) @ w["c"]).square().sum() + (h * w["a"].square()).sum(),
        {"a": torch.randn(600, 700) / 30, "b": torch.randn(600), "c": torch.randn(600, 600) / 30},
        torch.rand(600, 700), torch.randn(500, 700),
    )  # fmt: skip
    engine, linearization, _ = native(problem)
    v = [torch.randn_like(w) for w in problem.weights]
    before = torch.get_num_threads()
    solver = hvp.Neumann(3, alpha=1e-6)
    expected = EagerEngine().run(EagerEngine().linearize(problem), v, solver, None).value.data
    torch.set_num_threads(threads)
    try:
        found = engine.run(linearization, v, solver, None).value.data
    finally:
        torch.set_num_threads(before)
    assert relative_error(found, expected) < 1e-5


def test_a_long_solve_can_be_interrupted() -> None:
    problem = problem_of("lstm")
    engine, linearization, _ = native(problem)
    v = [torch.randn_like(w) for w in problem.weights]
    done = threading.Event()

    def interrupt() -> None:
        wait = 0.3
        while not done.wait(wait):  # again, since Python drops what is raised in a weak reference's callback
            os.kill(os.getpid(), signal.SIGINT)
            wait = 10.0  # in which the first one has been caught

    def handler(*_: Any) -> None:
        if not done.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)  # a program in the background ignores it
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            engine.run(linearization, v, hvp.Neumann(1_000_000, alpha=1e-9), None)
        done.set()
        thread.join()
    finally:
        done.set()
        signal.signal(signal.SIGINT, before)


def test_programs_that_leave_their_memory_are_refused() -> None:
    slots = _C.Slots(True, [(0, (3,), (1,)), (1, (2,), (1,)), (2, (5,), (1,))])
    copy = [0, 1, 3, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1]  # an elementwise operation that copies slot 0 onto itself
    _C.Program(slots, 0, [], copy)
    whole = [1, 0, 0]  # a matrix is there, in slot 0, from its first element on
    recurrence = [4, 3, 1, 0, 1, 1, *whole, *whole, 0, *whole, *whole, *whole, *whole, *whole]  # a GRU of one unit
    line = [5, 0, 1, 1, 1, 1, 3, 1, 2, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]  # 3 pixels, and a kernel of two
    _C.Program(slots, 0, [], line)
    wrong = {
        "a kernel is larger than images": [*line[:8], 4, *line[9:]],
        "a convolution is too large": [*line[:5], *[1 << 20] * 4, *line[9:]],
        "stride: expected": [*line[:10], 0, *line[11:]],
        "slot 0 is too small for a matrix in it": [*line[:2], 2, *line[3:]],
        "pairs: expected": [*line[:15], 0, *line[16:]],
        "ends in the middle": copy[:-1],
        "element 3 is asked for": [*copy[:5], 1, *copy[6:]],
        "another type of element": [*copy[:4], 1, *copy[5:]],
        "slot: expected": [*copy[:4], 3, *copy[5:]],
        "kind: expected": [6],
        "extents: expected": [0, 7],
        "register": [0, 0, 0, 1, 0, 0, 3, 4],
        "constant: expected": [0, 0, 0, 1, 7, 0, 0],
        "batch sizes grow": [4, 3, 1, 0, 2, 1, 2],
        "too small for a matrix": [*recurrence[:-2], 0, 0],
        "presence: expected": [*recurrence[:6], 0],
    }
    for message, words in wrong.items():
        with pytest.raises(ValueError, match=message):
            _C.Program(slots, 0, [], words)


def test_tensors_that_do_not_fit_their_slot_are_refused() -> None:
    slots = _C.Slots(True, [(0, (2, 3), (3, 1)), (1, (2,), (1,))])
    memory, program = _C.Memory(slots), _C.Program(slots, 0, [], [0, 1, 6, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="missing"):
        program.run(memory, [[]])
    fits = torch.ones(2, 3, dtype=DTYPE)
    wrong: list[Any] = [fits.float(), fits.t().contiguous().t(), fits[:1], fits.to("meta"), "text", None]
    assert [memory.put(0, [one]) for one in wrong] == [0] * len(wrong)
    assert memory.put(0, [fits, torch.zeros(2)]) == 1 and memory.put(0, [fits]) == -1
    program.run(memory, [[], []])
    with pytest.raises(ValueError, match="expected 0 numbers"):
        program.run(memory, [[1.0]])
    with pytest.raises(IndexError):
        memory.put(1, [fits, fits])
    with pytest.raises(ValueError, match="slots"):
        program.run(_C.Memory(_C.Slots(True, [])), [[]])


def test_indices_out_of_range_are_reported() -> None:
    slots = _C.Slots(False, [(0, (3, 2), (2, 1)), (1, (2,), (1,)), (0, (2, 2), (2, 1))])
    words = [3, 0, 1, 2, 2, 3, -(1 << 63), 1, 0, 1, 0, 0, 6, 2, 1, 0, 2, 0, 4, 2, 1]
    program, memory = _C.Program(slots, 0, [], words), _C.Memory(slots)
    rows = torch.arange(6.0).view(3, 2)
    assert memory.put(0, [rows, torch.tensor([2, 0]), torch.zeros(2, 2)]) == -1
    program.run(memory, [[]])
    for bad in (3, -1):
        memory.put(1, [torch.tensor([0, bad])])
        with pytest.raises(IndexError, match="out of the range"):
            program.run(memory, [[]])


def test_nodes_that_are_no_operators_are_unsupported() -> None:
    module = nn.Linear(2, 2).to(DTYPE)
    problem = problem_at(
        lambda w, h: hvp.functional(module)(w, torch.ones(3, 2, dtype=DTYPE)).sinc().sum() * h,
        dict(module.named_parameters()), torch.ones((), dtype=DTYPE),
    )  # fmt: skip
    engine = LinearizedEngine()
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization)
    try:
        NativeProgram(linearization.functions.partition, linearization._residuals)
    except UnsupportedError as error:
        assert "operator" in str(error) and str(error) in engine.report()
