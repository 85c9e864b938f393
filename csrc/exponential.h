// exp(x) for x <= 0, in a form that compilers vectorize. Accurate to 2 units in the last place; 0 far below.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace hvp {

// With n = round(x / ln 2) and r = x - n ln 2, exp(x) = 2^n exp(r), and a short polynomial is exp(r). Adding
// 1.5 * 2^23 to a float rounds it to a whole number, which then is in its last bits: 2^n is made of them by a
// shift. For example x = -1.5: n = -2, r = -0.114, exp(x) = 0.25 * 0.893.
HVP_INLINE float exponential(float x) {
  constexpr float kMagic = 12582912.0f, kLowest = -87.0f;
  const float inside = x > kLowest ? x : kLowest;
  const float shifted = inside * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const float scale = float_of((bits_of(shifted) + 127u) << 23);
  return x > kLowest ? y * scale : (x != x ? x : 0.0f);
}

HVP_INLINE double exponential(double x) {
  constexpr double kMagic = 6755399441055744.0, kLowest = -708.0;
  const double inside = x > kLowest ? x : kLowest;
  const double shifted = inside * 1.4426950408889634074 + kMagic;
  const double n = shifted - kMagic;
  const double r = (inside - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023u) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x > kLowest ? y * scale : (x != x ? x : 0.0);
}

}  // namespace hvp
