"""Faults of what brings the writings of a loss to one form, and of the turns that threads take."""

from tools.faults.base import Fault

CONTRACTIONS, ADJOINTS = "tests/test_trace_contractions.py", "tests/test_native_adjoints.py"
THREADS = "tests/test_threads_together.py"
TRACE, NATIVE = "hvp_engine/differentiation/trace", "hvp_engine/differentiation/native"

FAULTS = [
    Fault(
        f"{TRACE}/contractions.py",
        "        if free != 1:\n",
        "        if False:\n",
        f"{CONTRACTIONS} -k neither",
        "what a sum has several times is counted once",
    ),
    Fault(
        f"{TRACE}/contractions.py",
        "if self.shared(summed=False):\n            return bool(rows and columns)",
        "if self.shared(summed=False):\n            return True",
        f"{CONTRACTIONS} -k stays",
        "products of rows become batches of products of one number",
    ),
    Fault(
        f"{TRACE}/contractions.py",
        "if d not in (*self.summed, *labels) and sizes[d] != 1",
        "if False",
        f"{CONTRACTIONS} -k operand_stay",
        "a product with a matrix of equal numbers has lost the dimension along which they are equal",
    ),
    Fault(
        f"{TRACE}/contractions.py",
        "tuple(None if size == 1 else d for d, size in zip(labels",
        "tuple(d for d, size in zip(labels",
        f"{CONTRACTIONS} -k products_and_others",
        "dimensions of one element make summands of different shapes",
    ),
    Fault(
        f"{NATIVE}/graph_program.py",
        "return tensor.clone(memory_format=torch.contiguous_format) if inside else tensor.contiguous()",
        "return tensor.contiguous()",
        "tests/test_native_graphs.py -k views_that_pytorch_makes",
        "what PyTorch reshapes in the workspace is written over before it is read",
    ),
    Fault(
        f"{TRACE}/elementwise_factors.py",
        "sign = -1.0 if target is aten.sub.Tensor else 1.0",
        "sign = 1.0",
        f"{CONTRACTIONS} -k one_product",
        "a difference of two products of one tangent is their sum",
    ),
    Fault(
        f"{TRACE}/row_factors.py",
        "result[place] = number * math.prod(shape_of(x)[d] for d in dims), None",
        "result[place] = number, None",
        f"{CONTRACTIONS} -k pass_over_rows",
        "what is the same along a sum counts once",
    ),
    Fault(
        f"{TRACE}/view_chains.py",
        "        dimensions = tuple(None if d is None else step[d] for d in dimensions)",
        "        dimensions = tuple(None if d is None else step.index(d) for d in dimensions)",
        CONTRACTIONS,
        "permutations are composed in the wrong order",
    ),
    Fault(
        f"{NATIVE}/adjoints.py",
        "return (last[places] == order).reshape(of_index)",
        "return (last[places] >= 0).reshape(of_index)",
        f"{ADJOINTS} -k scatter",
        "values scattered to one place are added up",
    ),
    Fault(
        "hvp_engine/_support/turns.py",
        "            return [] if self._has_changed() else [result]",
        "            return [result]",
        f"{THREADS} -k begins_to_draw",
        "a loss that draws beside others keeps the numbers that it drew",
    ),
    Fault(
        "hvp_engine/_support/turns.py",
        "                    if self._changed:\n                        self._restore(self._before)",
        "                    if self._changed:\n                        pass",
        f"{THREADS} -k begins_to_draw",
        "what was drawn beside others is missing from the caller's generators",
    ),
]
