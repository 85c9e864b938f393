// The two small matrix products of the linear model, in tiles that keep their sums in registers. Every
// element is summed in one order, whatever the tile, the block or the thread it falls into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hvp {
namespace HVP_VARIANT {
namespace {

#ifdef __AVX2__
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

template <class T>
HVP_INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class T>
HVP_INLINE void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// out[c][r] = sum_j x[r][j] y[c][j], for R rows of x and C rows of y.
template <int R, int C, class T>
void dot_tile(const T* x, int64_t x_stride, T* const* y, int64_t count, T* out, int64_t out_stride) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  Vector<T> sums[C][R] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Vector<T> rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(x + r * x_stride + j);
    for (int c = 0; c < C; ++c) {
      const Vector<T> column = load(y[c] + j);
      for (int r = 0; r < R; ++r) sums[c][r] += rows[r] * column;
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[c][r][lane];
      for (int64_t rest = j; rest < count; ++rest) sum += x[r * x_stride + rest] * y[c][rest];
      out[c * out_stride + r] = sum;
    }
  }
}

// Few rows of y leave registers for more rows of x.
constexpr int kDotRows[5] = {0, 6, 6, 4, 3};

template <int C, class T>
void dot_strip(const T* x, int64_t x_stride, int64_t rows, T* const* y, int64_t count, T* out,
               int64_t out_stride) {
  constexpr int R = kDotRows[C];
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_tile<R, C>(x + r * x_stride, x_stride, y, count, out + r, out_stride);
  for (; r < rows; ++r) dot_tile<1, C>(x + r * x_stride, x_stride, y, count, out + r, out_stride);
}

// out[c][r] = sum_j x[r][j] y[c][j], for all rows of x and of y.
template <class T>
void dots(const T* x, int64_t x_stride, int64_t rows, T* const* y, int64_t columns, int64_t count, T* out,
          int64_t out_stride) {
  for (int64_t c = 0; c < columns; c += 4) {
    T* const* here = y + c;
    T* const to = out + c * out_stride;
    switch (std::min<int64_t>(4, columns - c)) {
      case 1:
        dot_strip<1>(x, x_stride, rows, here, count, to, out_stride);
        break;
      case 2:
        dot_strip<2>(x, x_stride, rows, here, count, to, out_stride);
        break;
      case 3:
        dot_strip<3>(x, x_stride, rows, here, count, to, out_stride);
        break;
      default:
        dot_strip<4>(x, x_stride, rows, here, count, to, out_stride);
    }
  }
}

// out[c][0 .. J vectors) += sum_m g[c][m] x[m][..], for C rows.
template <int C, int J, class T>
HVP_INLINE void add_tile(T* const* out, const T* g, int64_t g_stride, const T* x, int64_t x_stride,
                         int64_t count, int64_t begin) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  Vector<T> sums[C][J];
  for (int c = 0; c < C; ++c) {
    for (int j = 0; j < J; ++j) sums[c][j] = load(out[c] + begin + j * kLanes);
  }
  for (int64_t m = 0; m < count; ++m) {
    Vector<T> row[J];
    for (int j = 0; j < J; ++j) row[j] = load(x + m * x_stride + begin + j * kLanes);
    for (int c = 0; c < C; ++c) {
      const T factor = g[c * g_stride + m];
      for (int j = 0; j < J; ++j) sums[c][j] += factor * row[j];
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int j = 0; j < J; ++j) store(out[c] + begin + j * kLanes, sums[c][j]);
  }
}

template <int C, class T>
void add_strip(T* const* out, const T* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t count,
               int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  constexpr int kWide = 12 / C;
  for (; begin + kWide * kLanes <= end; begin += kWide * kLanes) {
    add_tile<C, kWide>(out, g, g_stride, x, x_stride, count, begin);
  }
  for (; begin + kLanes <= end; begin += kLanes) add_tile<C, 1>(out, g, g_stride, x, x_stride, count, begin);
  for (; begin < end; ++begin) {
    for (int c = 0; c < C; ++c) {
      T sum = out[c][begin];
      for (int64_t m = 0; m < count; ++m) sum += g[c * g_stride + m] * x[m * x_stride + begin];
      out[c][begin] = sum;
    }
  }
}

// out[c][begin .. end) += sum_m g[c][m] x[m][begin .. end), for all rows of g.
template <class T>
void add_products(T* const* out, int64_t rows, const T* g, int64_t g_stride, const T* x, int64_t x_stride,
                  int64_t count, int64_t begin, int64_t end) {
  for (int64_t c = 0; c < rows; c += 4) {
    const T* const from = g + c * g_stride;
    switch (std::min<int64_t>(4, rows - c)) {
      case 1:
        add_strip<1>(out + c, from, g_stride, x, x_stride, count, begin, end);
        break;
      case 2:
        add_strip<2>(out + c, from, g_stride, x, x_stride, count, begin, end);
        break;
      case 3:
        add_strip<3>(out + c, from, g_stride, x, x_stride, count, begin, end);
        break;
      default:
        add_strip<4>(out + c, from, g_stride, x, x_stride, count, begin, end);
    }
  }
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
