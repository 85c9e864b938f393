// Vectors of the widest registers that a file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace hvp {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vectors {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vector = typename Vectors<T>::Vector;

// From any address.
template <class V, class T>
HVP_INLINE V load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// To any address.
template <class V, class T>
HVP_INLINE void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

}  // namespace
}  // namespace hvp
