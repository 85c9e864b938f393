from collections.abc import Callable, Sequence

from torch import Tensor

has_cuda: bool

def cuda_problem() -> str: ...

cpu_variant: str

def attention(
    *,
    level: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor | None,
    grad_output: Tensor | None,
    grad_grad_query: Tensor | None,
    grad_grad_key: Tensor | None,
    grad_grad_value: Tensor | None,
    results: Sequence[Tensor],
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    threshold: int,
    is_causal: bool,
    scale: float,
) -> None: ...

class Plan:
    def __init__(
        self,
        op: str,
        states: Sequence[Tensor],
        shapes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        orders: Sequence[Sequence[int]],
        examples: Sequence[Tensor],
        offsets: Sequence[int],
        scalars: Sequence[Tensor],
        damping: float,
        partials: Tensor,
        conform: Callable[[int, object], Tensor],
    ) -> None: ...
    def __call__(self, products: Sequence[Tensor]) -> None: ...

class Recurrence:
    def __init__(self, name: str, state: Tensor) -> None: ...
    def __call__(self) -> None: ...

def linear_model_neumann(
    *,
    v: Tensor,
    p: Tensor,
    figures: Tensor,
    inputs: Tensor,
    curvature: Tensor,
    probabilities: Tensor | None,
    decay: Tensor,
    gram: Tensor | None,
    bias: int,
    alpha: float,
    damping: float,
    iterations: int,
    horner: bool,
) -> None: ...
def linear_model_chebyshev(
    *,
    residual: Tensor,
    direction: Tensor,
    x: Tensor,
    figures: Tensor,
    coefficients: Tensor,
    inputs: Tensor,
    curvature: Tensor,
    probabilities: Tensor | None,
    decay: Tensor,
    bias: int,
    damping: float,
) -> None: ...
def linear_model_lanczos(
    *,
    basis: Tensor,
    figures: Tensor,
    inputs: Tensor,
    curvature: Tensor,
    probabilities: Tensor | None,
    decay: Tensor,
    bias: int,
) -> None: ...
def find_blas(library: str) -> None: ...
def blas_problem() -> str: ...

class Slots:
    def __init__(self, wide: bool, slots: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None: ...

class Memory:
    def __init__(self, slots: Slots) -> None: ...
    def put(self, first: int, tensors: Sequence[Tensor]) -> int: ...
    def clear(self, first: int, count: int) -> None: ...

class Program:
    def __init__(self, slots: Slots, parameters: int, constants: Sequence[float], words: Sequence[int]) -> None: ...
    @property
    def steps(self) -> int: ...
    def run(self, memory: Memory, table: Sequence[Sequence[float]]) -> None: ...

def recurrence(
    *, code: int, units: int, batch_sizes: Sequence[int], reverse: bool, tensors: Sequence[Tensor | None]
) -> None: ...
