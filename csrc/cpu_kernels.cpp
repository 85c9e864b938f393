// One loop for all ops and types.
#include <type_traits>

#include "variants.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Where the states of a chunk begin; those that the op lacks are null.
template <class F, class T>
struct States {
  T *a, *b, *c;

  States(void* const* states, int64_t offset)
      : a(static_cast<T*>(states[0]) + offset),
        b(F::kStates > 1 ? static_cast<T*>(states[1]) + offset : nullptr),
        c(F::kStates > 2 ? static_cast<T*>(states[2]) + offset : nullptr) {}

  template <int kIndex>
  HVP_INLINE const T* at() const {
    return kIndex == 0 ? a : kIndex == 1 ? b : c;
  }

  // The op on element i, which is stored unless it is only measured.
  template <bool kMeasure>
  HVP_INLINE Record<T> apply(const F& op, T x, int64_t i) const {
    constexpr unsigned kStored = kMeasure ? 0 : F::kMutated;
    T s0 = a[i], s1 = 0, s2 = 0;
    if constexpr (F::kStates > 1) s1 = b[i];
    if constexpr (F::kStates > 2) s2 = c[i];
    const Record<T> r = op(x, s0, s1, s2);
    if constexpr (kStored & 1) a[i] = s0;
    if constexpr (kStored & 2) b[i] = s1;
    if constexpr (kStored & 4) c[i] = s2;
    return r;
  }
};

template <template <class> class Op, bool kMeasure, class T, class Input>
void chunk(const void* data, void* const* states, int64_t offset, int64_t count, const Scalars& scalars,
           double* row) {
  using F = Op<T>;
  const F op(scalars);
  const Input* x = static_cast<const Input*>(data);
  const States<F, T> state(states, offset);
  double first = 0, second = 0;
  double finite = 0;  // stays zero unless some value is NaN or infinite
#pragma omp simd reduction(+ : first, second, finite)
  for (int64_t i = 0; i < count; ++i) {
    const Record<T> r = state.template apply<kMeasure>(op, widen<T>(x[i]), i);
    if constexpr (!kMeasure) first += static_cast<double>(r.left[0]) * static_cast<double>(r.right[0]);
    second += static_cast<double>(r.left[1]) * static_cast<double>(r.right[1]);
    // Squares of float64 can overflow the sums; those of float32 cannot, so that there the sums themselves
    // tell.
    if constexpr (!kMeasure && std::is_same_v<T, double>) {
      finite += r.left[0] * 0.0 + r.right[0] * 0.0 + (r.left[1] * 0.0 + r.right[1] * 0.0);
    }
  }
  if constexpr (std::is_same_v<T, float>) finite = first * 0.0 + second * 0.0;
  row[0] = first;
  row[1] = second;
  row[2] = finite == 0 ? 0.0 : 1.0;
}

// Elements whose squares are summed in float32 before the sum is added to one in float64.
constexpr int64_t kBlock = 256;

double sum_of_squares(const float* values, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return sum;
}

// `chunk` for an op that sums squares, with float32 states. Converting each element to float64 for its square
// costs more than updating it. So the squares of a block are summed in float32, and once more in float64 if
// that may have lost something: near overflow, or if squares that underflowed could matter. The squared
// values are read from the state that holds them; values that no state holds are kept in `kept`.
template <template <class> class Op, class Input>
void chunk_of_squares(const void* data, void* const* states, int64_t offset, int64_t count,
                      const Scalars& scalars, double* row) {
  using F = Op<float>;
  const F op(scalars);
  constexpr bool kKept[2] = {F::kSquared[0] == kNoState, F::kSquared[1] == kNoState};
  alignas(64) float kept[2][kBlock];
  double first = 0, second = 0;
  const auto exact = [](float sum, const float* squared, int64_t size) {
    return sum > 0x1p-100f && sum < 0x1p+126f ? static_cast<double>(sum) : sum_of_squares(squared, size);
  };
  for (int64_t start = 0; start < count; start += kBlock) {
    const Input* x = static_cast<const Input*>(data) + start;
    const States<F, float> state(states, offset + start);
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    float left = 0, right = 0;
#pragma omp simd reduction(+ : left, right)
    for (int64_t i = 0; i < size; ++i) {
      const Record<float> r = state.template apply<false>(op, widen<float>(x[i]), i);
      if constexpr (kKept[0]) kept[0][i] = r.left[0];
      if constexpr (kKept[1]) kept[1][i] = r.left[1];
      left += r.left[0] * r.left[0];
      right += r.left[1] * r.left[1];
    }
    first += exact(left, kKept[0] ? kept[0] : state.template at<F::kSquared[0]>(), size);
    second += exact(right, kKept[1] ? kept[1] : state.template at<F::kSquared[1]>(), size);
  }
  row[0] = first;
  row[1] = second;
  row[2] = first * 0.0 + second * 0.0 == 0 ? 0.0 : 1.0;
}

template <template <class> class Op, bool kMeasure, class Input>
ChunkKernel kernel_of(bool wide) {
  if (wide) return chunk<Op, kMeasure, double, Input>;
  if constexpr (std::is_same_v<Input, double>) {
    return nullptr;
  } else if constexpr (Op<float>::kSquares) {
    return chunk_of_squares<Op, Input>;
  } else {
    return chunk<Op, kMeasure, float, Input>;
  }
}

template <template <class> class Op, bool kMeasure>
ChunkKernel kernel_of(bool wide, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_of<Op, kMeasure, float>(wide);
    case DType::kFloat64:
      return kernel_of<Op, kMeasure, double>(wide);
    case DType::kBFloat16:
      return kernel_of<Op, kMeasure, BFloat16>(wide);
    case DType::kFloat16:
      return kernel_of<Op, kMeasure, Float16>(wide);
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

ChunkKernel chunk_kernel(OpCode op, bool measure, bool wide, DType dtype) {
  switch (op) {
#define HVP_CASE(name, Functor) \
  case OpCode::name:            \
    return kernel_of<Functor>(measure, wide, dtype);
    HVP_OPS(HVP_CASE)
#undef HVP_CASE
  }
  return nullptr;
}

}  // namespace HVP_VARIANT
}  // namespace hvp
