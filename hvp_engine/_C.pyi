from collections.abc import Callable, Sequence

from torch import Tensor

has_cuda: bool

def cuda_problem() -> str: ...
def cpu_variant() -> str: ...

class Plan:
    def __init__(
        self,
        op: str,
        states: Sequence[Tensor],
        shapes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        examples: Sequence[Tensor],
        offsets: Sequence[int],
        scalars: Sequence[Tensor],
        damping: float,
        partials: Tensor,
        conform: Callable[[int, object], Tensor],
    ) -> None: ...
    def __call__(self, products: Sequence[Tensor]) -> None: ...
