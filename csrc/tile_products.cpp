// Compiled with AVX-512, and called only where the CPU has it.
#include "tile_products.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace hvp {
namespace {

// Below this many multiplications BLAS is as fast.
constexpr int64_t kLeast = int64_t{1} << 15;
// Vectors of an inner product from which its sums repay their last additions, across lanes.
constexpr int64_t kShortest = 12;
// Columns that are packed at most.
constexpr int64_t kMostPacked = 128;
// Rows that are read again and again stay in the second-level cache.
constexpr int64_t kCacheBytes = int64_t{1} << 18;

// Which lanes of a vector count.
template <class T>
using Mask = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;

template <class T>
constexpr Mask<T> all() {
  return static_cast<Mask<T>>(~0u);
}

inline Vector<float> load(const float* from, __mmask16 mask) {
  return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(mask, from));
}
inline Vector<double> load(const double* from, __mmask8 mask) {
  return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(mask, from));
}
inline void store(float* to, __mmask16 mask, Vector<float> vector) {
  _mm512_mask_storeu_ps(to, mask, reinterpret_cast<__m512>(vector));
}
inline void store(double* to, __mmask8 mask, Vector<double> vector) {
  _mm512_mask_storeu_pd(to, mask, reinterpret_cast<__m512d>(vector));
}

inline float total(Vector<float> vector) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(vector)); }
inline double total(Vector<double> vector) { return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(vector)); }

// c[i, j] for C columns j of b and R columns i of a, each the inner product of two contiguous columns.
template <int C, int R, class T>
void dot_tile(const TileProduct<T>& p, int64_t i, int64_t j) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const T *const a = p.a + i * p.lda, *const b = p.b + j * p.ldb;
  Vector<T> sums[C][R] = {};
  int64_t k = 0;
  for (; k + kLanes <= p.k; k += kLanes) {
    Vector<T> left[C];
    for (int x = 0; x < C; ++x) left[x] = load<Vector<T>>(b + x * p.ldb + k);
    for (int y = 0; y < R; ++y) {
      const Vector<T> right = load<Vector<T>>(a + y * p.lda + k);
      for (int x = 0; x < C; ++x) sums[x][y] += left[x] * right;
    }
  }
  for (int x = 0; x < C; ++x) {
    for (int y = 0; y < R; ++y) {
      T sum = total(sums[x][y]);
      for (int64_t rest = k; rest < p.k; ++rest) sum += b[x * p.ldb + rest] * a[y * p.lda + rest];
      T& to = p.c[(j + x) * p.ldc + i + y];
      to = p.beta == T(0) ? p.alpha * sum : p.alpha * sum + p.beta * to;
    }
  }
}

template <int R, class T>
void dot_columns(const TileProduct<T>& p, int64_t i, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + 6 <= end; j += 6) dot_tile<6, R>(p, i, j);
  for (; j + 4 <= end; j += 4) dot_tile<4, R>(p, i, j);
  for (; j + 2 <= end; j += 2) dot_tile<2, R>(p, i, j);
  for (; j < end; ++j) dot_tile<1, R>(p, i, j);
}

template <class T>
void dots(const TileProduct<T>& p, int64_t first, int64_t last) {
  const int64_t bytes = std::max<int64_t>(1, p.k) * static_cast<int64_t>(sizeof(T));
  const int64_t block = std::max<int64_t>(6, kCacheBytes / bytes / 6 * 6);
  for (int64_t begin = 0; begin < p.n; begin += block) {
    const int64_t end = std::min(p.n, begin + block);
    int64_t i = first;
    for (; i + 4 <= last; i += 4) dot_columns<4>(p, i, begin, end);
    switch (last - i) {
      case 1:
        dot_columns<1>(p, i, begin, end);
        break;
      case 2:
        dot_columns<2>(p, i, begin, end);
        break;
      case 3:
        dot_columns<3>(p, i, begin, end);
        break;
    }
  }
}

// V vectors of C columns of c, the sum of columns of a times numbers of b; the last vector has the rows of
// `mask` alone.
template <int C, int V, class T>
void add_tile(const TileProduct<T>& p, int64_t i, int64_t j, int64_t column, int64_t row, Mask<T> mask) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const T *const a = p.a + i, *const b = p.b + j * column;
  Vector<T> sums[C][V] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    Vector<T> from[V];
    for (int v = 0; v < V; ++v) from[v] = load(a + k * p.lda + v * kLanes, v == V - 1 ? mask : all<T>());
    for (int x = 0; x < C; ++x) {
      const T factor = b[x * column + k * row];
      for (int v = 0; v < V; ++v) sums[x][v] += factor * from[v];
    }
  }
#pragma GCC unroll 8  // or the sums would stay in memory
  for (int x = 0; x < C; ++x) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      T* const to = p.c + (j + x) * p.ldc + i + v * kLanes;
      const Mask<T> rows = v == V - 1 ? mask : all<T>();
      Vector<T> result = p.alpha * sums[x][v];
      if (p.beta != T(0)) result += p.beta * load(to, rows);
      store(to, rows, result);
    }
  }
}

template <int V, class T>
void add_columns(const TileProduct<T>& p, int64_t i, int64_t first, int64_t last, int64_t column, int64_t row,
                 Mask<T> mask) {
  int64_t j = first;
  for (; j + 8 <= last; j += 8) add_tile<8, V>(p, i, j, column, row, mask);
  for (; j + 2 <= last; j += 2) add_tile<2, V>(p, i, j, column, row, mask);
  for (; j < last; ++j) add_tile<1, V>(p, i, j, column, row, mask);
}

// Rows three vectors at a time: of 100 numbers, 48, 48 and 4.
template <class T>
void adds(const TileProduct<T>& p, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const int64_t column = p.transpose_b ? 1 : p.ldb, row = p.transpose_b ? p.ldb : 1;
  for (int64_t i = 0; i < p.m; i += 3 * kLanes) {
    const int64_t vectors = std::min<int64_t>(3, (p.m - i + kLanes - 1) / kLanes);
    const int64_t rows = std::min(kLanes, p.m - i - (vectors - 1) * kLanes);
    const Mask<T> mask = static_cast<Mask<T>>((1u << rows) - 1);
    switch (vectors) {
      case 1:
        add_columns<1>(p, i, first, last, column, row, mask);
        break;
      case 2:
        add_columns<2>(p, i, first, last, column, row, mask);
        break;
      default:
        add_columns<3>(p, i, first, last, column, row, mask);
    }
  }
}

// Inner products of few columns with many: c[s, l] for columns s of `few` and l of `many`. The few are
// packed, so that neighbours stand side by side in a vector: nothing is added across lanes then.
template <class T>
struct Packed {
  const T* few;  // packed: `width` numbers for each k
  int64_t count, width;
  const T* many;
  int64_t leading, k;
  T alpha, beta;
  T* c;
  int64_t few_stride, many_stride;  // of c
};

template <int C, int V, class T>
void packed_tile(const Packed<T>& p, int64_t s, int64_t l) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const T *const few = p.few + s, *const many = p.many + l * p.leading;
  Vector<T> sums[C][V] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    Vector<T> from[V];
    for (int v = 0; v < V; ++v) from[v] = load<Vector<T>>(few + k * p.width + v * kLanes);
    for (int x = 0; x < C; ++x) {
      const T factor = many[x * p.leading + k];
      for (int v = 0; v < V; ++v) sums[x][v] += factor * from[v];
    }
  }
  T results[C][V * kLanes];
  std::memcpy(results, sums, sizeof results);
  const int64_t rows = std::min<int64_t>(V * kLanes, p.count - s);
  for (int64_t r = 0; r < rows; ++r) {
    T* const to = p.c + (s + r) * p.few_stride + l * p.many_stride;
    for (int x = 0; x < C; ++x) {
      T& result = to[x * p.many_stride];
      result = p.beta == T(0) ? p.alpha * results[x][r] : p.alpha * results[x][r] + p.beta * result;
    }
  }
}

template <int C, int V, class T>
void packed_columns(const Packed<T>& p, int64_t s, int64_t first, int64_t last) {
  int64_t l = first;
  for (; l + C <= last; l += C) packed_tile<C, V>(p, s, l);
  for (; l < last; ++l) packed_tile<1, V>(p, s, l);
}

template <class T>
void packed_dots(const Packed<T>& p, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  for (int64_t s = 0; s < p.width; s += 4 * kLanes) {
    switch ((p.width - s) / kLanes) {
      case 1:
        packed_columns<8, 1>(p, s, first, last);
        break;
      case 2:
        packed_columns<8, 2>(p, s, first, last);
        break;
      case 3:
        packed_columns<8, 3>(p, s, first, last);
        break;
      default:
        packed_columns<6, 4>(p, s, first, last);
    }
  }
}

// Memory that is used again. (The functions of a std::vector would be compiled for AVX-512 here, and the
// linker might keep these for the whole module.)
template <class T>
struct Memory {
  T* data = nullptr;
  int64_t size = 0;

  T* zeros(int64_t count) {
    if (count > size) {
      delete[] data;
      data = nullptr, size = 0;
      data = new T[static_cast<size_t>(count)];
      size = count;
    }
    std::memset(data, 0, static_cast<size_t>(count) * sizeof(T));
    return data;
  }
  ~Memory() { delete[] data; }
};

// `columns` of k contiguous numbers as k rows of `width`.
template <class T>
const T* packed(const T* from, int64_t leading, int64_t columns, int64_t k, int64_t width) {
  thread_local Memory<T> memory;
  T* const to = memory.zeros(k * width);
  constexpr int64_t kBlock = 16;
  for (int64_t start = 0; start < k; start += kBlock) {
    const int64_t end = std::min(k, start + kBlock);
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = start; j < end; ++j) to[j * width + i] = from[i * leading + j];
    }
  }
  return to;
}

template <class T>
bool run(const TileProduct<T>& p, int threads) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const bool dot = p.transpose_a && !p.transpose_b && p.k >= kShortest * kLanes;
  const bool add = !p.transpose_a && p.m >= kLanes && p.k >= 4;
  if (!(dot || add) || p.m * p.n * p.k < kLeast) return false;
  const bool first_few = p.m < p.n;
  const int64_t few = std::min(p.m, p.n), many = std::max(p.m, p.n);
  const int64_t width = (few + kLanes - 1) / kLanes * kLanes;
  // Where most of a vector would be padding, or packing would not be repaid, inner products are faster as
  // such.
  const bool pack = dot && few <= kMostPacked && 4 * few >= 3 * width && many >= 2 * few;
  Packed<T> dots_of_few{};
  if (pack) {
    dots_of_few = {first_few ? packed(p.a, p.lda, p.m, p.k, width) : packed(p.b, p.ldb, p.n, p.k, width),
                   few,
                   width,
                   first_few ? p.b : p.a,
                   first_few ? p.ldb : p.lda,
                   p.k,
                   p.alpha,
                   p.beta,
                   p.c,
                   first_few ? 1 : p.ldc,
                   first_few ? p.ldc : 1};
  }
  const int64_t shared = pack ? many : dot ? p.m : p.n, whole = pack ? 24 : dot ? 4 : 8;  // of tiles
  const int64_t tiles = (shared + whole - 1) / whole;
  const int64_t shares = std::min<int64_t>(threads, tiles);
  const auto share = [&](int64_t s) {
    const int64_t first = tiles * s / shares * whole,
                  last = std::min(shared, tiles * (s + 1) / shares * whole);
    pack ? packed_dots(dots_of_few, first, last) : dot ? dots(p, first, last) : adds(p, first, last);
  };
  if (shares <= 1) {
    share(0);
    return true;
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares))
  for (int64_t s = 0; s < shares; ++s) share(s);
  return true;
}

}  // namespace

bool tile_product(const TileProduct<float>& product, int threads) { return run(product, threads); }
bool tile_product(const TileProduct<double>& product, int threads) { return run(product, threads); }

}  // namespace hvp
