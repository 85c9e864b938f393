// Functions of one number as loops can be vectorized with them: without branches, tables and calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace hvp {
namespace {

template <class To, class From>
HVP_INLINE To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "expected types of one size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// e^x = 2^n e^r with |r| <= log(2) / 2, and e^r by its Taylor series; within 2 units in the last place.
HVP_INLINE float exponential(float x) {
  x = x < -104.f ? -104.f : x;  // NaN stays
  x = x > 89.f ? 89.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the last bits are the nearest integer
  const int32_t n = static_cast<int32_t>(bits_as<uint32_t>(shifted) - 0x4B400000u);
  const float whole = shifted - 12582912.f;
  const float r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float series = 1.f / 5040;
  series = series * r + 1.f / 720;
  series = series * r + 1.f / 120;
  series = series * r + 1.f / 24;
  series = series * r + 1.f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.f;
  series = series * r + 1.f;
  // In two steps, since 2^n may be out of range where e^x is not.
  const uint32_t half = static_cast<uint32_t>(n >> 1), rest = static_cast<uint32_t>(n) - half;
  return series * bits_as<float>((half + 127u) << 23) * bits_as<float>((rest + 127u) << 23);
}

HVP_INLINE double exponential(double x) { return std::exp(x); }

// Near 0 by an odd series, since 1 - 2 / (e^2x + 1) would cancel.
HVP_INLINE float hyperbolic_tangent(float x) {
  const float size = std::fabs(x), square = x * x;
  float series = -5.70498872745e-3f;
  series = series * square + 2.06390887954e-2f;
  series = series * square - 5.37397155531e-2f;
  series = series * square + 1.33314422036e-1f;
  series = series * square - 3.33332819422e-1f;
  const float far = 1.f - 2.f / (exponential(2.f * size) + 1.f);
  return size < 0.625f ? x + x * square * series : std::copysign(far, x);
}

HVP_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }

template <class T>
HVP_INLINE T logistic(T x) {
  return T(1) / (T(1) + exponential(-x));
}

}  // namespace
}  // namespace hvp
