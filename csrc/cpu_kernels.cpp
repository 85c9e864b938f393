// One loop for all ops and types. This file is compiled several times, each time with the flags of one
// instruction set and HVP_KERNEL naming the function it defines; everything else in it is local.
#include "cpu_kernels.h"

#include <type_traits>

namespace hvp {
namespace {

template <template <class> class Op, bool kMeasure, class T, class Input>
void chunk(const void* data, void* const* states, int64_t offset, int64_t count, const Scalars& scalars,
           double* row) {
  using F = Op<T>;
  constexpr unsigned kStored = kMeasure ? 0 : F::kMutated;
  const F op(scalars);
  const Input* x = static_cast<const Input*>(data);
  T* const a = static_cast<T*>(states[0]) + offset;
  T* const b = F::kStates > 1 ? static_cast<T*>(states[1]) + offset : nullptr;
  T* const c = F::kStates > 2 ? static_cast<T*>(states[2]) + offset : nullptr;
  double first = 0, second = 0;
  double finite = 0;  // stays zero unless a NaN or an infinity is multiplied in
#pragma omp simd reduction(+ : first, second, finite)
  for (int64_t i = 0; i < count; ++i) {
    T s0 = a[i], s1 = 0, s2 = 0;
    if constexpr (F::kStates > 1) s1 = b[i];
    if constexpr (F::kStates > 2) s2 = c[i];
    const Record<T> r = op(widen<T>(x[i]), s0, s1, s2);
    if constexpr (kStored & 1) a[i] = s0;
    if constexpr (kStored & 2) b[i] = s1;
    if constexpr (kStored & 4) c[i] = s2;
    if constexpr (!kMeasure) first += static_cast<double>(r.left[0]) * static_cast<double>(r.right[0]);
    second += static_cast<double>(r.left[1]) * static_cast<double>(r.right[1]);
    // Squares of float32 cannot overflow a double, so there the sums alone tell; those of float64 can.
    if constexpr (!kMeasure && std::is_same_v<T, double>) {
      finite += r.left[0] * 0.0 + r.right[0] * 0.0 + (r.left[1] * 0.0 + r.right[1] * 0.0);
    }
  }
  if constexpr (std::is_same_v<T, float>) finite = first * 0.0 + second * 0.0;
  row[0] = first;
  row[1] = second;
  row[2] = finite == 0 ? 0.0 : 1.0;
}

template <template <class> class Op, bool kMeasure>
ChunkKernel kernel_of(bool wide, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return wide ? chunk<Op, kMeasure, double, float> : chunk<Op, kMeasure, float, float>;
    case DType::kFloat64:
      return wide ? chunk<Op, kMeasure, double, double> : nullptr;
    case DType::kBFloat16:
      return wide ? chunk<Op, kMeasure, double, BFloat16> : chunk<Op, kMeasure, float, BFloat16>;
    case DType::kFloat16:
      return wide ? chunk<Op, kMeasure, double, Float16> : chunk<Op, kMeasure, float, Float16>;
  }
  return nullptr;
}

template <template <class> class Op>
ChunkKernel kernel_of(bool measure, bool wide, DType dtype) {
  if constexpr (Op<float>::kMeasured) {
    if (measure) return kernel_of<Op, true>(wide, dtype);
  }
  return kernel_of<Op, false>(wide, dtype);
}

}  // namespace

ChunkKernel HVP_KERNEL(OpCode op, bool measure, bool wide, DType dtype) {
  switch (op) {
#define HVP_CASE(name, Functor) \
  case OpCode::name:            \
    return kernel_of<Functor>(measure, wide, dtype);
    HVP_OPS(HVP_CASE)
#undef HVP_CASE
  }
  return nullptr;
}

}  // namespace hvp
