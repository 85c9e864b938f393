// The transforms of Winograd's minimal filtering F(2 x 2, 3 x 3): outputs are made in tiles of 2 x 2, each
// from a tile of 4 x 4 pixels, by 16 multiplications for every pair of channels where the definition
// takes 36.
//
//   output tile = A^T [(G g G^T) * (B^T d B)] A     for pixels d and a kernel g; * is by elements
//
// In one dimension, of outputs y0 = d0 g0 + d1 g1 + d2 g2 and y1 = d1 g0 + d2 g1 + d3 g2:
//
//   m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,
//   m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d1 - d3) g2,
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3.
//
// Tiles that are neighbours in a row stand side by side in vectors. The last vector of a row reaches beyond
// it and is written all the same: what follows is written later.
//
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "vectors.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Products that a tile takes for every pair of channels.
constexpr int kProducts = 16;

// The four ways to take every other row and every other column of a plane, in which the pixels of
// neighbouring tiles are neighbours: of a row (a b c d) with one pixel of padding, (0 b d) and (a c 0).
template <class T>
class Phases {
 public:
  Phases(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        pitch_(columns + Vectors<T>::kLanes),
        planes_(new T[4 * rows * pitch_]()) {}

  // Of a plane of `height` lines of `width`, from line `top` and column -`left` on, with zeros outside.
  void read(const T* plane, int64_t height, int64_t width, int64_t top, int64_t left, int64_t rows) {
    constexpr int64_t kLine = 64 / sizeof(T);  // of the cache
    for (int64_t r = 0; r < 2 * rows; ++r) {
      const bool inside = top + r >= 0 && top + r < height;
      // The next channel's plane, which no line of this one leads to.
      for (int64_t x = 0; x < width; x += kLine) __builtin_prefetch(plane + (height + top + r) * width + x);
      read_line(plane + (inside ? (top + r) * width : 0), inside ? width : 0, left, row(r & 1, 0, r / 2),
                row(r & 1, 1, r / 2));
    }
  }

  // Pixels (down, right) of tiles, from tile (i, j) on.
  HVP_INLINE Vector<T> pixels(int down, int right, int64_t i, int64_t j) const {
    return load<Vector<T>>(planes_.get() + ((2 * (down & 1) + (right & 1)) * rows_ + i + down / 2) * pitch_ +
                           j + right / 2);
  }

 private:
  T* row(int64_t down, int64_t right, int64_t i) {
    return planes_.get() + ((2 * down + right) * rows_ + i) * pitch_;
  }

  void read_line(const T* line, int64_t width, int64_t left, T* even, T* odd) const {
    const auto pixel = [&](int64_t x) { return x >= left && x < left + width ? line[x - left] : T(0); };
    const int64_t first = std::min((left + 1) / 2, columns_);
    const int64_t last = std::max(first, std::min((left + width) / 2, columns_));
    for (int64_t j = 0; j < first; ++j) even[j] = pixel(2 * j), odd[j] = pixel(2 * j + 1);
#pragma omp simd
    for (int64_t j = first; j < last; ++j) even[j] = line[2 * j - left], odd[j] = line[2 * j + 1 - left];
    for (int64_t j = last; j < columns_; ++j) even[j] = pixel(2 * j), odd[j] = pixel(2 * j + 1);
  }

  const int64_t rows_, columns_, pitch_;
  const std::unique_ptr<T[]> planes_;
};

// to[k] <- (B^T d B)[k], the products `stride` apart, for `rows` x `columns` tiles of 4 x 4 pixels d.
template <class T>
[[gnu::noinline]] void transform_inputs(const Phases<T>& d, int64_t rows, int64_t columns, T* to,
                                        int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += Vectors<T>::kLanes) {
      Vector<T> down[4][4];
      for (int b = 0; b < 4; ++b) {
        const Vector<T> d1 = d.pixels(1, b, i, j), d2 = d.pixels(2, b, i, j);
        down[0][b] = d.pixels(0, b, i, j) - d2;
        down[1][b] = d1 + d2;
        down[2][b] = d2 - d1;
        down[3][b] = d1 - d.pixels(3, b, i, j);
      }
      T* const at = to + i * columns + j;
      for (int a = 0; a < 4; ++a) {
        store(at + (4 * a + 0) * stride, down[a][0] - down[a][2]);
        store(at + (4 * a + 1) * stride, down[a][1] + down[a][2]);
        store(at + (4 * a + 2) * stride, down[a][2] - down[a][1]);
        store(at + (4 * a + 3) * stride, down[a][1] - down[a][3]);
      }
    }
  }
}

// to[k] <- (A y A^T)[k] for tiles of 2 x 2 outputs y: the transpose of what `transform_outputs` does.
template <class T>
[[gnu::noinline]] void transform_outputs_back(const Phases<T>& y, int64_t rows, int64_t columns, T* to,
                                              int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += Vectors<T>::kLanes) {
      Vector<T> down[4][2];
      for (int b = 0; b < 2; ++b) {
        const Vector<T> y0 = y.pixels(0, b, i, j), y1 = y.pixels(1, b, i, j);
        down[0][b] = y0, down[1][b] = y0 + y1, down[2][b] = y0 - y1, down[3][b] = -y1;
      }
      T* const at = to + i * columns + j;
      for (int a = 0; a < 4; ++a) {
        store(at + (4 * a + 0) * stride, down[a][0]);
        store(at + (4 * a + 1) * stride, down[a][0] + down[a][1]);
        store(at + (4 * a + 2) * stride, down[a][0] - down[a][1]);
        store(at + (4 * a + 3) * stride, -down[a][1]);
      }
    }
  }
}

// `rows` lines of `width` outputs, one or two, <- A^T m A for a row of tiles.
template <class T>
[[gnu::noinline]] void transform_outputs(const T* m, int64_t stride, T* lines, int64_t rows, int64_t width) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  for (int64_t j = 0; 2 * j < width; j += kLanes) {
    Vector<T> down[2][4];
    for (int b = 0; b < 4; ++b) {
      const auto product = [&](int a) { return load<Vector<T>>(m + (4 * a + b) * stride + j); };
      const Vector<T> m1 = product(1), m2 = product(2);
      down[0][b] = product(0) + m1 + m2;
      down[1][b] = m1 - m2 - product(3);
    }
    for (int64_t a = 0; a < rows; ++a) {
      T even[kLanes], odd[kLanes], line[2 * kLanes];
      store(even, down[a][0] + down[a][1] + down[a][2]);
      store(odd, down[a][1] - down[a][2] - down[a][3]);
      for (int64_t l = 0; l < kLanes; ++l) line[2 * l] = even[l], line[2 * l + 1] = odd[l];
      const int64_t count = std::min(2 * kLanes, width - 2 * j);
      T* const to = lines + a * width + 2 * j;
      if (count == 2 * kLanes) {
        std::memcpy(to, line, sizeof line);
      } else {
        std::memcpy(to, line, static_cast<size_t>(count) * sizeof(T));
      }
    }
  }
}

// to[k] <- (G g G^T)[k] for the kernels g of a vector, nine vectors.
template <class T>
HVP_INLINE void transform_kernels(const Vector<T>* g, T* to, int64_t stride) {
  const auto expand = [](Vector<T> g0, Vector<T> g1, Vector<T> g2, Vector<T>* result) {
    const Vector<T> half = (g0 + g2) / 2;
    result[0] = g0, result[1] = half + g1 / 2, result[2] = half - g1 / 2, result[3] = g2;
  };
  Vector<T> down[3][4], across[4];
  for (int b = 0; b < 3; ++b) expand(g[b], g[3 + b], g[6 + b], down[b]);
  for (int a = 0; a < 4; ++a) {
    expand(down[0][a], down[1][a], down[2][a], across);
    for (int b = 0; b < 4; ++b) store(to + (4 * a + b) * stride, across[b]);
  }
}

// g <- G^T u G: the transpose of what `transform_kernels` does.
template <class T>
HVP_INLINE void transform_kernels_back(const T* u, int64_t stride, Vector<T>* g) {
  const auto reduce = [](Vector<T> u0, Vector<T> u1, Vector<T> u2, Vector<T> u3, Vector<T>* result) {
    result[0] = u0 + (u1 + u2) / 2, result[1] = (u1 - u2) / 2, result[2] = (u1 + u2) / 2 + u3;
  };
  const auto product = [&](int k) { return load<Vector<T>>(u + k * stride); };
  Vector<T> down[4][3];
  for (int b = 0; b < 4; ++b) reduce(product(b), product(4 + b), product(8 + b), product(12 + b), down[b]);
  for (int a = 0; a < 3; ++a) reduce(down[0][a], down[1][a], down[2][a], down[3][a], g + 3 * a);
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
