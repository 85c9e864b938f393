"""Linear operators on trees: A @ v, sums and multiples, solves; and :func:`solve`, which takes any linear callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import as_number
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.pytree import Structure, check_like, flatten, flatten_batch
from hvp_engine._support.torch_compat import version_of
from hvp_engine._support.user_code import left_as_it_is
from hvp_engine.differentiation.linear_map import LinearMap, check_fixed
from hvp_engine.engines import EagerEngine, Engine
from hvp_engine.operators.identity import Identity
from hvp_engine.solvers import Solver
from hvp_engine.solvers.base import LinearSystem, check_solver, worst_of
from hvp_engine.solvers.batched import fill
from hvp_engine.solvers.dense import Columns
from hvp_engine.solvers.right_hand_sides import guesses, unstacked
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import Spectrum

if TYPE_CHECKING:
    import scipy.sparse.linalg


class LinearOperator(LinearMap):
    """A linear map on trees like the weights.

    `A @ v` multiplies, `A.solve(v, solver)` solves; `A + B`, `A - B`, `2.0 * A` and `A + 0.1 * hvp.I` are operators
    too. (In a solve, the solver's `damping` does the same as adding a multiple of the identity, with fused updates.)

    Arguments:
        linear_map: what makes the products, on lists of tensors.
        structure: of the trees.
        engine: what runs the terms of a solve.
        made_of: a tree of the caller's tensors that products read. Once one of them has changed in place, products
            would be wrong, so they are refused.

    Attributes:
        symmetric: whether A = A^T.
        shape: (number of weights, number of weights).
        spectrum: the estimate of the extreme eigenvalues, kept from solve to solve.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (w ** 3).sum(), torch.tensor([1.0, 2.0]))
    >>> (0.5 * H + 2.0 * hvp.I) @ torch.ones(2)
    tensor([5., 8.])
    """

    def __init__(self, linear_map: LinearMap, structure: Structure, engine: Engine, made_of: Any = ()):
        self._linear_map, self._structure, self.engine = linear_map, structure, engine
        self.layout, self.name = linear_map.layout, linear_map.name
        self.symmetric, self.fixed = linear_map.symmetric, linear_map.fixed
        self.spectrum = Spectrum()
        read = [leaf for leaf in flatten_batch(made_of)[0] if isinstance(leaf, Tensor)]
        self._versions = [(tensor, version_of(tensor)) for tensor in read if not tensor.is_inference()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": []}  # a copy has its own tensors

    @property
    def linear_map(self) -> LinearMap:
        """The map that makes the products; `ValueError` if a tensor that it reads has changed in place."""
        for tensor, version in self._versions:
            if version_of(tensor) != version:
                raise ValueError(
                    "operator: expected weights and arguments as they were when it was made; got one of shape "
                    f"{tuple(tensor.shape)} that was changed in place since: make a new operator, or clone it first"
                )
        return self._linear_map

    @cached_property
    def loss(self) -> Tensor | None:  # type: ignore[override]  # an attribute of most maps, computed by some
        """The loss whose curvature A is, detached; None if it is not known."""
        return self._linear_map.loss

    @property
    def batches(self) -> bool:
        return self._linear_map.batches

    @property
    def shape(self) -> tuple[int, int]:
        """(number of weights, number of weights)."""
        size = self.layout.numel
        return size, size

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The operator times the list of leaves `tangents`, unchecked: what solvers call."""
        return self.linear_map.product(tangents)

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.linear_map.products(stacked)

    def decays(self) -> list[Tensor] | None:
        return self.linear_map.decays()

    def hold(self) -> LinearMap:
        return self.linear_map.hold()

    def __matmul__(self, v: Any) -> Any:
        """The operator times v, a tree like the weights, in the same container; NaN in v propagates."""
        leaves, structure = flatten(v, "v", sharded=True)
        check_like(leaves, self.layout, "v", "weights")
        tangents = FlatVector.of(self.layout, leaves).tangents  # traces rely on the weights' strides
        return structure.rebuild([p.detach().clone() for p in self.product(tangents)])

    def __add__(self, other: LinearOperator | Identity) -> LinearOperator:
        if isinstance(other, Identity):
            return self._combined([(1.0, self)], other.scale)
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return self._combined([(1.0, self), (1.0, other)])

    def __radd__(self, other: Any) -> LinearOperator:
        return self + (Identity(0.0) if isinstance(other, int) and other == 0 else other)  # Python's sum begins with 0

    def __sub__(self, other: LinearOperator | Identity) -> LinearOperator:
        return self + (-1.0) * other

    def __rsub__(self, other: Identity) -> LinearOperator:
        return -self + other

    def __mul__(self, scale: float) -> LinearOperator:
        try:
            factor = float(as_number(scale))
        except TypeError:
            return NotImplemented
        return self._combined([(factor, self)])

    def __rmul__(self, scale: float) -> LinearOperator:
        return self * scale

    def __truediv__(self, scale: float) -> LinearOperator:
        return self * (1.0 / scale)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def _combined(self, terms: Sequence[tuple[float, LinearOperator]], shift: float = 0.0) -> LinearOperator:
        for _, operator in terms:
            if operator.layout != self.layout or operator._structure != self._structure:
                raise ValueError("operators: expected two on the same tree of weights; got other shapes or containers")
        return LinearOperator(Combination(terms, shift), self._structure, EagerEngine())

    def solve(self, v: Any, solver: Solver, *, batched: bool = False, x0: Any = None) -> Solution:
        """(A + damping I)^-1 v by `solver`; `batched` for several v, `x0` for a warm start; see :func:`solve`."""
        return solve(self, v, solver, batched=batched, x0=x0)

    def dense(self) -> Tensor:
        """The operator as a matrix, by one product for each weight: for tests and small problems."""
        columns = Columns(self.layout, self.layout.state_dtype)
        fill(columns, self.linear_map)
        return columns.matrix

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The operator for SciPy, on flat vectors: the weights' elements tensor after tensor, each in row-major order.

        Cost of a product: one here, and a copy to and from NumPy. Errors: `ImportError` without SciPy.
        """
        import numpy
        import scipy.sparse.linalg

        check_fixed(self, "to_scipy")
        layout = self.layout
        layout.refuse_parts("a SciPy operator")

        def multiply(x: Any) -> Any:
            if numpy.iscomplexobj(x):
                return multiply(x.real) + 1j * multiply(x.imag)
            flat = torch.as_tensor(x.reshape(-1)).to(layout.device, layout.state_dtype)
            parts = [part.view(shape) for part, shape in zip(flat.split(layout.numels), layout.shapes, strict=True)]
            product = self.product(FlatVector.of(layout, parts).tangents)
            return torch.cat([part.detach().reshape(-1).to(layout.state_dtype) for part in product]).cpu().numpy()

        dtype = numpy.float64 if layout.state_dtype == torch.float64 else numpy.float32
        adjoint = multiply if self.symmetric else None
        return scipy.sparse.linalg.LinearOperator(self.shape, matvec=multiply, rmatvec=adjoint, dtype=dtype)


class Combination(LinearMap):
    """sum_k c_k A_k + shift I."""

    def __init__(self, terms: Sequence[tuple[float, LinearMap]], shift: float):
        self._terms, self._shift = terms, shift
        self.layout, self.name = terms[0][1].layout, terms[0][1].name
        self.symmetric = all(operator.symmetric for _, operator in terms)
        self.fixed = all(operator.fixed for _, operator in terms)

    @property
    def batches(self) -> bool:
        return all(operator.batches for _, operator in self._terms)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._sum([operator.product(tangents) for _, operator in self._terms], tangents)

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._sum([operator.products(stacked) for _, operator in self._terms], stacked)

    def hold(self) -> LinearMap:
        return Combination([(scale, operator.hold()) for scale, operator in self._terms], self._shift)

    def _sum(self, products: Sequence[Sequence[Tensor]], tangents: Sequence[Tensor]) -> list[Tensor]:
        sums = [self._shift * tangent for tangent in tangents]
        for (scale, _), parts in zip(self._terms, products, strict=True):
            sums = [total + scale * part for total, part in zip(sums, parts, strict=True)]
        return sums


class CallableMap(LinearMap):
    """Any callable v -> A v on trees, as a linear map on lists."""

    def __init__(self, function: Callable[[Any], Any], like: Sequence[Tensor], structure: Structure):
        self.layout = Layout.of(like)
        self._function = function
        self._structure = structure

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        with left_as_it_is(tangents, "operator(v)", "a * v in place of v.mul_(a)"):
            product = self._structure.of_autograd(self._function(self._structure.rebuild(tangents)), tangents)
        result, structure = flatten(product, "operator(v)")
        if structure != self._structure:
            raise ValueError(f"operator(v): expected the container of v, {self._structure.spec}; got {structure.spec}")
        check_like(result, self.layout, "operator(v)", "v", widest=torch.float64)
        return [
            t.detach() if t.dtype == dtype else t.detach().to(dtype)
            for t, dtype in zip(result, self.layout.dtypes, strict=True)
        ]


def solve(operator: Any, v: Any, solver: Solver, *, batched: bool = False, x0: Any = None) -> Solution:
    """Solve (A + damping I) x = v.

    Arguments:
        operator: a :class:`HessianOperator` or another operator of this package, or any callable v -> A v that is
            linear and symmetric and returns the container and shapes it is given.
        v: a tensor or any tree of tensors, finite, of the operator's shapes.
        solver: how, for example `Neumann(20)`, `Identity()`.
        batched: every leaf of v has an extra first dimension, of the same length: multiple right-hand sides. All share
            one spectral estimate. `Exact` solves them with one matrix, `Nystrom` with one sketch, `ConjugateGradient`
            in blocks that share their Krylov spaces; otherwise they are solved one by one, or side by side where that
            pays off: for operators that are traced, have no native program, and at most 16,384 weights on a CPU.
        x0: a warm start like v, for example the solution of a similar system; None is zero. The solver then finds
            x - x0 = A^-1 (v - A x0), for one more product: a series continues from x0, and a tolerance stays relative
            to v.

    Returns a :class:`Solution`; its value is in the container of v. For several right-hand sides it
    has the stacked values, the products of all, and the largest residual norm with its status.

    Cost: that of the solver.

    Errors: `TypeError`/`ValueError` naming the argument for a v that does not fit or is not finite;
    :class:`DivergenceError` for a solve that diverges.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    >>> solution = hvp.solve(lambda v: A @ v, torch.ones(2), hvp.Neumann(60))
    >>> torch.allclose(A @ solution.value, torch.ones(2), atol=1e-4)
    True
    """
    ours = isinstance(operator, LinearMap)
    leaves, structure = flatten(v, "v", sharded=ours and not batched)
    check_solver(solver)
    vs = unstacked(leaves, "v") if batched else [[leaf.detach() for leaf in leaves]]
    names = [f"v[{index}]" for index in range(len(vs))] if batched else ["v"]
    if isinstance(operator, LinearOperator):
        system = LinearSystem(operator.linear_map, operator.engine, operator.spectrum)
    elif ours:
        system = LinearSystem(operator, EagerEngine(), Spectrum())
    elif callable(operator):
        system = LinearSystem(CallableMap(operator, vs[0], structure), EagerEngine(), Spectrum())
    else:
        raise TypeError(f"operator: expected an operator or a callable v -> A v; got {type(operator).__name__}")
    linear = system.operator
    if ours:
        check_like(vs[0], linear.layout, names[0], "weights")
    if not linear.fixed and solver.needs_fixed_operator:
        raise ValueError(
            "solver: expected one for an operator that changes at every product, such as hvp.Neumann(100); got "
            f"{type(solver).__name__}, which needs a fixed one: use hvp.HessianOperator(hvp.Averaged(loss), weights, "
            "batches)"
        )
    if not linear.symmetric and solver.needs_symmetry:
        raise ValueError(
            "solver: expected one that does not need a symmetric operator, such as hvp.Neumann(20); got "
            f"{type(solver).__name__}"
        )
    x0s = None if x0 is None else guesses(x0, structure, vs, linear.layout, batched)
    results = list(system.solve_all(vs, solver, names, x0s))
    if not batched:
        [(value, solution)] = results
        return solution.of(structure.rebuild(value))
    stacked = [torch.stack(parts) for parts in zip(*(value for value, _ in results), strict=True)]
    return worst_of([solution for _, solution in results]).of(structure.rebuild(stacked))
