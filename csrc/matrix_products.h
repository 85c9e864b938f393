// A matrix product by what is fastest for it: tiles, or the BLAS of torch.
#pragma once

#include "blas.h"
#include "tile_products.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Below so many multiplications one thread is faster than waking others.
constexpr int64_t kParallelProducts = int64_t{1} << 22;

// While it lives, BLAS uses one thread, if that was asked for and can be.
class OneBlasThread {
 public:
  explicit OneBlasThread(bool wanted) : active_(wanted && blas().set_threads != nullptr) {
    if (active_) before_ = blas().set_threads(1);
  }
  ~OneBlasThread() {
    if (active_) blas().set_threads(before_);
  }
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  bool active_;
  int before_ = 0;
};

inline bool tiles_available() {
#ifdef HVP_HAS_X86
  return tiles_in_use();
#else
  return false;
#endif
}

// The sizes fit in 32 bits; `threads` are for tiles.
template <class T>
void multiply(const TileProduct<T>& p, [[maybe_unused]] int threads) {
#ifdef HVP_HAS_X86
  if (tiles_in_use() && tile_product(p, threads)) return;
#endif
  const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  const int lda = static_cast<int>(p.lda), ldb = static_cast<int>(p.ldb), ldc = static_cast<int>(p.ldc);
  blas().gemm<T>()(p.transpose_a ? "T" : "N", p.transpose_b ? "T" : "N", &m, &n, &k, &p.alpha, p.a, &lda, p.b,
                   &ldb, &p.beta, p.c, &ldc);
}

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
