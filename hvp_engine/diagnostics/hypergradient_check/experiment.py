"""The measurements of one check: hypergradients, curvature, and differences of re-solved inner problems."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.isolation import isolated
from hvp_engine._support.pytree import check_like, flatten
from hvp_engine.diagnostics.hypergradient_check.local_derivatives import random_direction, shifted
from hvp_engine.diagnostics.hypergradient_check.refitting import Pair, flat, minimize, product_of
from hvp_engine.diagnostics.hypergradient_check.verdict import Point
from hvp_engine.errors import DivergenceError
from hvp_engine.hypergradients.implicit import Hypergradient
from hvp_engine.solvers import Solver
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import lanczos

Fit = Callable[[Any, Any], Any]

_LANCZOS_STEPS = 30


@dataclass(frozen=True)
class Solved:
    """A flat hypergradient and its solve, or the reason why there is none."""

    grads: Tensor | None
    solution: Solution | None
    failure: str = ""


@dataclass(frozen=True)
class Difference:
    """The validation loss along one direction, weights re-solved.

    `value` is the central difference and `coarse` the one at twice the step; `bend` is the contribution of the second
    derivative to a one-sided difference; `fit_error` and `rounding` are the errors that imperfect fits and rounding
    make in `value`.
    """

    direction: Tensor
    value: float
    coarse: float
    bend: float
    fit_error: float
    rounding: float

    @property
    def figures(self) -> tuple[float, ...]:
        return self.value, self.coarse, self.bend, self.fit_error, self.rounding


@dataclass(frozen=True)
class Experiment:
    """The settings that all measurements of one check share."""

    fit: Fit | None
    solver: Solver
    engine: str
    step: float
    generator: torch.Generator

    def refit(self, pair: Pair) -> Pair:
        """`pair` with its weights trained to a minimum at its hyperparameters."""
        if self.fit is None:
            return pair.at(minimize(pair))
        weights, structure = [w.clone() for w in pair.weights], pair.train.weight_structure
        hyper = pair.train.hyperparameter_structure
        assert hyper is not None
        with isolated(pair.seed, weights[0].device):
            result, found = flatten(
                self.fit(structure.rebuild(weights), hyper.rebuild([h.clone() for h in pair.hyper])),
                "fit(weights, hyper)",
            )
        if found != structure:
            raise ValueError(
                f"fit(weights, hyper): expected the container of weights, {structure.spec}; got {found.spec}"
            )
        check_like(result, Layout.of(weights), "fit(weights, hyper)", "weights")
        return pair.at([r.detach().to(w.dtype) for r, w in zip(result, weights, strict=True)])

    def solve(self, pair: Pair) -> Solved:
        """The hypergradient that is being tested, at `pair`'s point."""
        hypergradient = Hypergradient(pair.train.loss, pair.val.loss, solver=self.solver, engine=self.engine)
        hyper = pair.train.hyperparameter_structure
        assert hyper is not None
        arguments = pair.train.weight_structure.rebuild(pair.weights), hyper.rebuild(pair.hyper)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the weights are far from a minimum")  # the verdict says it
                result = hypergradient(*arguments, *pair.train.inputs, *pair.val.inputs)
        except DivergenceError as error:
            return Solved(None, None, str(error))
        return Solved(flat(flatten(result.grads, "grads")[0]), result.solution)

    def describe(self, pair: Pair, solved: Solved) -> Point:
        """Gradient, curvature and residual at `pair`'s point."""
        linearization = pair.linearization()
        start = FlatVector.of(linearization.layout, random_direction(pair.weights, self.generator))
        estimate, _ = lanczos(linearization, start, _LANCZOS_STEPS)
        residual = math.nan
        if solved.solution is not None:
            vector = pair.gradient(pair.val)[0]
            value = flat(flatten(solved.solution.value, "value")[0])
            norms = torch.stack([vector - product_of(linearization, pair.weights)(value), vector]).norm(dim=1)
            residual = float(norms[0] / norms[1]) if norms[1] > 0 else 0.0
        norm = float(torch.linalg.vector_norm(flat(linearization.gradient)))
        return Point(norm, estimate.largest, estimate.smallest, residual)

    def difference(self, base: Pair, inverse: Tensor) -> Difference:
        """Re-solve at four points along a random direction; `inverse` is H^-1 dL_V/dw at `base`."""
        direction = random_direction(base.hyper, self.generator)

        def solved(multiple: int) -> Pair:
            return self.refit(base.at(base.weights, shifted(base.hyper, direction, multiple * self.step)))

        points = [solved(multiple) for multiple in (1, -1, 2, -2)]
        up, down, far_up, far_down = (point.value(point.val) for point in points)
        # To first order, a gradient r that a fit leaves moves the loss by dL_V/dw^T H^-1 r.
        left = points[0].gradient(points[0].train)[0] - points[1].gradient(points[1].train)[0]
        slope = points[0].gradient(points[0].val)[0]
        moved = float(slope.abs() @ flat(points[0].weights).abs())
        return Difference(
            flat(direction),
            (up - down) / (2 * self.step),
            (far_up - far_down) / (4 * self.step),
            abs(far_up + far_down - up - down) / (6 * self.step),
            float(inverse @ left) / (2 * self.step),
            torch.finfo(base.weights[0].dtype).eps * (4 * abs(up) + moved) / self.step,
        )
