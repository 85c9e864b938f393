// The counter-based generator of dropout masks; see hvp_engine/differentiable/attention/dropout.py.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// The four words of `counter`, in its place; ten rounds of Philox 4x32.
HVP_INLINE void philox(uint32_t (&counter)[4], uint64_t seed) {
  auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter[0], second = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t a = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ low;
    const uint32_t c = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ high;
    counter[1] = static_cast<uint32_t>(second);
    counter[3] = static_cast<uint32_t>(first);
    counter[0] = a;
    counter[2] = c;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
