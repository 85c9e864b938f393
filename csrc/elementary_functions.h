// exp, the logistic function and tanh without calls and branches, so that loops over them become vector
// instructions; errors are a few units in the last place. NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
struct Floating;

template <>
struct Floating<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kTerms = 7;
  static constexpr Bits kBias = 127;
  static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the last bits
  static constexpr float kLargest = 87.0F, kZero = -104.0F, kInfinite = 89.0F, kSaturated = 10.0F;
};

template <>
struct Floating<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kTerms = 13;
  static constexpr Bits kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLargest = 708.0, kZero = -746.0, kInfinite = 710.0, kSaturated = 20.0;
};

template <class To, class From>
HVP_INLINE To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "expected types of one size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
HVP_INLINE T power_of_two(typename Floating<T>::Bits n) {
  using F = Floating<T>;
  return bits_as<T>(static_cast<typename F::Bits>((n + F::kBias) << F::kMantissa));
}

// e^x = 2^n (1 + rest), with n = round(x / ln 2), so that the rest is e^r - 1 for an |r| <= ln(2) / 2, where
// a Taylor polynomial is exact to rounding. For x = -3 the quotient is -4.33, and n = -4.
template <class T>
struct SplitExponential {
  typename Floating<T>::Bits n;  // negative numbers as in two's complement
  T rest;

  explicit HVP_INLINE SplitExponential(T x) {
    using F = Floating<T>;
    const T shifted = x * T(1.4426950408889634) + F::kRound, whole = shifted - F::kRound;
    const T r = x - whole * T(0.693359375) - whole * T(-2.121944400546905827679e-4);
    T factorial = 1;
    T coefficients[F::kTerms + 1];
    for (int k = 1; k <= F::kTerms; ++k) {
      factorial *= T(k);
      coefficients[k] = T(1) / factorial;
    }
    T sum = coefficients[F::kTerms];
    for (int k = F::kTerms - 1; k >= 1; --k) sum = sum * r + coefficients[k];
    n = bits_as<typename F::Bits>(shifted) - bits_as<typename F::Bits>(F::kRound);
    rest = sum * r;
  }
};

template <class T>
HVP_INLINE T clamped(T x, T least, T largest) {
  const T below = x > largest ? largest : x;
  return below < least ? least : below;
}

// Not for x > 88, or 709 in float64; zero where e^x is below the smallest normal number.
template <class T>
HVP_INLINE T exponential_or_zero(T x) {
  constexpr T kLeast = -Floating<T>::kLargest;
  const SplitExponential<T> e(x < kLeast ? kLeast : x);
  return x < kLeast ? T(0) : power_of_two<T>(e.n) * (T(1) + e.rest);
}

// For every x: by two powers, since 2^n may be out of range where e^x is not.
template <class T>
HVP_INLINE T exponential(T x) {
  using F = Floating<T>;
  const SplitExponential<T> e(clamped(x, F::kZero, F::kInfinite));
  constexpr typename F::Bits kShift = F::kBias + 1;  // makes n positive, as only such numbers shift fast
  const typename F::Bits half = ((e.n + 2 * kShift) >> 1) - kShift;
  return (T(1) + e.rest) * power_of_two<T>(half) * power_of_two<T>(e.n - half);
}

template <class T>
HVP_INLINE T sigmoid(T x) {
  // Where 2^n is infinite, the result would be below the smallest normal number, and is zero.
  const SplitExponential<T> e(clamped(-x, -Floating<T>::kLargest, Floating<T>::kInfinite));
  return T(1) / (T(1) + power_of_two<T>(e.n) * (T(1) + e.rest));
}

// t / (t + 2) with t = e^2x - 1, which keeps the accuracy of small x.
template <class T>
HVP_INLINE T hyperbolic_tangent(T x) {
  constexpr T kMost = Floating<T>::kSaturated;
  const SplitExponential<T> e(T(2) * clamped(x, -kMost, kMost));
  const T power = power_of_two<T>(e.n), t = power * e.rest + (power - T(1));
  return t / (t + T(2));
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
