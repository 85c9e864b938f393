#include "cpu.h"

#include <algorithm>
#include <cstring>

#include "variants.h"

namespace hvp {
namespace {

// The elements of a product from `start` on; copied to `scratch` if they are not in the order of the state.
const void* in_order(const Product& product, int64_t width, int64_t start, int64_t count, void* scratch) {
  if (product.walk.extents.empty()) return static_cast<const char*>(product.data) + start * width;
  gather(product.data, product.walk, width, start, count, scratch);
  return scratch;
}

// Runs the rows [begin, end) of the step.
void run_rows(const Step& step, const ChunkKernel* kernels, const Scalars& scalars, int64_t begin,
              int64_t end) {
  alignas(64) double scratch[kChunk];
  const std::vector<Part>& parts = step.parts;
  // The last tensor that starts at or before `begin`; empty tensors have no rows of their own.
  size_t index = std::upper_bound(parts.begin(), parts.end(), begin,
                                  [](int64_t row, const Part& part) { return row < part.row; }) -
                 parts.begin() - 1;
  for (int64_t row = begin; row < end; ++index) {
    const Part& part = parts[index];
    const Product& product = step.products[index];
    const int dtype = static_cast<int>(product.dtype);
    for (int64_t start = (row - part.row) * kChunk; start < part.numel && row < end; start += kChunk, ++row) {
      const int64_t count = std::min(kChunk, part.numel - start);
      kernels[dtype](in_order(product, kWidths[dtype], start, count, scratch), step.states,
                     part.offset + start, count, scalars, step.partials + 3 * row);
    }
  }
}

// One pass over all rows.
void run_pass(const Step& step, bool measure, const Scalars& scalars, int threads) {
  ChunkKernel kernels[kDTypes];
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    kernels[dtype] = variant().chunk_kernel(step.op, measure, step.wide, static_cast<DType>(dtype));
  }
  const int64_t shares = std::min<int64_t>(threads, step.rows);
  if (shares <= 1) {
    run_rows(step, kernels, scalars, 0, step.rows);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares))
  for (int64_t share = 0; share < shares; ++share) {
    run_rows(step, kernels, scalars, step.rows * share / shares, step.rows * (share + 1) / shares);
  }
}

}  // namespace

void run_cpu(const Step& step, int threads) {
  if (step.rows == 0) {
    std::memset(step.partials, 0, 3 * sizeof(double));
    return;
  }
  const OpTraits& traits = kOps[static_cast<int>(step.op)];
  Scalars scalars{};
  for (int i = 0; i < traits.scalars; ++i) scalars.value[i] = *step.scalars[i];
  scalars.damping = step.damping;
  if (traits.measured) {
    run_pass(step, true, scalars, threads);
    double total = 0;  // in the order of the rows, whichever thread wrote them
    for (int64_t row = 0; row < step.rows; ++row) total += step.partials[3 * row + 1];
    scalars.measured = total;
  }
  run_pass(step, false, scalars, threads);
}

}  // namespace hvp
