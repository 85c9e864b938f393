"""Faults of convolutions in native programs."""

from tools.faults.base import Fault

TESTS = "tests/test_native_convolution.py"
KERNELS = "csrc/convolution_kernels.cpp"

FAULTS = [
    Fault(
        KERNELS,
        "const int64_t above = down < 0 ? (-down + c_.stride[0] - 1) / c_.stride[0] : 0;",
        "const int64_t above = down < 0 ? -down / c_.stride[0] : 0;",
        f"{TESTS} -k 'values and strided'",
        "with a stride, the first rows of padding are read from outside of an image",
    ),
    Fault(
        KERNELS,
        "for (int64_t share = 1; share < shares_; ++share) sum",
        "for (int64_t share = 1; share < shares_ - 1; ++share) sum",
        f"{TESTS} -k threads",
        "the derivative of a kernel leaves out the images of the last thread",
    ),
    Fault(
        KERNELS,
        "const T beta = first && i == 0 ? T(0) : T(1);",
        "const T beta = i == 0 ? T(0) : T(1);",
        f"{TESTS} -k 'values and bands'",
        "the derivative of a kernel is that of the last block of images",
    ),
    Fault(
        KERNELS,
        "tiles_ ? o * unfolded_ + k : k * c_.outputs + o",
        "k * c_.outputs + o",
        f"{TESTS} -k values_and_derivatives",
        "derivatives of kernels are turned over that are in order; noticed where AVX-512 tiles are in use",
    ),
    Fault(
        KERNELS,
        "if (block.row == 0) {",
        "{",
        f"{TESTS} -k 'values and bands'",
        "each band of rows starts the derivative of an image anew",
    ),
    Fault(
        "hvp_engine/differentiation/native/convolution.py",
        "if not isinstance(argument, fx.Node) or len(argument.users) > 1:",
        "if not isinstance(argument, fx.Node):",
        f"{TESTS} -k other_sums",
        "a convolution that is read elsewhere disappears in a sum",
    ),
    Fault(
        "hvp_engine/differentiation/native/convolution.py",
        "if len(node.args) == 2 and not node.kwargs else None",
        "if len(node.args) == 2 else None",
        f"{TESTS} -k other_sums",
        "a sum of convolutions loses its factor",
    ),
    Fault(
        "csrc/winograd_transforms.h",
        "even[j] = pixel(2 * j), odd[j] = pixel(2 * j + 1);\n#pragma",
        "even[j] = odd[j] = T(0);\n#pragma",
        f"{TESTS} -k 'values and tiles'",
        "the first column of an image counts as padding where the padding is odd",
    ),
    Fault(
        "csrc/winograd.h",
        "turned_ ? 8 - i : i",
        "i",
        f"{TESTS} -k 'values and tiles'",
        "derivatives of images are made with kernels that are not turned",
    ),
    Fault(
        "csrc/winograd.h",
        "for (int64_t s = 1; s < shares_; ++s) {",
        "for (int64_t s = 1; s < 1; ++s) {",
        f"{TESTS} -k several_threads",
        "of derivatives of kernels by tiles the share of one thread alone counts",
    ),
    Fault(
        "csrc/winograd.h",
        "std::min<int64_t>(2, made_.rows - 2 * i)",
        "2",
        f"{TESTS} -k any_tiles",
        "the last row of tiles writes beyond an image",
    ),
    Fault(
        "hvp_engine/differentiation/native/conversion.py",
        "self._gain += work * (1 - relative_time)",
        "self._gain += work",
        "tests/test_engines_native.py -k lacks",
        "convolutions for which PyTorch is faster are made natively",
    ),
]
