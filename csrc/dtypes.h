// Element types of the products, and their exact widening to the state's type.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HVP_INLINE __host__ __device__ __forceinline__
#else
#define HVP_INLINE inline __attribute__((always_inline))
#endif

namespace hvp {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;
constexpr int64_t kWidths[kDTypes] = {4, 8, 2, 2};  // bytes of an element

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

HVP_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HVP_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

template <class State>
HVP_INLINE State widen(float x) {
  return static_cast<State>(x);
}

template <class State>
HVP_INLINE State widen(double x) {
  return static_cast<State>(x);
}

template <class State>
HVP_INLINE State widen(BFloat16 x) {
  return static_cast<State>(float_of(static_cast<uint32_t>(x.bits) << 16));
}

// Without branches, so that the loops around it vectorize on every target. The 15 bits of the magnitude,
// moved to where a float has them, are the number times 2^-112, subnormals included; infinities and NaNs also
// need all bits of the exponent. For example 1.0 has the bits 0x3c00; 0x3c00 << 13 is the float 2^-112.
template <class State>
HVP_INLINE State widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu);
  const uint32_t scaled = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return static_cast<State>(float_of(scaled | special | sign));
}

}  // namespace hvp
