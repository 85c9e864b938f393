// The logistic function and tanh without branches, so that loops over them become vector instructions; errors
// are a few units in the last place.
#pragma once

#include <cstdint>
#include <cstring>

namespace hvp {
namespace {

template <class T>
struct Floating;

template <>
struct Floating<float> {
  using Integer = uint32_t;  // bits: what overflows, for NaN, is lost
  static constexpr int kMantissa = 23, kTerms = 7;
  static constexpr Integer kBias = 127;
  static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the last bits
  static constexpr float kLargest = 87.0F, kSaturated = 10.0F;
};

template <>
struct Floating<double> {
  using Integer = uint64_t;
  static constexpr int kMantissa = 52, kTerms = 13;
  static constexpr Integer kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLargest = 708.0, kSaturated = 20.0;
};

template <class To, class From>
inline __attribute__((always_inline)) To bits_of(From value) {
  To result;
  static_assert(sizeof result == sizeof value, "the same bits");
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// The powers of e and of 2 that exp(x) = power (1 + rest) is made of: x = k ln 2 + r with |r| <= ln 2 / 2,
// power = 2^k, rest = exp(r) - 1 by its series. For |x| up to kLargest.
template <class T>
inline __attribute__((always_inline)) void split_exp(T x, T* power, T* rest) {
  using F = Floating<T>;
  using Integer = typename F::Integer;
  constexpr T kLog2E = T(1.4426950408889634), kLn2High = T(0.693359375),
              kLn2Low = T(-2.121944400546905827679e-4);
  const T shifted = x * kLog2E + F::kRound;
  const T k = shifted - F::kRound;
  const Integer exponent = bits_of<Integer>(shifted) - bits_of<Integer>(F::kRound) + F::kBias;
  *power = bits_of<T>(static_cast<Integer>(exponent << F::kMantissa));
  const T r = x - k * kLn2High - k * kLn2Low;
  T factorial = 1;
  T coefficients[F::kTerms + 1];
  for (int n = 1; n <= F::kTerms; ++n) {
    factorial *= T(n);
    coefficients[n] = T(1) / factorial;
  }
  T sum = coefficients[F::kTerms];
  for (int n = F::kTerms - 1; n >= 1; --n) sum = sum * r + coefficients[n];
  *rest = sum * r;
}

// Not a number stays what it is.
template <class T>
inline __attribute__((always_inline)) T clamped(T x, T largest) {
  const T below = x > largest ? largest : x;
  return below < -largest ? -largest : below;
}

template <class T>
inline __attribute__((always_inline)) T sigmoid(T x) {
  T power, rest;
  split_exp(clamped(-x, Floating<T>::kLargest), &power, &rest);
  return T(1) / (T(1) + (power + power * rest));
}

// t / (t + 2) with t = exp(2 x) - 1, which keeps the accuracy of small x.
template <class T>
inline __attribute__((always_inline)) T hyperbolic_tangent(T x) {
  T power, rest;
  split_exp(T(2) * clamped(x, Floating<T>::kSaturated), &power, &rest);
  const T t = power * rest + (power - T(1));
  return t / (t + T(2));
}

}  // namespace
}  // namespace hvp
