// Compiled with AVX-512, and called only where the CPU has it.
#include "tile_products.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace hvp {
namespace {

constexpr int kVectorBytes = 64;
// Below this many multiplications BLAS is as fast.
constexpr int64_t kLeast = int64_t{1} << 15;
// Vectors of an inner product from which its sums repay their last additions, across lanes.
constexpr int64_t kShortest = 12;
// Rows that are read again and again stay in the second-level cache.
constexpr int64_t kCacheBytes = int64_t{1} << 18;

template <class T>
struct Vectors {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vector = typename Vectors<T>::Vector;

template <class T>
inline __attribute__((always_inline)) Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
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
    for (int x = 0; x < C; ++x) left[x] = load(b + x * p.ldb + k);
    for (int y = 0; y < R; ++y) {
      const Vector<T> right = load(a + y * p.lda + k);
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
    for (; i < last; ++i) dot_columns<1>(p, i, begin, end);
  }
}

// V vectors of C columns of c, the sum of columns of a times numbers of b.
template <int C, int V, class T>
void add_tile(const TileProduct<T>& p, int64_t i, int64_t j, int64_t column, int64_t row) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const T *const a = p.a + i, *const b = p.b + j * column;
  Vector<T> sums[C][V] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    Vector<T> from[V];
    for (int v = 0; v < V; ++v) from[v] = load(a + k * p.lda + v * kLanes);
    for (int x = 0; x < C; ++x) {
      const T factor = b[x * column + k * row];
      for (int v = 0; v < V; ++v) sums[x][v] += factor * from[v];
    }
  }
  for (int x = 0; x < C; ++x) {
    for (int v = 0; v < V; ++v) {
      T* const to = p.c + (j + x) * p.ldc + i + v * kLanes;
      Vector<T> result = p.alpha * sums[x][v];
      if (p.beta != T(0)) result += p.beta * load(to);
      std::memcpy(to, &result, sizeof result);
    }
  }
}

template <int V, class T>
void add_columns(const TileProduct<T>& p, int64_t i, int64_t first, int64_t last, int64_t column,
                 int64_t row) {
  int64_t j = first;
  for (; j + 8 <= last; j += 8) add_tile<8, V>(p, i, j, column, row);
  for (; j + 2 <= last; j += 2) add_tile<2, V>(p, i, j, column, row);
  for (; j < last; ++j) add_tile<1, V>(p, i, j, column, row);
}

template <class T>
void adds(const TileProduct<T>& p, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const int64_t column = p.transpose_b ? 1 : p.ldb, row = p.transpose_b ? p.ldb : 1;
  int64_t i = 0;
  for (; i + 3 * kLanes <= p.m; i += 3 * kLanes) add_columns<3>(p, i, first, last, column, row);
  for (; i + kLanes <= p.m; i += kLanes) add_columns<1>(p, i, first, last, column, row);
  for (; i < p.m; ++i) {
    for (int64_t j = first; j < last; ++j) {
      T sum = 0;
      for (int64_t k = 0; k < p.k; ++k) sum += p.a[k * p.lda + i] * p.b[j * column + k * row];
      T& to = p.c[j * p.ldc + i];
      to = p.beta == T(0) ? p.alpha * sum : p.alpha * sum + p.beta * to;
    }
  }
}

template <class T>
bool run(const TileProduct<T>& p, int threads) {
  constexpr int64_t kLanes = Vectors<T>::kLanes;
  const bool dot = p.transpose_a && !p.transpose_b && p.k >= kShortest * kLanes;
  const bool add = !p.transpose_a && p.m >= kLanes && p.k >= 4;
  if (!(dot || add) || p.m * p.n * p.k < kLeast) return false;
  const int64_t shared = dot ? p.m : p.n, whole = dot ? 4 : 8;  // a share begins with a whole tile
  const int64_t tiles = (shared + whole - 1) / whole;
  const int64_t shares = std::min<int64_t>(threads, tiles);
  const auto share = [&](int64_t s) {
    const int64_t first = tiles * s / shares * whole,
                  last = std::min(shared, tiles * (s + 1) / shares * whole);
    dot ? dots(p, first, last) : adds(p, first, last);
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
