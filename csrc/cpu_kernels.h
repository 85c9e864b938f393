// The CPU kernels, compiled once for each instruction set from cpu_kernels.cpp.
#pragma once

#include "ops.h"

namespace hvp {

// Updates `count` elements: the product's from `data`, the states' from `offset` on; writes one row of
// partials. A measuring kernel leaves the states as they are, and writes the second sum only.
using ChunkKernel = void (*)(const void* data, void* const* states, int64_t offset, int64_t count,
                             const Scalars& scalars, double* row);

// Null where a product is wider than the state.
ChunkKernel baseline_kernel(OpCode op, bool measure, bool wide, DType dtype);
ChunkKernel avx2_kernel(OpCode op, bool measure, bool wide, DType dtype);

}  // namespace hvp
