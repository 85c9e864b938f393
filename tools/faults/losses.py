"""Faults of cross-entropy and of normalizations with two derivatives."""

from tools.faults.base import Fault

LOSSES, NORMALIZATIONS = "tests/test_cross_entropy.py", "tests/test_normalization.py"

FAULTS = [
    Fault(
        "csrc/cross_entropy.cpp",
        "out[i] = factor * out[i] * (t[i] - shift);",
        "out[i] = factor * out[i] * t[i];",
        f"{LOSSES} -k all_levels",
        "the derivative of softmax without its rank-one part",
    ),
    Fault(
        "csrc/cross_entropy.cpp",
        "return at_label(row) + spread_ * given_.weight_total;",
        "return at_label(row) + spread_ * static_cast<double>(given_.classes);",
        f"{LOSSES} -k all_levels",
        "smoothing spreads over classes of weight one",
    ),
    Fault(
        "csrc/normalization_images.cpp",
        "const double away = rounded_off(cell) * inverse(group(cell));",
        "const double away = 0 * inverse(group(cell));",
        f"{NORMALIZATIONS} -k as_exact",
        "sums are about the rounded mean",
    ),
    Fault(
        "csrc/normalization_rows.cpp",
        "(sh - h * s - 3 * hx * sx)",
        "(sh - h * s - hx * sx)",
        f"{NORMALIZATIONS} -k 'all_levels and layer_norm'",
        "the statistics' own dependence on the input is counted once",
    ),
    Fault(
        "hvp_engine/differentiable/linear_cross_entropy_chunks.py",
        "                product.addmm_(d.to(input.dtype), weight_tangent)",
        "                product = d.to(input.dtype) @ weight_tangent",
        f"{LOSSES} -k linear",
        "the input's derivative lacks its way through the logits",
    ),
    Fault(
        "hvp_engine/differentiable/registration.py",
        "taken = [x.view_as(x) if isinstance(x, Tensor) else x for x in arguments]",
        "taken = list(arguments)",
        f"{LOSSES} -k third",
        "third derivatives go on beyond the operation, twice",
    ),
    Fault(
        "hvp_engine/differentiation/native/differentiable.py",
        "rows.row, 2.0)",
        "rows.row, 3.0)",
        f"{NORMALIZATIONS} -k rows_in_native",
        "a native program's layer normalization has the formula of another splitting",
    ),
    Fault(
        "hvp_engine/differentiable/normalization_functions.py",
        "variance * (count / max(1, count - 1))",
        "variance",
        f"{NORMALIZATIONS} -k running",
        "running variances are biased",
    ),
]
