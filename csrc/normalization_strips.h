// The inner loops of the normalization of images: sums over points of a channel, and results from them.
#pragma once

#include "normalization.h"
#include "vectors.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <Level level>
constexpr int kSums = level == Level::kValue      ? 2
                      : level == Level::kBackward ? 2
                                                  : 5;
template <Level level>
constexpr int kCoefficients = level == Level::kValue      ? 2
                              : level == Level::kBackward ? 3
                                                          : 7;

template <class V, class T>
HVP_INLINE V spread(T x) {
  return V{} + x;
}

// Of `points` vectors, each `stride` from the one before: sums of (x - shift) scale and its square; or of g
// and g x; and of t, t x and t g.
template <Level level, class V, class T>
HVP_INLINE void add_strip(const T* x, const T* g, const T* t, int64_t points, int64_t stride, V shift,
                          V scale, V* sums) {
  for (int64_t p = 0; p < points; ++p) {
    const V normal = (load<V>(x + p * stride) - shift) * scale;
    if (level == Level::kValue) {
      sums[0] += normal;
      sums[1] += normal * normal;
      continue;
    }
    const V gradient = load<V>(g + p * stride);
    sums[0] += gradient;
    sums[1] += gradient * normal;
    if (level == Level::kDoubleBackward) {
      const V tangent = load<V>(t + p * stride);
      sums[2] += tangent;
      sums[3] += tangent * normal;
      sums[4] += tangent * gradient;
    }
  }
}

// The results at those points; `k` are the coefficients.
template <Level level, class V, class T>
HVP_INLINE void combine_strip(const T* x, const T* g, const T* t, T* first, T* second, int64_t points,
                              int64_t stride, V mean, const V* k) {
  for (int64_t p = 0; p < points; ++p) {
    const int64_t at = p * stride;
    const V centred = load<V>(x + at) - mean;
    V one, two;
    if (level == Level::kValue) {
      one = k[0] * centred + k[1];
      store(first + at, one);
      continue;
    }
    const V gradient = load<V>(g + at);
    if (level == Level::kBackward) {
      two = k[0] * gradient + k[1] * centred + k[2];
    } else {
      const V tangent = load<V>(t + at);
      one = k[0] * tangent + k[1] * centred + k[2];
      two = k[3] * gradient + k[4] * tangent + k[5] * centred + k[6];
      store(first + at, one);
    }
    store(second + at, two);
  }
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
