"""One fused op at a time: arguments, and the result by straightforward mathematics in extended precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hvp_engine._support.flat_vector import CHUNK, FlatVector, Layout
from hvp_engine.ops import OPS, bind
from hvp_engine.ops.backend import BACKENDS, why_not

TARGETS = [pytest.param(("cpu", name), id=f"cpu-{name}") for name in BACKENDS if why_not(name, "cpu") is None]
if torch.cuda.is_available():
    TARGETS += [
        pytest.param(("cuda", name), id=f"cuda-{name}", marks=pytest.mark.gpu) for name in BACKENDS if name != "cpp"
    ]
THREADED = [target for target in TARGETS if target.values[0] in (("cpu", "reference"), ("cpu", "cpp"))]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {
    "f32": (F32, [F32]),
    "f32-bf16": (F32, [BF16]),
    "f32-f16": (F32, [F16]),
    "f32-mixed": (F32, [F32, BF16, F16]),
    "f64": (F64, [F64]),
    "f64-f32": (F64, [F32]),
    "f64-bf16": (F64, [BF16]),
    "f64-f16": (F64, [F16]),
    "f64-mixed": (F64, [F64, F32, F16, BF16]),
}
SIZES = {
    **{str(size): [(size,)] for size in (0, 1, 127, 1024, 1025, 100_003)},
    "all": [(1025,), (), (0, 3), (127,), (33, 32), (1,), (100_003,), (2, 0), (CHUNK,), (2 * CHUNK,), ()],
    "200": [(), (5,), (2, 3, 4), (16,)] * 50,
    "none": [],
}


# --- the mathematics, on anything with arithmetic: numpy's extended precision, or plain torch ----------------------


def neumann_step(states: list, product, alpha, damping) -> tuple:
    v, p = states
    v = v - alpha * (product + damping * v)
    p = p + v
    return (v, p), (v * v, p * p)


def neumann_step_horner(states: list, product, alpha, damping) -> tuple:
    p, v = states
    increment = v - alpha * (product + damping * p)
    return (p + increment, v), (increment * increment, (p + increment) * (p + increment))


def scale_accumulate(states: list, product, alpha, beta) -> tuple:
    (p,) = states
    p = alpha * product + beta * p
    return (p,), (product * product, p * p)


def cg_step(states: list, product, step, damping) -> tuple:
    x, r, d = states
    curved = product + damping * d
    x, r = x + step * d, r - step * curved
    return (x, r, d), (r * r, d * curved)


def chebyshev_step(states: list, product, alpha, beta, damping) -> tuple:
    x, r, d = states
    r = r - (product + damping * d)
    d = beta * d + alpha * r
    x = x + d
    return (x, r, d), (r * r, x * x)


MATHEMATICS: dict[str, Callable] = {
    "neumann_step": neumann_step,
    "neumann_step_horner": neumann_step_horner,
    "scale_accumulate": scale_accumulate,
    "cg_step": cg_step,
    "chebyshev_step": chebyshev_step,
}


def extended(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().resolve_neg().numpy().astype(np.longdouble)


@dataclass
class Case:
    """Arguments of one op, made from example weights, with random state."""

    name: str
    layout: Layout
    states: list[FlatVector]
    scalars: list[Tensor]
    damping: float
    partials: Tensor

    @classmethod
    def of(
        cls, name: str, weights: Sequence[Tensor], state: torch.dtype, alpha: float = 0.1, second: float = 0.3
    ) -> Case:
        """`second` is the damping, and beta for an op that has one. rho, which is a squared norm, is alpha for each
        element."""
        op = OPS[name]
        device = weights[0].device if weights else torch.device("cpu")
        layout = Layout.of(weights)
        states = []
        for _ in op.states:
            vector = FlatVector(layout, torch.zeros(layout.size, dtype=state, device=device))
            vector.copy_([torch.randn(shape, device=device, dtype=F64) for shape in layout.shapes])
            states.append(vector)
        first = alpha * max(1, sum(layout.numels)) if op.scalars == ("rho",) else alpha
        values = [first, second][: len(op.scalars)]
        return cls(
            name,
            layout,
            states,
            [torch.tensor(value, dtype=F64, device=device) for value in values],
            second if op.damped else 0.0,
            layout.empty_partials().fill_(float("nan")),
        )

    def bind(self) -> Callable[[Sequence[Tensor]], None]:
        return bind(self.name, [s.data for s in self.states], self.layout, self.scalars, self.damping, self.partials)

    def numbers(self) -> list[float]:
        """The op's scalars and its damping, as the state's dtype rounds them."""
        state = self.states[0].data.dtype
        values = [scalar.item() for scalar in self.scalars]
        values += [self.damping] if OPS[self.name].damped else []
        return [torch.tensor(value, dtype=F64).to(state).item() for value in values]

    def expected(self, products: Sequence[Tensor], number: Callable[[Tensor], object]) -> list[tuple]:
        """For each tensor: (new states, the summands of the two sums recorded), as `number` computes."""
        values = [number(torch.tensor(value, dtype=self.states[0].data.dtype)) for value in self.numbers()]
        if self.name == "cg_step":
            summands = [
                cg_step([number(s.views[i]) for s in self.states], number(product), 0, values[1])[1][1]
                for i, product in enumerate(products)
            ]
            curvature = sum(float(part.sum()) for part in summands)
            values[0] = values[0] / curvature if curvature > 0 else 0 * values[0]
        return [
            MATHEMATICS[self.name]([number(s.views[i]) for s in self.states], number(product), *values)
            for i, product in enumerate(products)
        ]

    def run_and_check(self, products: Sequence[Tensor], step: Callable | None = None) -> None:
        """Run the op once and compare states, partials and gaps with the mathematics."""
        state = self.states[0].data.dtype
        before = [[extended(view) for view in vector.views] for vector in self.states]
        exact = self.expected(products, extended)
        sums = [[recorded[column] for _, recorded in exact] for column in range(2)]
        totals = [sum(float(part.sum()) for part in parts) for parts in sums]
        sizes = [sum(float(np.abs(part).sum()) for part in parts) for parts in sums]
        # cg_step divides by its second sum, in float64 and in any order: as many roundings as terms cancel.
        doubt = torch.finfo(F64).eps * sizes[1] / abs(totals[1]) if self.name == "cg_step" and totals[1] else 0.0
        plain = self.expected(products, lambda t: t.detach().clone().cpu().to(state))
        (step or self.bind())(products)
        for i, (oracle, ordinary) in enumerate(zip(exact, plain, strict=True)):
            for j, vector in enumerate(self.states):
                if vector.views[i].numel():
                    scale = max(1.0, float(np.abs(oracle[0][j]).max()))
                    error = np.abs(extended(vector.views[i]) - oracle[0][j]).max()
                    usual = np.abs(extended(ordinary[0][j]) - oracle[0][j]).max()
                    moved = np.abs(oracle[0][j] - before[j][i]).max()
                    assert error <= 2 * max(usual, torch.finfo(state).eps * scale) + doubt * moved, (i, j, error, usual)
        *found, flag = self.partials.sum(0).tolist()
        for column in range(2):
            tolerance = sizes[column] * (1e-5 if state == F32 else 1e-13)
            assert found[column] == pytest.approx(totals[column], abs=tolerance), column
        assert flag == 0
        for vector in self.states:
            gaps = vector.data.clone()
            for view in self.layout.views(gaps):
                view.zero_()
            assert not gaps.any(), "the gaps between tensors must stay zero"


def products_like(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]


def arguments_of(case: Case, products: list[Tensor]) -> dict[str, object]:
    """The arguments of the registered op, by name and in order."""
    op = OPS[case.name]
    damping = {"damping": case.damping} if op.damped else {}
    return {
        **dict(zip(op.states, (vector.data for vector in case.states), strict=True)),
        op.product: products,
        **dict(zip(op.scalars, case.scalars, strict=True)),
        **damping,
        "partials": case.partials,
    }


def registered(name: str) -> Callable:
    return getattr(torch.ops.hvp_engine, name)
