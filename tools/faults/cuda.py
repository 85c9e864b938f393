"""Faults of the CUDA kernels and their launches, which tests on a CPU must notice."""

from tools.faults.base import Fault

QUICK = "tests/test_cuda_on_cpu.py -k 'reversed or launches or zeroes'"
ALL = "tests/test_cuda_on_cpu.py -k shuffled"
KERNELS, LAUNCHES = "csrc/cuda_kernels.cuh", "csrc/cuda.cu"

FAULTS = [
    Fault(
        KERNELS,
        "slice.tensor - shared.first_tensor",
        "slice.tensor",
        QUICK,
        "a second launch looks for its products beyond its parameters",
    ),
    Fault(
        KERNELS,
        "static_cast<const Input*>(data) + slice.start",
        "static_cast<const Input*>(data)",
        QUICK,
        "every chunk of a tensor reads its first elements",
    ),
    Fault(KERNELS, "min(i + kVector, count)", "i + kVector", QUICK, "the last thread of a tail goes beyond the tensor"),
    Fault(KERNELS, "int distance = 16;", "int distance = 8;", QUICK, "half of each warp is left out of the sums"),
    Fault(KERNELS, "int w = 1; w < kWarps", "int w = 1; w < kWarps - 1", QUICK, "the last warp is not summed"),
    Fault(
        KERNELS,
        "sums.nonfinite = __syncthreads_or(sums.nonfinite);",
        "",
        QUICK,
        "thread 0 adds up the warps before they have written",
    ),
    Fault(
        KERNELS,
        "total = sums.second;\n  __syncthreads();",
        "total = sums.second;",
        ALL,
        "threads read the total before it is there",
    ),
    Fault(
        KERNELS,
        "static_cast<int64_t>(blockIdx.x) * kTotalThreads + threadIdx.x;",
        "threadIdx.x;",
        QUICK,
        "all blocks write the total into the same rows",
    ),
    Fault(
        KERNELS,
        "% alignof(Vector<T>) == 0",
        "% alignof(T) == 0",
        ALL,
        "vectors are read at addresses that a GPU refuses",
    ),
    Fault(
        KERNELS,
        "kStored = kMeasure ? 0 : F::kMutated;",
        "kStored = F::kMutated;",
        "tests/test_cuda_code.py -k spill",
        "the measuring pass of conjugate gradients writes the state that it only reads",
    ),
    Fault(
        KERNELS,
        "isfinite(r.left[0]) && isfinite(r.right[0]) && isfinite(r.left[1]) && isfinite(r.right[1])",
        "isfinite(r.left[0]) && isfinite(r.right[0])",
        ALL,
        "the flag does not look at the second pair",
    ),
    Fault(
        LAUNCHES,
        "(end < step.parts.size() ? step.parts[end].row : step.rows)",
        "step.rows",
        QUICK,
        "a first launch has the blocks of those that follow",
    ),
    Fault(LAUNCHES, "shared.slices += first_row;", "", QUICK, "every launch starts again at the first slice"),
    Fault(LAUNCHES, "shared.partials += 3 * first_row;", "", QUICK, "every launch writes its sums into the first rows"),
    Fault(
        LAUNCHES,
        "if (count <= kSmall) {",
        "if (count <= kSmall + 1) {",
        QUICK,
        "441 products go into parameters for 440",
    ),
    Fault(
        LAUNCHES,
        "require(cudaMemsetAsync(step.partials, 0, 3 * sizeof(double), stream), name_of(step),\n"
        '            "CUDA memset failed");',
        "",
        QUICK,
        "without weights the sums are those of the last call",
    ),
]  # fmt: skip
