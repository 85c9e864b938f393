// What convolutions do with lines of images. Such loops are functions of their own, so that what they need
// stays in registers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Numbers that an instruction or two copy at once, and sides of a square that is turned over at once.
constexpr int64_t kLanes = 8, kSquare = 16;

// The elements from, 8, 16, ... on, and the last eight of `n` >= 8: of ten, 0 to 7 and 2 to 9.
template <class T>
[[gnu::noinline]] void copy_lines(const T* from, int64_t pitch, T* to, int64_t width, int64_t lines,
                                  int64_t n) {
  for (int64_t i = 0; i < lines; ++i, from += pitch, to += width) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const int64_t start = std::min(j, n - kLanes);
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) to[start + l] = from[start + l];
    }
  }
}

template <class T>
[[gnu::noinline]] void add_lines(T* to, int64_t pitch, const T* from, int64_t width, int64_t lines,
                                 int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < lines; ++i, to += pitch, from += width) {
    for (int64_t j = 0; j < whole; j += kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) to[j + l] += from[j + l];
    }
    for (int64_t j = whole; j < n; ++j) to[j] += from[j];
  }
}

// to[q, o] <- from[o, q] for all lines o and `points` q, tile by tile.
template <class T>
[[gnu::noinline]] void turn_over(const T* from, int64_t pitch, int64_t lines, int64_t points, T* to) {
  for (int64_t p = 0; p < points; p += kSquare) {
    for (int64_t o = 0; o < lines; ++o) {
      const T* const line = from + o * pitch + p;
      T* const column = to + p * lines + o;
      if (p + kSquare <= points) {
        for (int64_t q = 0; q < kSquare; ++q) column[q * lines] = line[q];
      } else {
        for (int64_t q = 0; q < points - p; ++q) column[q * lines] = line[q];
      }
    }
  }
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
