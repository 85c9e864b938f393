// Matrix products in tiles of AVX-512 registers, for CPUs on which torch's BLAS does not use these.
#pragma once

#include <cstdint>

namespace hvp {

// Column-major as in BLAS: c (m x n) <- alpha op(a) b or alpha a op(b), plus beta c.
template <class T>
struct TileProduct {
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  T alpha;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  T beta;
  T* c;
  int64_t ldc;
};

// Whether tiles are in use here; torch's BLAS of 2026 has AVX2 code for AMD's processors, 95 to 105 GFLOP/s
// on one core where these tiles reach 140 (a^T b) and 250 (a b).
bool tiles_in_use();

// Called on import with what torch uses itself.
void choose_tiles(bool allowed);

// Makes the product if it is of a kind that tiles are faster for; otherwise returns false.
bool tile_product(const TileProduct<float>& product, int threads);
bool tile_product(const TileProduct<double>& product, int threads);

}  // namespace hvp
