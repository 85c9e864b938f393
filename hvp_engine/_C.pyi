from collections.abc import Callable, Hashable, Sequence
from typing import Any

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
        slices: Tensor | None,
        conform: Callable[[int, object], Tensor],
    ) -> None: ...
    def __call__(self, products: Sequence[Tensor]) -> None: ...

class Recurrence:
    def __init__(self, name: str, state: Tensor) -> None: ...
    def __call__(self) -> None: ...

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

class Graph:
    structure: bytes
    nodes: list[Any]
    def contents(
        self, numbers: dict[Hashable, int], names: tuple[str, ...]
    ) -> tuple[bytes, list[Tensor], list[int]] | str: ...

def walk_graph(
    roots: list[tuple[Any, int]],
    inputs: list[Tensor],
    edges: list[tuple[Any, int] | None],
    readers: dict[type, Any],
    reader_of: Callable[[Any], Any],
) -> Graph | str: ...
def plain_series(
    product: Callable[[], Sequence[Tensor | None]],
    v: Sequence[Tensor],
    p: tuple[Tensor, ...],
    terms: int,
    alpha: float,
    damping: float,
) -> tuple[float, ...] | None: ...
def recurrence(
    *, code: int, units: int, batch_sizes: Sequence[int], reverse: bool, tensors: Sequence[Tensor | None]
) -> None: ...
def cross_entropy(
    *,
    level: int,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_total: float,
    ignored: int,
    smoothing: float,
    log_sum_exp: Tensor,
    grad: Tensor | None = None,
    tangent: Tensor | None = None,
    per_row: Tensor | None = None,
    product: Tensor | None = None,
) -> int: ...
def log_softmax(
    *,
    level: int,
    given: Tensor,
    grad: Tensor | None = None,
    tangent: Tensor | None = None,
    first: Tensor,
    second: Tensor | None = None,
) -> None: ...

class NormalizedShape:
    def __init__(
        self,
        *,
        rows: bool,
        centred: bool,
        channels_last: bool,
        samples: int,
        images: int,
        channels: int,
        points: int,
        groups: int,
    ) -> None: ...

def normalize(
    shape: NormalizedShape,
    *,
    level: int,
    eps: float,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None = None,
    grad: Tensor | None = None,
    tangent: Tensor | None = None,
    tangent_weight: Tensor | None = None,
    tangent_bias: Tensor | None = None,
    output: Tensor | None = None,
    input_product: Tensor | None = None,
    weight_product: Tensor | None = None,
    bias_product: Tensor | None = None,
) -> None: ...
