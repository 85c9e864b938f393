// exp for loops that the compiler vectorizes: no calls, no branches.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// e^x = 2^n e^r with n = round(x / ln 2), so that |r| <= ln(2) / 2, where a Taylor polynomial is exact to
// rounding. Adding 1.5 * 2^23 leaves n in the last bits of the sum: for x = -3 the quotient is -4.33, and the
// sum ends in the bits of -4. Zero below the smallest normal number; NaN stays NaN; not for x > 88.
HVP_INLINE float exponential(float x) {
  constexpr float kLeast = -87.0f, kShift = 12582912.0f;
  const float bounded = x < kLeast ? kLeast : x;
  const float shifted = bounded * 1.44269504088896341f + kShift, n = shifted - kShift;
  const float r = bounded - n * 0.693145751953125f - n * 1.42860682030941723e-6f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLeast ? 0.0f : sum * power;
}

// The same with 1.5 * 2^52; not for x > 709.
HVP_INLINE double exponential(double x) {
  constexpr double kLeast = -708.0, kShift = 6755399441055744.0;
  const double bounded = x < kLeast ? kLeast : x;
  const double shifted = bounded * 1.44269504088896340736 + kShift, n = shifted - kShift;
  const double r = bounded - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  double sum = 1.0 / 6227020800.0;
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + (uint64_t{1023} << 52);
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLeast ? 0.0 : sum * power;
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
